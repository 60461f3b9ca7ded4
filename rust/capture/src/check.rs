//! Reads many blobs and compares each with its digest, on a few threads and in bounded memory.
//!
//! Small files are spread over the threads; a large one is read by all of them, piece by piece. A
//! build is compared as it is stored: its id verifies the table and the table each frame, so
//! nothing has to be decompressed. A file that nobody keeps a digest of is read to its end: what
//! can't be read is damage.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use diapause_format::{Digest, PAGE_SIZE};

use crate::blob::digest_file;
use crate::builds::{check_frames, OpenBuild};
use crate::error::{Error, Result};
use crate::headers::HeaderFile;
use crate::source::{data_segments, PageSource};
use crate::sums::FlatSums;
use crate::threads::for_each_part;

/// Files from this size on are read by all threads at once.
const LARGE_BYTES: u64 = 16 << 20;
/// Bytes that a thread reads at once.
const READ_BYTES: u64 = 1 << 20;

/// A blob and what it has to be.
#[derive(Debug, Clone)]
pub enum Blob {
    /// A build, by its id.
    Build(PathBuf, Digest),
    /// A header, by its digest.
    Header(PathBuf, Digest),
    /// Any file, by the digest of its bytes.
    Whole(PathBuf, Digest),
    /// A flat file, and the file with its digests.
    Flat(PathBuf, PathBuf),
    /// A capture file, by its sums; or a buffer, which has none, and what spilled from it.
    Capture(PathBuf, Option<PathBuf>),
    /// A file without a digest.
    Unsummed(PathBuf),
}

impl Blob {
    fn path(&self) -> &PathBuf {
        match self {
            Self::Build(path, _) | Self::Header(path, _) => path,
            Self::Whole(path, _) | Self::Flat(path, _) => path,
            Self::Capture(path, _) | Self::Unsummed(path) => path,
        }
    }

    fn size_bytes(&self) -> u64 {
        std::fs::metadata(self.path()).map_or(0, |found| found.len())
    }

    /// Reads all of it.
    ///
    /// # Errors
    /// Missing, damaged, storage.
    fn check(&self, threads: usize) -> Result<()> {
        match self {
            Self::Build(path, id) => check_frames(&OpenBuild::open(path, id)?, threads),
            Self::Header(path, digest) => {
                let header = HeaderFile { path, digest };
                let read = header.open()?.finish();
                read.map(|_| ()).map_err(|error| header.error(error))
            }
            Self::Whole(path, digest) if digest_file(path)? == *digest => Ok(()),
            Self::Whole(path, _) => Err(Error::Damaged {
                blob: path.display().to_string(),
                cause: "bad digest".to_owned(),
            }),
            Self::Capture(path, spill) => {
                read_capture(&PageSource::capture(path, spill.as_deref())?, threads)
            }
            Self::Unsummed(path) => read_file(path, threads),
            Self::Flat(path, sums) => {
                let found = FlatSums::read(sums)?.check(path, threads)?;
                match found.damaged.first() {
                    None => Ok(()),
                    Some(at) => Err(Error::Damaged {
                        blob: path.display().to_string(),
                        cause: format!("bad digest of the chunk at byte {at}"),
                    }),
                }
            }
        }
    }
}

/// Reads every page of a capture, and compares it with its sum where it has one.
fn read_capture(source: &PageSource, threads: usize) -> Result<()> {
    let pages = READ_BYTES / PAGE_SIZE as u64;
    let pieces = source.data_pages().div_ceil(pages);
    in_pieces(pieces, threads, |piece, bytes| {
        let first = piece * pages;
        let count = pages.min(source.data_pages() - first);
        bytes.resize(count as usize * PAGE_SIZE, 0);
        source.read(first, bytes)
    })
}

/// Reads all of a file but its holes.
fn read_file(path: &Path, threads: usize) -> Result<()> {
    let name = path.display().to_string();
    let failed = |cause| Error::read_failed(&name, path, cause);
    let file = File::open(path).map_err(failed)?;
    let size_bytes = file.metadata().map_err(failed)?.len();
    let segments = data_segments(&file, size_bytes).map_err(failed)?;
    let pieces: Vec<(u64, u64)> = segments
        .iter()
        .flat_map(|(start, end)| {
            let starts = (*start..*end).step_by(READ_BYTES as usize);
            starts.map(|at| (at, (*end).min(at + READ_BYTES)))
        })
        .collect();
    in_pieces(pieces.len() as u64, threads, |piece, bytes| {
        let (start, end) = pieces[piece as usize];
        bytes.resize((end - start) as usize, 0);
        file.read_exact_at(bytes, start).map_err(failed)
    })
}

/// Takes pieces from 0 on, each thread the next one, until one fails.
fn in_pieces(
    pieces: u64,
    threads: usize,
    read: impl Fn(u64, &mut Vec<u8>) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicU64::new(0);
    let work = |_| -> Result<()> {
        let mut bytes = Vec::new();
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= pieces {
                return Ok(());
            }
            if let Err(error) = read(piece, &mut bytes) {
                next.store(pieces, Ordering::Relaxed);
                return Err(error);
            }
        }
    };
    for_each_part(0..(threads as u64).clamp(1, pieces.max(1)), work)
        .into_iter()
        .collect()
}

/// Reads every blob; returns the number of each that is not what it has to be, and what was found.
pub fn check(blobs: &[Blob], threads: usize) -> Vec<(usize, Error)> {
    let sizes: Vec<u64> = blobs.iter().map(Blob::size_bytes).collect();
    let (large, small): (Vec<usize>, Vec<usize>) =
        (0..blobs.len()).partition(|at| sizes[*at] >= LARGE_BYTES);
    let next = AtomicUsize::new(0);
    let work = |_| {
        let mut found = Vec::new();
        while let Some(at) = small.get(next.fetch_add(1, Ordering::Relaxed)) {
            found.extend(blobs[*at].check(1).err().map(|error| (*at, error)));
        }
        found
    };
    let mut found: Vec<_> = for_each_part(0..threads.clamp(1, small.len().max(1)), work)
        .into_iter()
        .flatten()
        .collect();
    for at in large {
        found.extend(blobs[at].check(threads).err().map(|error| (at, error)));
    }
    found.sort_by_key(|(at, _)| *at);
    found
}
