//! Writes a header as a stream: 4096 extents in memory, whatever the number.
//!
//! The caller numbers builds as it likes; the writer renumbers them in the order of first use, so
//! that one mapping has one encoding.

use std::collections::HashMap;
use std::io::Write;

use crate::bytes::{put, put_u32, put_u64};
use crate::error::{at_most, exactly, Result};
use crate::extent::{Extent, Merge};
use crate::header::{
    BuildRef, HeaderSummary, BLOCK_EXTENTS, BLOCK_HEAD_LEN, BUILDS_BLOCK, BUILDS_MAX, END_BLOCK,
    EXTENTS_BLOCK, HEAD_LEN, MAGIC, PAGES_MAX, PAYLOAD_MAX, VERSION,
};
use crate::page::{Digest, PAGE_SIZE};
use crate::varint;

/// The part that [`crate::FormatError::OutOfRange`] names when a new header would need more builds
/// than one may have.
pub const FULL_HEADER: &str = "count of builds of the new header";

/// Writes one header to `W`, which should not be buffered: blocks are large.
pub struct HeaderWriter<W> {
    to: W,
    hash: blake3::Hasher,
    size_bytes: u64,
    page_count: u64,
    next_page: u64,
    merge: Merge,
    numbers: Numbers,
    block: Block,
    extent_count: u64,
    mapped_pages: u64,
}

/// The caller's numbers of builds, and ours.
#[derive(Default)]
struct Numbers {
    builds: Vec<BuildRef>,
    ours: Vec<u32>,
    by_id: HashMap<Digest, u32>,
    /// Builds that a block before the present one introduced.
    written: usize,
}

impl Numbers {
    #[inline]
    fn ours(&mut self, theirs: u32, describe: impl FnOnce() -> BuildRef) -> Result<u32> {
        match self.ours.get(theirs as usize) {
            Some(&number) if number != 0 => Ok(number),
            _ => self.learn(theirs, describe()),
        }
    }

    fn learn(&mut self, theirs: u32, build: BuildRef) -> Result<u32> {
        at_most("number of a build", theirs.into(), BUILDS_MAX + 1)?;
        let number = match self.by_id.get(&build.id) {
            Some(&known) => known,
            None => {
                at_most(FULL_HEADER, self.builds.len() as u64 + 1, BUILDS_MAX)?;
                self.builds.push(build);
                self.builds.len() as u32
            }
        };
        assert_eq!(self.builds[number as usize - 1], build, "one id, one build");
        self.by_id.insert(build.id, number);
        if self.ours.len() <= theirs as usize {
            self.ours.resize(theirs as usize + 1, 0);
        }
        self.ours[theirs as usize] = number;
        Ok(number)
    }
}

/// The extents block being filled.
#[derive(Default)]
struct Block {
    first_page: u64,
    count: usize,
    lengths: Vec<u8>,
    builds: Vec<u8>,
    deltas: Vec<u8>,
    /// For each build, where its last extent in this block ended.
    continues: Vec<u64>,
}

impl Block {
    #[inline]
    fn add(&mut self, extent: &Extent) {
        if self.count == 0 {
            self.first_page = extent.page;
        }
        self.count += 1;
        varint::put(&mut self.lengths, extent.length);
        varint::put(&mut self.builds, extent.target.build.into());
        if extent.target.is_zero() {
            return;
        }
        let build = extent.target.build as usize;
        if self.continues.len() <= build {
            self.continues.resize(build + 1, 0);
        }
        let delta = extent.target.position as i64 - self.continues[build] as i64;
        varint::put(&mut self.deltas, varint::zigzag(delta));
        self.continues[build] = extent.target.position + extent.length;
    }

    /// The payload; leaves an empty block.
    fn take(&mut self) -> Vec<u8> {
        let columns = [&self.lengths, &self.builds, &self.deltas];
        let mut payload = Vec::with_capacity(24 + columns.iter().map(|c| c.len()).sum::<usize>());
        payload.extend_from_slice(&self.first_page.to_le_bytes());
        payload.extend_from_slice(&(self.count as u32).to_le_bytes());
        for column in columns {
            payload.extend_from_slice(&(column.len() as u32).to_le_bytes());
        }
        for column in columns {
            payload.extend_from_slice(column);
        }
        self.count = 0;
        self.lengths.clear();
        self.builds.clear();
        self.deltas.clear();
        self.continues.fill(0);
        payload
    }
}

impl<W: Write> HeaderWriter<W> {
    /// Begins the header of a device of `page_count` pages (at most 2^32).
    ///
    /// # Errors
    /// Too many pages, or the write failed.
    pub fn new(mut to: W, page_count: u64) -> Result<Self> {
        at_most("count of device pages", page_count, PAGES_MAX)?;
        let mut head = [0; HEAD_LEN];
        put(&mut head, 0, MAGIC);
        put_u32(&mut head, 8, VERSION);
        put_u32(&mut head, 12, PAGE_SIZE as u32);
        put_u64(&mut head, 16, page_count);
        let crc = crc32fast::hash(&head[..HEAD_LEN - 4]);
        put_u32(&mut head, HEAD_LEN - 4, crc);
        to.write_all(&head)?;
        let mut hash = blake3::Hasher::new();
        hash.update(&head);
        Ok(Self {
            to,
            hash,
            size_bytes: HEAD_LEN as u64,
            page_count,
            next_page: 0,
            merge: Merge::default(),
            numbers: Numbers::default(),
            block: Block::default(),
            extent_count: 0,
            mapped_pages: 0,
        })
    }

    /// Adds the extent that follows the last one; `describe` is asked once for each build number.
    ///
    /// # Errors
    /// A gap, an overlap, an extent beyond the device or its build, too many builds, or the write
    /// failed.
    #[inline]
    pub fn push(&mut self, extent: Extent, describe: impl FnOnce(u32) -> BuildRef) -> Result<()> {
        exactly("start of an extent", extent.page, self.next_page)?;
        at_most(
            "length of an extent",
            extent.length,
            self.page_count - self.next_page,
        )?;
        assert!(extent.length > 0, "an extent has pages");
        self.next_page = extent.end();
        let mut extent = extent;
        if !extent.target.is_zero() {
            let theirs = extent.target.build;
            extent.target.build = self.numbers.ours(theirs, || describe(theirs))?;
            let build = &self.numbers.builds[extent.target.build as usize - 1];
            at_most(
                "position in a build",
                extent.target.position + extent.length,
                build.pages,
            )?;
            self.mapped_pages += extent.length;
        }
        match self.merge.push(extent) {
            Some(whole) => self.add(&whole),
            None => Ok(()),
        }
    }

    #[inline]
    fn add(&mut self, extent: &Extent) -> Result<()> {
        self.block.add(extent);
        self.extent_count += 1;
        if self.block.count == BLOCK_EXTENTS {
            return self.flush();
        }
        Ok(())
    }

    /// Writes the builds that are new in the present block, and the block.
    fn flush(&mut self) -> Result<()> {
        let new = &self.numbers.builds[self.numbers.written..self.introduced()];
        if !new.is_empty() {
            let mut payload = Vec::new();
            new.iter().for_each(|build| build.encode(&mut payload));
            self.numbers.written += new.len();
            self.write_block(BUILDS_BLOCK, &payload)?;
        }
        let payload = self.block.take();
        self.write_block(EXTENTS_BLOCK, &payload)
    }

    /// Builds known once the present block is written. The extent that is still open may have
    /// brought one more: it belongs to the next block.
    fn introduced(&self) -> usize {
        self.numbers
            .written
            .max(self.block.continues.len().saturating_sub(1))
    }

    fn write_block(&mut self, kind: u8, payload: &[u8]) -> Result<()> {
        debug_assert!(payload.len() <= PAYLOAD_MAX);
        let head = block_head(kind, payload);
        for bytes in [&head[..], payload] {
            self.hash.update(bytes);
            self.to.write_all(bytes)?;
            self.size_bytes += bytes.len() as u64;
        }
        Ok(())
    }

    /// Writes the end; the extents have to cover the device.
    ///
    /// # Errors
    /// Pages are missing, or the write failed.
    pub fn finish(mut self) -> Result<(HeaderSummary, W)> {
        exactly("count of mapped pages", self.next_page, self.page_count)?;
        if let Some(last) = self.merge.finish() {
            self.add(&last)?;
        }
        if self.block.count > 0 {
            self.flush()?;
        }
        let digest: Digest = *self.hash.finalize().as_bytes();
        let mut payload = Vec::new();
        for total in [
            self.extent_count,
            self.mapped_pages,
            self.numbers.builds.len() as u64,
        ] {
            payload.extend_from_slice(&total.to_le_bytes());
        }
        payload.extend_from_slice(&digest);
        self.write_block(END_BLOCK, &payload)?;
        self.to.flush()?;
        let summary = HeaderSummary {
            page_count: self.page_count,
            extent_count: self.extent_count,
            mapped_pages: self.mapped_pages,
            builds: self.numbers.builds,
            digest,
            size_bytes: self.size_bytes,
        };
        Ok((summary, self.to))
    }
}

/// The head of a block, with the checksum over itself and the payload.
pub(crate) fn block_head(kind: u8, payload: &[u8]) -> [u8; BLOCK_HEAD_LEN] {
    let mut head = [0; BLOCK_HEAD_LEN];
    head[0] = kind;
    put_u32(&mut head, 4, payload.len() as u32);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&head[..8]);
    crc.update(payload);
    put_u32(&mut head, 8, crc.finalize());
    head
}
