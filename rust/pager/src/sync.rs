//! The primitives that `flight` stands on: its test puts loom's in their place.

pub(crate) use std::sync::{Arc, Condvar, Mutex};
