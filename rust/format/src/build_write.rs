//! Writes a build as a stream of frames; the head's page count is filled in at the end.

use std::io::{Seek, SeekFrom, Write};

use crate::build::{build_head, encode_footer, FrameEntry, FOOTER_LEN, HEAD_LEN};
use crate::error::{at_most, Result};
use crate::frame::{EncodedFrame, FRAME_PAGES};
use crate::header::PAGES_MAX;
use crate::page::Digest;

/// Writes one build to `W`; until [`BuildWriter::finish`] what is there is no build.
pub struct BuildWriter<W> {
    to: W,
    offset: u64,
    page_count: u64,
    table: Vec<u8>,
    complete: bool,
}

/// What a finished build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuildSummary {
    /// BLAKE3-256 of head and table.
    pub id: Digest,
    /// Pages in it.
    pub page_count: u64,
    /// Size of the file.
    pub size_bytes: u64,
}

impl<W: Write + Seek> BuildWriter<W> {
    /// Begins a build at the start of `to`.
    ///
    /// # Errors
    /// The write failed.
    pub fn new(mut to: W) -> Result<Self> {
        to.seek(SeekFrom::Start(0))?;
        to.write_all(&[0; HEAD_LEN])?;
        Ok(Self {
            to,
            offset: HEAD_LEN as u64,
            page_count: 0,
            table: Vec::new(),
            complete: false,
        })
    }

    /// Adds a frame.
    ///
    /// # Errors
    /// Too many pages, or the write failed.
    ///
    /// # Panics
    /// When a frame follows one of fewer than 16 pages.
    pub fn push(&mut self, frame: &EncodedFrame) -> Result<()> {
        assert!(!self.complete, "only the last frame may be short");
        self.complete = frame.pages < FRAME_PAGES;
        at_most(
            "count of a build's pages",
            self.page_count + frame.pages as u64,
            PAGES_MAX,
        )?;
        self.to.write_all(&frame.bytes)?;
        let length = frame.bytes.len() as u32;
        let entry = FrameEntry {
            offset: self.offset,
            length,
            compressed: frame.compressed,
            digest: frame.digest,
        };
        self.table.extend_from_slice(&entry.encode());
        self.offset += u64::from(length);
        self.page_count += frame.pages as u64;
        Ok(())
    }

    /// Pages written so far.
    pub fn page_count(&self) -> u64 {
        self.page_count
    }

    /// Writes table, footer and head; the caller makes it durable.
    ///
    /// # Errors
    /// The write failed.
    pub fn finish(mut self) -> Result<(BuildSummary, W)> {
        let head = build_head(self.page_count);
        let id: Digest = *blake3::Hasher::new()
            .update(&head)
            .update(&self.table)
            .finalize()
            .as_bytes();
        let frames = (self.table.len() / crate::build::ENTRY_LEN) as u64;
        self.to.write_all(&self.table)?;
        self.to
            .write_all(&encode_footer(self.page_count, frames, self.offset, &id))?;
        self.to.seek(SeekFrom::Start(0))?;
        self.to.write_all(&head)?;
        self.to.flush()?;
        let size_bytes = self.offset + (self.table.len() + FOOTER_LEN) as u64;
        Ok((
            BuildSummary {
                id,
                page_count: self.page_count,
                size_bytes,
            },
            self.to,
        ))
    }
}
