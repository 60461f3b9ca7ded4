//! Digests of a flat file from what it was made of, so that they say what it has to hold and not
//! what it holds.
//!
//! The device is put together in memory, a window of chunks at a time, through its header: every
//! frame is verified on its way. With the digests of a relative only the chunks that the two
//! headers map differently are; the others have the digests that they had.

use std::path::Path;
use std::sync::Mutex;

use diapause_format::{BuildRef, Differ, Digest, Extent, Side, PAGE_SIZE};

use crate::builds::Builds;
use crate::error::{Error, Result};
use crate::fetch::{Captures, Fetcher, Piece};
use crate::headers::HeaderFile;
use crate::pack::Progress;
use crate::sums::{digest_chunk, digest_pages, FlatSums, CHUNK_BYTES, CHUNK_PAGES};
use crate::threads::for_each_part;

/// Chunks that are put together at once: 32 MiB.
const WINDOW_CHUNKS: u64 = 8;
const WINDOW_PAGES: u64 = WINDOW_CHUNKS * CHUNK_PAGES;

/// A device whose digests are known.
#[derive(Debug, Clone, Copy)]
pub struct SummedBase<'a> {
    /// The header that says what it holds.
    pub header: HeaderFile<'a>,
    /// Its digests.
    pub sums: &'a FlatSums,
}

/// The digests of the device that `header` maps to packed builds.
///
/// # Errors
/// Missing, damaged, storage, stopped; invalid where the base is of another size.
pub fn sum_device(
    header: HeaderFile<'_>,
    builds: &Path,
    base: Option<SummedBase<'_>>,
    threads: usize,
    progress: Progress<'_>,
) -> Result<FlatSums> {
    let mut reader = header.open()?;
    let page_count = reader.page_count();
    let (mut chunks, wanted) = match base {
        Some(base) => (
            base.sums.chunks().to_vec(),
            changed_chunks(header, base, page_count)?,
        ),
        None => {
            let count = page_count.div_ceil(CHUNK_PAGES) as usize;
            (vec![digest_chunk(&[], &[]); count], vec![true; count])
        }
    };
    let empty = digest_chunk(&[], &[]);
    for (chunk, _) in chunks
        .iter_mut()
        .zip(&wanted)
        .filter(|(_, wanted)| **wanted)
    {
        *chunk = empty; // until a page of it is found that is not zero
    }
    let mut window = Window::new(Fetcher::new(Builds::new(builds), Captures::new(), threads));
    let mut told = 0;
    while let Some(extent) = reader.next_extent().map_err(|error| header.error(error))? {
        if extent.page >= told + WINDOW_PAGES {
            told = extent.page;
            if !progress(told, page_count) {
                return Err(Error::Stopped);
            }
        }
        window.add(extent, &wanted, &mut chunks, reader.builds())?;
    }
    window.flush(&mut chunks, reader.builds())?;
    Ok(FlatSums::new(page_count, chunks))
}

/// Which chunks two headers map differently.
fn changed_chunks(
    header: HeaderFile<'_>,
    base: SummedBase<'_>,
    page_count: u64,
) -> Result<Vec<bool>> {
    let old = base.header.open()?;
    if base.sums.page_count() != page_count || old.page_count() != page_count {
        return Err(Error::Invalid(
            "the base is of another size than the device".to_owned(),
        ));
    }
    let mut changed = vec![false; page_count.div_ceil(CHUNK_PAGES) as usize];
    let mut differ = Differ::new(old, header.open()?);
    let damaged = |side| match side {
        Side::Old(error) => base.header.error(error),
        Side::New(error) => header.error(error),
    };
    while let Some(run) = differ.next_difference().map_err(damaged)? {
        let (first, last) = (run.page, run.page + run.length - 1);
        changed[(first / CHUNK_PAGES) as usize..=(last / CHUNK_PAGES) as usize].fill(true);
    }
    Ok(changed)
}

/// A part of the device that is being put together.
struct Window {
    fetcher: Fetcher,
    first_page: u64,
    pages: Vec<u8>,
    pieces: Vec<Piece>,
    touched: [bool; WINDOW_CHUNKS as usize],
}

impl Window {
    fn new(fetcher: Fetcher) -> Self {
        Self {
            fetcher,
            first_page: 0,
            pages: Vec::new(),
            pieces: Vec::new(),
            touched: [false; WINDOW_CHUNKS as usize],
        }
    }

    /// Adds what an extent has of wanted chunks; windows that end before it are digested.
    fn add(
        &mut self,
        extent: Extent,
        wanted: &[bool],
        chunks: &mut [Digest],
        builds: &[BuildRef],
    ) -> Result<()> {
        let mut rest = (!extent.target.is_zero()).then_some(extent);
        while let Some(extent) = rest {
            let chunk = extent.page / CHUNK_PAGES;
            let end = extent.end().min((chunk + 1) * CHUNK_PAGES);
            if wanted[chunk as usize] {
                if extent.page >= self.first_page + WINDOW_PAGES {
                    self.flush(chunks, builds)?;
                    self.first_page = extent.page / WINDOW_PAGES * WINDOW_PAGES;
                }
                self.touched[(chunk % WINDOW_CHUNKS) as usize] = true;
                self.pieces.push(Piece {
                    build: extent.target.build,
                    position: extent.target.position,
                    to: extent.page - self.first_page,
                    pages: end - extent.page,
                });
            }
            rest = extent.trimmed_to(end);
        }
        Ok(())
    }

    /// Fetches what was added, and digests the chunks of it.
    fn flush(&mut self, chunks: &mut [Digest], builds: &[BuildRef]) -> Result<()> {
        if self.pieces.is_empty() {
            return Ok(());
        }
        self.pages.clear();
        self.pages.resize(WINDOW_PAGES as usize * PAGE_SIZE, 0);
        // Pages of one frame may come to any place, from any thread; each page has one place.
        let into = Mutex::new(&mut self.pages[..]);
        let sink = |page: u64, bytes: &[u8]| {
            let at = page as usize * PAGE_SIZE;
            let mut into = into.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            into[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        self.fetcher.fetch(&mut self.pieces, builds, &sink)?;
        let first = (self.first_page / CHUNK_PAGES) as usize;
        let touched = std::mem::take(&mut self.touched);
        let parts = self.pages.chunks(CHUNK_BYTES as usize).enumerate();
        let parts: Vec<_> = parts.filter(|(at, _)| touched[*at]).collect();
        let share = parts.len().div_ceil(self.fetcher.threads());
        let digests = for_each_part(parts.chunks(share), |parts| {
            let mut scratch = Vec::new();
            let digest = |(at, pages): &(usize, &[u8])| {
                let digest = digest_pages(pages, &mut scratch);
                (first + at, digest)
            };
            parts.iter().map(digest).collect::<Vec<_>>()
        });
        for (chunk, digest) in digests.into_iter().flatten() {
            chunks[chunk] = digest;
        }
        Ok(())
    }
}
