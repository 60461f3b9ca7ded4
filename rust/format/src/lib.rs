//! The formats: pages, extents, headers, builds and capture files.
//!
//! Memory and disks are the same thing, a **device**: a linear space of 4 KiB pages. A **build**
//! holds the pages that one capture added; a **header** maps every page of a device to (build,
//! position) or to zero; a **capture file** holds dirty pages as they were taken. `docs/formats/`
//! has the byte diagrams.
//!
//! Nothing here opens a file: everything is generic over `Read`, `Write` and `Seek`, checks sizes
//! before it allocates, and reports each way in which bytes can be wrong as its own
//! [`FormatError`].
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod build;
mod build_write;
mod bytes;
pub mod capture_file;
mod compose;
mod error;
mod extent;
mod frame;
mod header;
mod header_read;
mod header_write;
mod index;
mod page;
mod varint;

pub use build::{build_head, BuildTable, FrameEntry, FOOTER_LEN, HEAD_LEN};
pub use build_write::{BuildSummary, BuildWriter};
pub use capture_file::{CaptureHead, CaptureLayout, CAPTURE_HEAD_LEN, SUM_LEN};
pub use compose::{overwrite, Differ, Difference, Side, NEW_BUILD};
pub use error::{FormatError, Result};
pub use extent::{Extent, Merge, Target};
pub use frame::{Decoder, EncodedFrame, Encoder, FRAME_BYTES, FRAME_PAGES};
pub use header::{BuildKind, BuildRef, HeaderSummary, BUILDS_MAX, PAGES_MAX};
pub use header_read::HeaderReader;
pub use header_write::{HeaderWriter, FULL_HEADER};
pub use index::HeaderIndex;
pub use page::{digest, digest16, hex, is_zero, parse_hex32, Digest, PAGE_SIZE};
