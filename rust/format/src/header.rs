//! The header format: what its blocks are, and the bytes that reader and writer share.
//!
//! ```text
//! head, 32 bytes:  0 magic "DIAPHDR\0"    8 version u32 = 1   12 page size u32 = 4096
//!                 16 device pages u64   24 zero u32         28 crc32 of the 28 bytes before
//! block:           0 type u8, 3 zero bytes                   4 payload length u32
//!                  8 crc32 of those 8 bytes and the payload 12 payload
//!  1 builds:   n x ( id 32, pages u64, kind u8: 1 packed, 2 capture )
//!  2 extents:  first page u64, count u32, bytes of each of three columns u32 x 3, then the
//!              columns, varints: lengths; builds (0 zero, else the build's number from 1);
//!              for each extent that is not zero, zigzag(position - the end of the extent before
//!              it in this block that maps to its build, 0 where there is none)
//!  3 end:      extents u64, pages that are not zero u64, builds u64, BLAKE3-256 of all bytes
//!              before this block
//! ```
//!
//! Extents cover the device from page 0 without gap or overlap. One mapping has exactly one
//! encoding: adjacent extents that continue each other are merged, an extents block holds 4096 of
//! them (the last one the rest), a builds block holds, in the order of first use, the builds that
//! the extents block after it uses for the first time, numbers are in their shortest form. A reader
//! refuses anything else.

use crate::error::{at_most, FormatError, Result};
use crate::page::Digest;

/// Most builds of one header.
pub const BUILDS_MAX: u64 = 65_535;
/// Most pages of a device: 16 TiB.
pub const PAGES_MAX: u64 = 1 << 32;

pub(crate) const MAGIC: &[u8; 8] = b"DIAPHDR\0";
pub(crate) const VERSION: u32 = 1;
pub(crate) const HEAD_LEN: usize = 32;
pub(crate) const BLOCK_HEAD_LEN: usize = 12;
pub(crate) const BUILDS_BLOCK: u8 = 1;
pub(crate) const EXTENTS_BLOCK: u8 = 2;
pub(crate) const END_BLOCK: u8 = 3;
pub(crate) const BUILD_LEN: usize = 41;
pub(crate) const EXTENTS_HEAD_LEN: usize = 24;
pub(crate) const END_LEN: usize = 56;
pub(crate) const BLOCK_EXTENTS: usize = 4096;
/// Largest payload of any block: a builds block with a build for each extent.
pub(crate) const PAYLOAD_MAX: usize = BLOCK_EXTENTS * BUILD_LEN;

/// Whether a build is packed or still the capture itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BuildKind {
    /// A build file, named by its id.
    Packed,
    /// A capture; its header is provisional and never leaves the host.
    Capture,
}

/// A build as headers refer to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BuildRef {
    /// Its digest, or what the capture is called.
    pub id: Digest,
    /// Pages in it.
    pub pages: u64,
    /// Packed or not.
    pub kind: BuildKind,
}

impl BuildRef {
    pub(crate) fn encode(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.id);
        to.extend_from_slice(&self.pages.to_le_bytes());
        to.push(match self.kind {
            BuildKind::Packed => 1,
            BuildKind::Capture => 2,
        });
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let pages = crate::bytes::u64_at(bytes, 32);
        at_most("count of a build's pages", pages, PAGES_MAX)?;
        let kind = match bytes[40] {
            1 => BuildKind::Packed,
            2 => BuildKind::Capture,
            found => {
                let (part, found) = ("kind of a build", found.into());
                return Err(FormatError::OutOfRange {
                    part,
                    found,
                    limit: 2,
                });
            }
        };
        Ok(Self {
            id: crate::bytes::array_at(bytes, 0),
            pages,
            kind,
        })
    }
}

/// What a whole header holds, known at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderSummary {
    /// Pages of the device.
    pub page_count: u64,
    /// Extents, merged.
    pub extent_count: u64,
    /// Pages that are not zero.
    pub mapped_pages: u64,
    /// Every build that an extent maps to, in the order of first use.
    pub builds: Vec<BuildRef>,
    /// BLAKE3-256 of everything before the end block: what the header is known by.
    pub digest: Digest,
    /// Size of the file.
    pub size_bytes: u64,
}
