//! Serves the pages of snapshots to VMMs that run, before anybody has read them as a whole.
//!
//! Two processes, one pair for each home. The **pager** answers page faults; the **keeper** holds
//! what a pager must not lose with its life: the FUSE device, the descriptors of VMMs and what each
//! file stands for. Each starts the other again. `docs/pager.md` says who owns what and what
//! happens at each death.
//!
//! Invariants:
//! - A page that is served is right: verified up to the digest of the header that maps it. A file
//!   is passed through only to one that was verified whole when it was made.
//! - Where it can't be, the access waits; after a bound the VMM is killed, *then* the access fails.
//! - Who holds the FUSE device never touches a file on it.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod ahead;
mod bears;
pub mod blobs;
pub mod build;
pub mod clients;
pub mod control;
pub mod device;
mod fetch;
pub mod flight;
pub mod frames;
pub mod fuse;
pub mod given;
pub mod handed;
pub mod held;
pub mod keep;
pub mod keeper;
pub mod kept;
pub mod log;
pub mod namespace;
pub mod nodes;
pub mod packet;
pub mod passed;
pub mod prefetch;
pub mod process;
pub mod replay;
pub mod runs;
pub mod seen;
pub mod server;
pub mod service;
pub mod spec;
mod sync;
pub mod touched;
pub mod trace;
pub mod uffd;
pub mod wire;
mod workers;
