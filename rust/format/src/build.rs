//! The build format, and its frame table.
//!
//! ```text
//! 0     head, 32 bytes:  0 magic "DIAPBLD\0"  8 version u32 = 1  12 frame pages u32 = 16
//!                       16 page count u64    24 zero u64
//! 32    frames, one after the other: zstd, or the pages as they are
//! T     frame table, 32 bytes each:  0 offset u64  8 length u32  12 flags u32 (1: zstd)
//!                                   16 first half of the BLAKE3 of the stored bytes
//! end   footer, 64 bytes:  0 page count u64  8 frame count u64  16 table offset T u64
//!                         24 BLAKE3-256 of head and table   56 magic "DIAPBLDF"
//! ```
//!
//! **The build id is the BLAKE3-256 of head and table**: the id verifies the table and the table
//! each frame, so any part is verified up to the header that names the build. All frames but the
//! last have 16 pages.

use std::io::{Read, Seek, SeekFrom};

use crate::bytes::{array_at, put, put_u32, put_u64, u32_at, u64_at};
use crate::error::{at_most, exactly, read_part, FormatError, Result};
use crate::frame::{FRAME_BYTES, FRAME_PAGES};
use crate::header::PAGES_MAX;
use crate::page::{Digest, PAGE_SIZE};

/// Bytes of a build's head.
pub const HEAD_LEN: usize = 32;
/// Bytes of a build's footer.
pub const FOOTER_LEN: usize = 64;

pub(crate) const ENTRY_LEN: usize = 32;
const MAGIC: &[u8; 8] = b"DIAPBLD\0";
const FOOTER_MAGIC: &[u8; 8] = b"DIAPBLDF";
const VERSION: u32 = 1;
const COMPRESSED: u32 = 1;

/// Where a frame lies and what its bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameEntry {
    /// Where its stored bytes begin.
    pub offset: u64,
    /// How many there are.
    pub length: u32,
    /// Whether they are zstd's.
    pub compressed: bool,
    /// The first 16 bytes of their BLAKE3.
    pub digest: [u8; 16],
}

impl FrameEntry {
    pub(crate) fn encode(&self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        put_u64(&mut bytes, 0, self.offset);
        put_u32(&mut bytes, 8, self.length);
        put_u32(&mut bytes, 12, if self.compressed { COMPRESSED } else { 0 });
        put(&mut bytes, 16, &self.digest);
        bytes
    }

    /// Reads an entry whose frame begins at `offset` and has `raw_bytes` of pages.
    fn decode(bytes: &[u8], offset: u64, raw_bytes: usize) -> Result<Self> {
        exactly("offset of a frame", u64_at(bytes, 0), offset)?;
        let (length, flags) = (u32_at(bytes, 8), u32_at(bytes, 12));
        at_most("flags of a frame", flags.into(), COMPRESSED.into())?;
        let compressed = flags & COMPRESSED != 0;
        if compressed {
            at_most(
                "length of a frame",
                length.into(),
                (raw_bytes - raw_bytes / 8) as u64,
            )?;
        } else {
            exactly("length of a frame", length.into(), raw_bytes as u64)?;
        }
        Ok(Self {
            offset,
            length,
            compressed,
            digest: array_at(bytes, 16),
        })
    }
}

/// The head of a build of so many pages: it follows from them.
pub fn build_head(page_count: u64) -> [u8; HEAD_LEN] {
    let mut head = [0; HEAD_LEN];
    put(&mut head, 0, MAGIC);
    put_u32(&mut head, 8, VERSION);
    put_u32(&mut head, 12, FRAME_PAGES as u32);
    put_u64(&mut head, 16, page_count);
    head
}

/// The footer of a build.
pub(crate) fn encode_footer(
    page_count: u64,
    frames: u64,
    table_offset: u64,
    id: &Digest,
) -> [u8; FOOTER_LEN] {
    let mut footer = [0; FOOTER_LEN];
    put_u64(&mut footer, 0, page_count);
    put_u64(&mut footer, 8, frames);
    put_u64(&mut footer, 16, table_offset);
    put(&mut footer, 24, id);
    put(&mut footer, 56, FOOTER_MAGIC);
    footer
}

/// The verified frame table of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildTable {
    id: Digest,
    page_count: u64,
    frames: Vec<FrameEntry>,
}

/// What the footer says, checked against the file's size.
struct Footer {
    page_count: u64,
    frame_count: u64,
    table_offset: u64,
    id: Digest,
}

impl BuildTable {
    /// Reads and verifies head, footer and table of the build `expected` in a file of `file_bytes`.
    ///
    /// # Errors
    /// Bad magic, unknown version, truncated, out of range, bad table digest.
    pub fn read(from: &mut (impl Read + Seek), file_bytes: u64, expected: &Digest) -> Result<Self> {
        Self::read_checked(from, file_bytes, expected, |_| Ok(()))
    }

    /// The same of a build that has `page_count` pages, as a header says; nothing is allocated for
    /// a table of another size, whatever the size of the file is said to be.
    ///
    /// # Errors
    /// As [`BuildTable::read`].
    pub fn read_of(
        from: &mut (impl Read + Seek),
        file_bytes: u64,
        expected: &Digest,
        page_count: u64,
    ) -> Result<Self> {
        Self::read_checked(from, file_bytes, expected, |footer| {
            let frame_count = page_count.div_ceil(FRAME_PAGES as u64);
            exactly("count of a build's pages", footer.page_count, page_count)?;
            exactly("count of frames", footer.frame_count, frame_count)
        })
    }

    fn read_checked(
        from: &mut (impl Read + Seek),
        file_bytes: u64,
        expected: &Digest,
        check: impl FnOnce(&Footer) -> Result<()>,
    ) -> Result<Self> {
        let head = read_head(from)?;
        let page_count = u64_at(&head, 16);
        at_most("count of a build's pages", page_count, PAGES_MAX)?;
        let footer = read_footer(from, file_bytes)?;
        check(&footer)?;
        // The footer's counts are bounded by the file's size: this allocates no more than is there.
        let mut table = vec![0; footer.frame_count as usize * ENTRY_LEN];
        from.seek(SeekFrom::Start(footer.table_offset))?;
        read_part(from, &mut table, "frame table")?;
        let id: Digest = *blake3::Hasher::new()
            .update(&head)
            .update(&table)
            .finalize()
            .as_bytes();
        if id != footer.id || id != *expected {
            return Err(FormatError::BadDigest {
                part: "frame table",
            });
        }
        exactly(
            "count of pages in the footer",
            footer.page_count,
            page_count,
        )?;
        exactly(
            "count of frames",
            footer.frame_count,
            page_count.div_ceil(FRAME_PAGES as u64),
        )?;
        let frames = decode_table(&table, page_count, footer.table_offset)?;
        Ok(Self {
            id,
            page_count,
            frames,
        })
    }

    /// The build's id.
    pub fn id(&self) -> &Digest {
        &self.id
    }

    /// Pages in the build.
    pub fn page_count(&self) -> u64 {
        self.page_count
    }

    /// Frames in the build.
    pub fn frame_count(&self) -> u64 {
        self.frames.len() as u64
    }

    /// Where frame `number` lies.
    pub fn frame(&self, number: u64) -> &FrameEntry {
        &self.frames[number as usize]
    }

    /// Bytes that the pages of frame `number` have.
    pub fn frame_bytes(&self, number: u64) -> usize {
        frame_bytes(self.page_count, number)
    }
}

fn frame_bytes(page_count: u64, number: u64) -> usize {
    let left = page_count - number * FRAME_PAGES as u64;
    (left as usize * PAGE_SIZE).min(FRAME_BYTES)
}

fn read_head(from: &mut (impl Read + Seek)) -> Result<[u8; HEAD_LEN]> {
    const PART: &str = "build's head";
    let mut head = [0; HEAD_LEN];
    from.seek(SeekFrom::Start(0))?;
    read_part(from, &mut head, PART)?;
    if &head[..8] != MAGIC {
        return Err(FormatError::BadMagic { part: PART });
    }
    if u32_at(&head, 8) != VERSION {
        return Err(FormatError::UnknownVersion {
            part: PART,
            found: u32_at(&head, 8),
        });
    }
    exactly(
        "pages of a frame",
        u32_at(&head, 12).into(),
        FRAME_PAGES as u64,
    )?;
    exactly("reserved field of the build's head", u64_at(&head, 24), 0)?;
    Ok(head)
}

fn read_footer(from: &mut (impl Read + Seek), file_bytes: u64) -> Result<Footer> {
    const PART: &str = "build's footer";
    let footer_at = file_bytes
        .checked_sub(FOOTER_LEN as u64)
        .filter(|at| *at >= HEAD_LEN as u64);
    let footer_at = footer_at.ok_or(FormatError::Truncated { part: PART })?;
    let mut bytes = [0; FOOTER_LEN];
    from.seek(SeekFrom::Start(footer_at))?;
    read_part(from, &mut bytes, PART)?;
    if &bytes[56..] != FOOTER_MAGIC {
        return Err(FormatError::BadMagic { part: PART });
    }
    let (frame_count, table_offset) = (u64_at(&bytes, 8), u64_at(&bytes, 16));
    at_most("count of frames", frame_count, footer_at / ENTRY_LEN as u64)?;
    exactly(
        "offset of the frame table",
        table_offset,
        footer_at - frame_count * ENTRY_LEN as u64,
    )?;
    Ok(Footer {
        page_count: u64_at(&bytes, 0),
        frame_count,
        table_offset,
        id: array_at(&bytes, 24),
    })
}

fn decode_table(table: &[u8], page_count: u64, table_offset: u64) -> Result<Vec<FrameEntry>> {
    let mut frames = Vec::with_capacity(table.len() / ENTRY_LEN);
    let mut offset = HEAD_LEN as u64;
    for (number, bytes) in table.chunks_exact(ENTRY_LEN).enumerate() {
        let entry = FrameEntry::decode(bytes, offset, frame_bytes(page_count, number as u64))?;
        offset += u64::from(entry.length);
        frames.push(entry);
    }
    exactly("end of the frames", offset, table_offset)?;
    Ok(frames)
}
