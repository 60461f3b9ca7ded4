//! The data plane over files: compare and pack what a capture took, and materialize a device.
//!
//! `scan`, `copy` and `buffer` take the dirty pages of a VMM that stands; everything else works
//! behind it, from files to files, verifies what it reads and writes each file once. `unsafe` only
//! where the kernel is called.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod blob;
pub mod buffer;
mod builds;
pub mod cached;
mod capture_source;
pub mod check;
mod clone;
pub mod compare;
pub mod copy;
mod device_sums;
mod error;
mod fetch;
mod headers;
mod materialize;
pub mod overlay_head;
pub mod overlay_map;
mod pack;
mod parent;
mod rebuild;
pub mod scan;
mod source;
mod sums;
mod threads;
pub mod timed;
mod write_out;

pub use blob::digest_file;
pub use builds::verify_build;
pub use capture_source::read_head;
pub use device_sums::{sum_device, SummedBase};
pub use error::{Error, Result};
pub use fetch::Captures;
pub use headers::{write_provisional, write_zero_header, HeaderFile};
pub use materialize::{materialize, Base, Materialized, Request};
pub use pack::{pack, pack_file, Packed, Places, Progress};
pub use rebuild::{rebuild, FlatPages, Rebuilt};
pub use source::{PageSource, SourceRun};
pub use sums::{FlatCheck, FlatSums};
pub use write_out::write_out;
