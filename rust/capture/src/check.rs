//! Reads many blobs and compares each with its digest, on a few threads and in bounded memory.
//!
//! Small files are spread over the threads; a large one is read by all of them, piece by piece. A
//! build is compared as it is stored: its id verifies the table and the table each frame, so
//! nothing has to be decompressed.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use diapause_format::Digest;

use crate::blob::digest_file;
use crate::builds::{check_frames, OpenBuild};
use crate::error::{Error, Result};
use crate::headers::HeaderFile;
use crate::sums::FlatSums;
use crate::threads::for_each_part;

/// Files from this size on are read by all threads at once.
const LARGE_BYTES: u64 = 16 << 20;

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
}

impl Blob {
    fn path(&self) -> &PathBuf {
        match self {
            Self::Build(path, _) | Self::Header(path, _) => path,
            Self::Whole(path, _) | Self::Flat(path, _) => path,
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
