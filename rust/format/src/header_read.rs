//! Reads a header as a stream: one block in memory, whatever the number of extents.
//!
//! Extents come out as they are read; only the end says that the digest is right. Whoever acts on
//! them before must be able to throw the result away.

use std::collections::HashSet;
use std::io::Read;

use crate::bytes::{array_at, u32_at, u64_at};
use crate::error::{at_most, exactly, read_part, FormatError, Result};
use crate::extent::{Extent, Target};
use crate::header::{
    BuildRef, HeaderSummary, BLOCK_EXTENTS, BLOCK_HEAD_LEN, BUILDS_BLOCK, BUILDS_MAX, BUILD_LEN,
    END_BLOCK, END_LEN, EXTENTS_BLOCK, EXTENTS_HEAD_LEN, HEAD_LEN, MAGIC, PAGES_MAX, PAYLOAD_MAX,
    VERSION,
};
use crate::page::{Digest, PAGE_SIZE};
use crate::varint;

/// Reads one header from `R`, which should not be buffered: blocks are large.
pub struct HeaderReader<R> {
    from: R,
    expected: Option<Digest>,
    hash: blake3::Hasher,
    size_bytes: u64,
    page_count: u64,
    builds: Vec<BuildRef>,
    /// Pages of each build, close together.
    limits: Vec<u64>,
    ids: HashSet<Digest>,
    /// Builds that an extent mapped to; the others must follow in this order, in the next block.
    used: u32,
    /// For each build, where its last extent in this block ended.
    continues: Vec<u64>,
    payload: Vec<u8>,
    columns: Columns,
    block: Vec<Extent>,
    at: usize,
    next_page: u64,
    /// The last extent of the block before.
    last: Option<Extent>,
    short_block: bool,
    extent_count: u64,
    mapped_pages: u64,
    digest: Option<Digest>,
}

const CONTINUES: &str = "adjacent extents continue each other";

#[cold]
fn not_canonical(what: &'static str) -> FormatError {
    FormatError::NotCanonical { what }
}

/// The decoded columns of an extents block.
#[derive(Default)]
struct Columns {
    lengths: Vec<u64>,
    builds: Vec<u64>,
    deltas: Vec<u64>,
}

impl Columns {
    fn decode(&mut self, payload: &[u8], count: usize) -> Result<()> {
        let sizes = [12, 16, 20].map(|at| u32_at(payload, at) as usize);
        let body = &payload[EXTENTS_HEAD_LEN..];
        let total = sizes.iter().map(|size| *size as u64).sum();
        exactly("length of the columns", total, body.len() as u64)?;
        let (lengths, rest) = body.split_at(sizes[0]);
        let (builds, deltas) = rest.split_at(sizes[1]);
        varint::take_column(lengths, count, &mut self.lengths, "length of an extent")?;
        varint::take_column(builds, count, &mut self.builds, "number of a build")?;
        let mapped = self.builds.iter().filter(|number| **number != 0).count();
        varint::take_column(deltas, mapped, &mut self.deltas, "position in a build")
    }
}

impl<R: Read> HeaderReader<R> {
    /// Begins to read; `expected` is the digest that the header is known by.
    ///
    /// # Errors
    /// Bad magic, unknown version, bad checksum, truncated, out of range.
    pub fn new(mut from: R, expected: Option<Digest>) -> Result<Self> {
        const PART: &str = "header's head";
        let mut head = [0; HEAD_LEN];
        read_part(&mut from, &mut head, PART)?;
        if &head[..8] != MAGIC {
            return Err(FormatError::BadMagic { part: PART });
        }
        if u32_at(&head, 8) != VERSION {
            return Err(FormatError::UnknownVersion {
                part: PART,
                found: u32_at(&head, 8),
            });
        }
        if crc32fast::hash(&head[..HEAD_LEN - 4]) != u32_at(&head, HEAD_LEN - 4) {
            return Err(FormatError::BadChecksum { part: PART });
        }
        exactly("page size", u32_at(&head, 12).into(), PAGE_SIZE as u64)?;
        exactly("reserved field of the head", u32_at(&head, 24).into(), 0)?;
        let page_count = u64_at(&head, 16);
        at_most("count of device pages", page_count, PAGES_MAX)?;
        let mut hash = blake3::Hasher::new();
        hash.update(&head);
        Ok(Self {
            from,
            expected,
            hash,
            size_bytes: HEAD_LEN as u64,
            page_count,
            builds: Vec::new(),
            limits: Vec::new(),
            ids: HashSet::new(),
            used: 0,
            continues: vec![0],
            payload: Vec::new(),
            columns: Columns::default(),
            block: Vec::with_capacity(BLOCK_EXTENTS),
            at: 0,
            next_page: 0,
            last: None,
            short_block: false,
            extent_count: 0,
            mapped_pages: 0,
            digest: None,
        })
    }

    /// Pages of the device.
    pub fn page_count(&self) -> u64 {
        self.page_count
    }

    /// The builds read so far: all that extents read so far map to. Build number n is at n - 1.
    pub fn builds(&self) -> &[BuildRef] {
        &self.builds
    }

    /// The build of a target of this header that is not zero.
    pub fn build(&self, number: u32) -> &BuildRef {
        &self.builds[number as usize - 1]
    }

    /// The next extent; None once the end was read and everything verified.
    ///
    /// # Errors
    /// Any [`FormatError`].
    #[inline]
    pub fn next_extent(&mut self) -> Result<Option<Extent>> {
        if self.at == self.block.len() && !self.next_block()? {
            return Ok(None);
        }
        self.at += 1;
        Ok(Some(self.block[self.at - 1]))
    }

    /// The extents of one block that were not read yet; none once everything was verified.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn next_extents(&mut self) -> Result<&[Extent]> {
        if self.at == self.block.len() {
            self.next_block()?;
        }
        let from = std::mem::replace(&mut self.at, self.block.len());
        Ok(&self.block[from..])
    }

    /// Reads all that is left and returns the totals.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn finish(mut self) -> Result<HeaderSummary> {
        while self.next_block()? {}
        Ok(HeaderSummary {
            page_count: self.page_count,
            extent_count: self.extent_count,
            mapped_pages: self.mapped_pages,
            builds: self.builds,
            digest: self.digest.unwrap_or_default(),
            size_bytes: self.size_bytes,
        })
    }

    /// Fills `block` with the next extents; false at the verified end.
    fn next_block(&mut self) -> Result<bool> {
        if self.digest.is_some() {
            return Ok(false);
        }
        self.at = 0;
        self.block.clear();
        let mut kind = self.read_block()?;
        if kind == BUILDS_BLOCK {
            self.decode_builds()?;
            kind = self.read_block()?;
            exactly(
                "type of the block after the builds",
                kind.into(),
                EXTENTS_BLOCK.into(),
            )?;
        }
        match kind {
            EXTENTS_BLOCK => self.decode_extents().map(|()| true),
            END_BLOCK => self.decode_end().map(|()| false),
            _ => Err(FormatError::OutOfRange {
                part: "type of a block",
                found: kind.into(),
                limit: END_BLOCK.into(),
            }),
        }
    }

    /// Reads a block into `payload` and returns its type; all but the end go into the digest.
    fn read_block(&mut self) -> Result<u8> {
        const PART: &str = "header's block";
        let mut head = [0; BLOCK_HEAD_LEN];
        read_part(&mut self.from, &mut head, PART)?;
        let length = u32_at(&head, 4) as usize;
        at_most("length of a block", length as u64, PAYLOAD_MAX as u64)?;
        self.payload.resize(length, 0);
        read_part(&mut self.from, &mut self.payload, PART)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&head[..8]);
        crc.update(&self.payload);
        if crc.finalize() != u32_at(&head, 8) {
            return Err(FormatError::BadChecksum { part: PART });
        }
        exactly(
            "reserved bytes of a block",
            u64::from(u32_at(&head, 0) >> 8),
            0,
        )?;
        self.size_bytes += (BLOCK_HEAD_LEN + length) as u64;
        if head[0] != END_BLOCK {
            self.hash.update(&head);
            self.hash.update(&self.payload);
        }
        Ok(head[0])
    }

    fn decode_builds(&mut self) -> Result<()> {
        if self.payload.is_empty() || self.payload.len() % BUILD_LEN != 0 {
            return Err(FormatError::NotCanonical {
                what: "a builds block is not a list of builds",
            });
        }
        let total = self.builds.len() + self.payload.len() / BUILD_LEN;
        at_most("count of builds", total as u64, BUILDS_MAX)?;
        for bytes in self.payload.chunks_exact(BUILD_LEN) {
            let build = BuildRef::decode(bytes)?;
            if !self.ids.insert(build.id) {
                return Err(FormatError::NotCanonical {
                    what: "a build is listed twice",
                });
            }
            self.limits.push(build.pages);
            self.builds.push(build);
        }
        Ok(())
    }

    fn decode_extents(&mut self) -> Result<()> {
        let count = self.begin_extents()?;
        let mut columns = std::mem::take(&mut self.columns);
        columns.decode(&self.payload, count)?;
        let mut deltas = columns.deltas.iter();
        let mut before = None;
        for (length, number) in columns.lengths.iter().zip(&columns.builds) {
            let extent = match number {
                0 => self.decode_zeros(*length, before)?,
                _ => {
                    let delta = deltas.next().copied().unwrap_or_default();
                    self.decode_mapped(*length, *number, delta, before)?
                }
            };
            before = Some(*number);
            self.block.push(extent);
        }
        self.columns = columns;
        self.end_extents()
    }

    /// Checks the head of an extents block and returns how many it has.
    fn begin_extents(&mut self) -> Result<usize> {
        let payload = &self.payload[..];
        if payload.len() < EXTENTS_HEAD_LEN {
            return Err(FormatError::Truncated {
                part: "extents block",
            });
        }
        let count = u32_at(payload, 8) as usize;
        at_most(
            "count of extents in a block",
            count as u64,
            BLOCK_EXTENTS as u64,
        )?;
        if count == 0 || self.short_block {
            return Err(not_canonical(
                "an extents block before the last is not full",
            ));
        }
        self.short_block = count < BLOCK_EXTENTS;
        self.continues.clear();
        self.continues.resize(self.builds.len() + 1, 0);
        exactly(
            "first page of an extents block",
            u64_at(payload, 0),
            self.next_page,
        )?;
        Ok(count)
    }

    /// Checks a decoded block as a whole.
    fn end_extents(&mut self) -> Result<()> {
        exactly(
            "count of builds in use",
            self.used.into(),
            self.builds.len() as u64,
        )?;
        // Inside the block each extent was compared with the one before it.
        let joint = self.last.zip(self.block.first());
        if joint.is_some_and(|(last, first)| last.continues_in(first)) {
            return Err(not_canonical(CONTINUES));
        }
        self.last = self.block.last().copied();
        self.extent_count += self.block.len() as u64;
        Ok(())
    }

    /// Checks the length of the next extent and returns its first page.
    #[inline(always)]
    fn advance(&mut self, length: u64) -> Result<u64> {
        let page = self.next_page;
        if length == 0 {
            return Err(not_canonical("an extent has no pages"));
        }
        at_most("length of an extent", length, self.page_count - page)?;
        self.next_page = page + length;
        Ok(page)
    }

    #[inline(always)]
    fn decode_zeros(&mut self, length: u64, before: Option<u64>) -> Result<Extent> {
        if before == Some(0) {
            return Err(not_canonical(CONTINUES));
        }
        Ok(Extent {
            page: self.advance(length)?,
            length,
            target: Target::ZERO,
        })
    }

    #[inline(always)]
    fn decode_mapped(
        &mut self,
        length: u64,
        number: u64,
        delta: u64,
        before: Option<u64>,
    ) -> Result<Extent> {
        let page = self.advance(length)?;
        if number > self.used.into() {
            // Numbers in the order of first use: a new one is the next one.
            let next = (u64::from(self.used) + 1).min(self.builds.len() as u64);
            at_most("number of a build", number, next)?;
            self.used = number as u32;
        }
        if delta == 0 && before == Some(number) {
            return Err(not_canonical(CONTINUES));
        }
        let (build, pages) = (number as usize, self.limits[number as usize - 1]);
        let position = self.continues[build].wrapping_add_signed(varint::unzigzag(delta));
        if position >= pages || length > pages - position {
            let part = "position in a build";
            return Err(FormatError::OutOfRange {
                part,
                found: position,
                limit: pages,
            });
        }
        self.continues[build] = position + length;
        self.mapped_pages += length;
        Ok(Extent {
            page,
            length,
            target: Target {
                build: number as u32,
                position,
            },
        })
    }

    fn decode_end(&mut self) -> Result<()> {
        exactly(
            "length of the end",
            self.payload.len() as u64,
            END_LEN as u64,
        )?;
        exactly("count of mapped pages", self.next_page, self.page_count)?;
        exactly(
            "total of extents",
            u64_at(&self.payload, 0),
            self.extent_count,
        )?;
        exactly(
            "total of mapped pages",
            u64_at(&self.payload, 8),
            self.mapped_pages,
        )?;
        exactly(
            "total of builds",
            u64_at(&self.payload, 16),
            self.builds.len() as u64,
        )?;
        let digest: Digest = *self.hash.finalize().as_bytes();
        if array_at::<32>(&self.payload, 24) != digest {
            return Err(FormatError::BadDigest { part: "header" });
        }
        if self.expected.is_some_and(|expected| expected != digest) {
            return Err(FormatError::BadDigest {
                part: "header (it is a whole header, but another)",
            });
        }
        if self.from.read(&mut [0])? != 0 {
            return Err(FormatError::NotCanonical {
                what: "bytes follow the end of the header",
            });
        }
        self.digest = Some(digest);
        Ok(())
    }
}
