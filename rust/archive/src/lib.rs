//! A tree of files as a tar stream, and a tar stream as a tree of files.
//!
//! Both ends of `diapause cp` use it: the client on the host, the agent in the guest. Whoever reads
//! takes the stream for hostile: a path is walked one component at a time and never through a link,
//! a tree is made whole in a directory of its own before a part of it stands where it was asked
//! for, and every length is checked before anything is kept for it. `docs/formats/copy-stream.md`
//! says what is in a stream. `image import` reads root file systems with it. Layers, lowest first:
//! `error` and `limits`, `name` (paths), `meta` (modes, owners, times), `sparse` (maps), `entry`
//! with `write` and `read` (the stream), `tally` (progress, and data into files), `pack`,
//! `staging`, `place` and `unpack` (files), `rootfs` (images).
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod entry;
mod error;
pub mod limits;
mod meta;
mod name;
mod pack;
mod place;
mod read;
mod rootfs;
mod sparse;
mod staging;
mod tally;
mod unpack;
mod write;

pub use entry::{Entry, Kind, Special};
pub use error::{Error, Result};
pub use meta::{Meta, Trust};
pub use pack::pack;
pub use read::{Attribute, Reader};
pub use rootfs::{unpack_rootfs, Bounds, Placed};
pub use unpack::unpack;
pub use write::Writer;

/// Called now and then with (bytes of data done, bytes in all or 0); `false` cancels the work.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// What was copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of file data that went through the stream.
    pub bytes: u64,
    /// What was left out or changed, as sentences; names in them are escaped.
    pub notes: Vec<String>,
    /// How many notes there were beyond those that are kept.
    pub more_notes: u64,
}

impl Summary {
    pub(crate) fn note(&mut self, path: &[u8], what: &str) {
        if self.notes.len() < limits::NOTES_MAX {
            let shown = error::escape(path);
            self.notes.push(format!("{shown}: {what}"));
        } else {
            self.more_notes += 1;
        }
    }
}
