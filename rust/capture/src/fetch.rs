//! Fetches scattered pages from builds and captures, each frame once, on several threads.
//!
//! The caller hands over a window of pieces in any order. They are sorted by (build, position) and
//! cut at chunks of 16 frames; a thread takes a chunk, decodes only the frames that are wanted and
//! hands on the longest runs that go on both in the build and at their destination.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;

use diapause_format::{hex, BuildKind, BuildRef, Digest, FRAME_PAGES, PAGE_SIZE};

use crate::builds::{Builds, OpenBuild, Scratch, CHUNK_FRAMES, OPEN_BUILDS_MAX};
use crate::error::{Error, Result};
use crate::source::PageSource;
use crate::threads::for_each_part;

const CHUNK_PAGES: u64 = (CHUNK_FRAMES * FRAME_PAGES) as u64;

/// A run of pages to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Piece {
    /// Number of the build in the header.
    pub(crate) build: u32,
    /// Page in the build.
    pub(crate) position: u64,
    /// Where it goes, in pages, as the sink counts them.
    pub(crate) to: u64,
    /// Pages.
    pub(crate) pages: u64,
}

impl Piece {
    fn chunk(&self) -> (u32, u64) {
        (self.build, self.position / CHUNK_PAGES)
    }

    fn end(&self) -> u64 {
        self.position + self.pages
    }

    /// Makes `self` longer by `next` if that goes on where this ends, at both places.
    fn absorb(&mut self, next: &Self) -> bool {
        let continues = self.build == next.build
            && self.end() == next.position
            && self.to + self.pages == next.to;
        self.pages += if continues { next.pages } else { 0 };
        continues
    }
}

/// The captures that a provisional header may map to, by what it calls them.
pub type Captures = HashMap<Digest, Arc<PageSource>>;

/// Where pages come from.
pub(crate) struct Fetcher {
    builds: Builds,
    captures: Captures,
    threads: usize,
    verified_frames: AtomicU64,
}

/// One build or capture, ready to be read by several threads.
enum Opened {
    Build(Arc<OpenBuild>),
    Capture(Arc<PageSource>),
}

impl Fetcher {
    pub(crate) fn new(builds: Builds, captures: Captures, threads: usize) -> Self {
        Self {
            builds,
            captures,
            threads: threads.max(1),
            verified_frames: AtomicU64::new(0),
        }
    }

    /// Threads that it works on.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Frames verified so far.
    pub(crate) fn verified_frames(&self) -> u64 {
        self.verified_frames.load(Ordering::Relaxed)
    }

    /// Fetches `pieces` and hands runs of pages with their destination to `sink`, from several
    /// threads. `builds` are the header's. Leaves `pieces` empty.
    ///
    /// # Errors
    /// Missing, damaged, storage; what `sink` reports.
    pub(crate) fn fetch(
        &mut self,
        pieces: &mut Vec<Piece>,
        builds: &[BuildRef],
        sink: &(impl Fn(u64, &[u8]) -> Result<()> + Sync),
    ) -> Result<()> {
        let pieces = cut(std::mem::take(pieces));
        let jobs: Vec<&[Piece]> = pieces.chunk_by(|a, b| a.chunk() == b.chunk()).collect();
        let mut rest = &jobs[..];
        while !rest.is_empty() {
            let (opened, count) = self.open_some(rest, builds)?;
            let (now, later) = rest.split_at(count);
            self.run(now, &opened, sink)?;
            rest = later;
        }
        Ok(())
    }

    /// Opens the builds of the first jobs, as many as may be open at once; returns how many jobs
    /// that is.
    fn open_some(
        &mut self,
        jobs: &[&[Piece]],
        builds: &[BuildRef],
    ) -> Result<(HashMap<u32, Opened>, usize)> {
        let mut opened = HashMap::new();
        for (at, job) in jobs.iter().enumerate() {
            let number = job[0].build;
            if opened.contains_key(&number) {
                continue;
            }
            if opened.len() == OPEN_BUILDS_MAX {
                return Ok((opened, at));
            }
            opened.insert(number, self.open(&builds[number as usize - 1])?);
        }
        Ok((opened, jobs.len()))
    }

    fn open(&mut self, build: &BuildRef) -> Result<Opened> {
        let found = match build.kind {
            BuildKind::Packed => {
                let open = self.builds.get(&build.id)?;
                let pages = open.table().page_count();
                (Opened::Build(open), pages)
            }
            BuildKind::Capture => {
                let missing = || Error::Missing {
                    blob: hex(&build.id),
                };
                let source = self.captures.get(&build.id).ok_or_else(missing)?;
                (Opened::Capture(source.clone()), source.data_pages())
            }
        };
        if found.1 != build.pages {
            let cause = format!("it has {} pages; the header says {}", found.1, build.pages);
            return Err(Error::Damaged {
                blob: hex(&build.id),
                cause,
            });
        }
        Ok(found.0)
    }

    fn run(
        &self,
        jobs: &[&[Piece]],
        opened: &HashMap<u32, Opened>,
        sink: &(impl Fn(u64, &[u8]) -> Result<()> + Sync),
    ) -> Result<()> {
        let next = AtomicUsize::new(0);
        let work = |_| -> Result<()> {
            let mut scratch = Scratch::new()?;
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let done = self.fetch_chunk(job, &opened[&job[0].build], &mut scratch, sink);
                if done.is_err() {
                    // The others stop at their next chunk.
                    next.store(jobs.len(), Ordering::Relaxed);
                }
                done?;
            }
            Ok(())
        };
        for_each_part(0..self.threads.min(jobs.len()), work)
            .into_iter()
            .collect()
    }

    fn fetch_chunk(
        &self,
        job: &[Piece],
        from: &Opened,
        scratch: &mut Scratch,
        sink: &impl Fn(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let first = job[0].position / FRAME_PAGES as u64;
        let base = match from {
            Opened::Build(build) => {
                let wanted = wanted_frames(job, first);
                let count = build.read_frames(scratch, first, wanted)?;
                self.verified_frames.fetch_add(count, Ordering::Relaxed);
                first * FRAME_PAGES as u64
            }
            Opened::Capture(source) => {
                read_capture(job, source, &mut scratch.pages)?;
                job[0].position
            }
        };
        let hand_on = |piece: Piece| {
            let start = (piece.position - base) as usize * PAGE_SIZE;
            sink(
                piece.to,
                &scratch.pages[start..start + piece.pages as usize * PAGE_SIZE],
            )
        };
        let mut open = job[0];
        for piece in &job[1..] {
            if !open.absorb(piece) {
                hand_on(std::mem::replace(&mut open, *piece))?;
            }
        }
        hand_on(open)
    }
}

/// Sorts pieces and cuts them where chunks end.
fn cut(mut pieces: Vec<Piece>) -> Vec<Piece> {
    if pieces
        .iter()
        .any(|piece| piece.position % CHUNK_PAGES + piece.pages > CHUNK_PAGES)
    {
        let whole = std::mem::take(&mut pieces);
        for mut piece in whole {
            while piece.pages > 0 {
                let pages = piece.pages.min(CHUNK_PAGES - piece.position % CHUNK_PAGES);
                pieces.push(Piece { pages, ..piece });
                piece.position += pages;
                piece.to += pages;
                piece.pages -= pages;
            }
        }
    }
    pieces.sort_unstable();
    pieces
}

/// A bit for each frame that the pieces of a chunk touch, from frame `first` on.
fn wanted_frames(job: &[Piece], first: u64) -> u32 {
    let pages = FRAME_PAGES as u64;
    job.iter().fold(0, |wanted, piece| {
        let (from, to) = (
            piece.position / pages - first,
            (piece.end() - 1) / pages - first,
        );
        wanted | ((1 << (to + 1)) - (1 << from))
    })
}

/// Reads each run of positions of a chunk to its place after the chunk's first position.
fn read_capture(job: &[Piece], source: &PageSource, pages: &mut [u8]) -> Result<()> {
    let base = job[0].position;
    for run in job.chunk_by(|a, b| a.end() == b.position) {
        let (start, end) = (run[0].position - base, run[run.len() - 1].end() - base);
        source.read(
            run[0].position,
            &mut pages[start as usize * PAGE_SIZE..end as usize * PAGE_SIZE],
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(build: u32, position: u64, to: u64, pages: u64) -> Piece {
        Piece {
            build,
            position,
            to,
            pages,
        }
    }

    #[test]
    fn pieces_are_cut_at_chunks_and_sorted() {
        let cut = cut(vec![piece(2, 0, 9, 1), piece(1, 250, 0, 300)]);
        let expected = [
            piece(1, 250, 0, 6),
            piece(1, 256, 6, 256),
            piece(1, 512, 262, 38),
            piece(2, 0, 9, 1),
        ];
        assert_eq!(cut, expected);
    }

    #[test]
    fn only_touched_frames_are_wanted() {
        let job = [piece(1, 256 + 15, 0, 2), piece(1, 256 + 64, 9, 16)];
        assert_eq!(wanted_frames(&job, 16), 0b10011);
    }

    #[test]
    fn runs_go_on_only_where_both_sides_do() {
        let mut open = piece(1, 4, 10, 2);
        assert!(open.absorb(&piece(1, 6, 12, 1)));
        assert!(!open.absorb(&piece(1, 7, 14, 1)));
        assert!(!open.absorb(&piece(2, 7, 13, 1)));
        assert_eq!(open, piece(1, 4, 10, 3));
    }
}
