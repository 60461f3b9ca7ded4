//! Opens builds and reads their frames: every byte that leaves here was verified up to the build's
//! id.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use diapause_format::{digest16, hex, BuildTable, Decoder, Digest, FormatError, FRAME_BYTES};

use crate::error::{Error, Result};
use crate::threads::for_each_part;

/// Builds open at once, far below any limit on descriptors.
pub(crate) const OPEN_BUILDS_MAX: usize = 256;
/// Frames read and decoded as one.
pub(crate) const CHUNK_FRAMES: usize = 16;

/// A build file with its verified table.
#[derive(Debug)]
pub(crate) struct OpenBuild {
    path: PathBuf,
    file: File,
    table: BuildTable,
}

impl OpenBuild {
    /// Opens the file at `path` as the build `id`.
    ///
    /// # Errors
    /// Missing, damaged, storage.
    pub(crate) fn open(path: &Path, id: &Digest) -> Result<Self> {
        let name = hex(id);
        let failed = |cause| Error::read_failed(&name, path, cause);
        let mut file = File::open(path).map_err(failed)?;
        let size_bytes = file.metadata().map_err(failed)?.len();
        let table = BuildTable::read(&mut file, size_bytes, id);
        let table = table.map_err(|error| Error::reading(&name, path, error))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            table,
        })
    }

    pub(crate) fn table(&self) -> &BuildTable {
        &self.table
    }

    fn error(&self, error: FormatError) -> Error {
        Error::reading(&hex(self.table.id()), &self.path, error)
    }

    fn check_piece(&self, first: u64, last: u64, stored: &mut Vec<u8>) -> Result<()> {
        let (start, end) = (self.table.frame(first).offset, self.table.frame(last));
        stored.resize((end.offset + u64::from(end.length) - start) as usize, 0);
        self.file
            .read_exact_at(stored, start)
            .map_err(|cause| self.error(FormatError::Io(cause)))?;
        for number in first..=last {
            let entry = self.table.frame(number);
            let from = (entry.offset - start) as usize;
            if digest16(&stored[from..from + entry.length as usize]) != entry.digest {
                return Err(self.error(FormatError::BadFrame { frame: number }));
            }
        }
        Ok(())
    }

    /// The stored bytes of a frame where they are what the table says; None where they are not, or
    /// can't be read.
    pub(crate) fn stored_frame(&self, number: u64) -> Option<Vec<u8>> {
        let entry = self.table.frame(number);
        let mut stored = vec![0; entry.length as usize];
        self.file.read_exact_at(&mut stored, entry.offset).ok()?;
        (digest16(&stored) == entry.digest).then_some(stored)
    }

    /// Reads frames `first..=last` with one read and decodes those that `wanted` says (bit 0:
    /// `first`) to their places in `into`, where `first` begins. Returns how many were decoded.
    ///
    /// # Errors
    /// Damaged, storage.
    pub(crate) fn read_frames(
        &self,
        scratch: &mut Scratch,
        first: u64,
        wanted: u32,
    ) -> Result<u64> {
        assert!(wanted & 1 == 1 && wanted < 1 << CHUNK_FRAMES);
        let last = first + u64::from(wanted.ilog2());
        assert!(last < self.table.frame_count());
        let (start, end) = (self.table.frame(first).offset, self.table.frame(last));
        let stored_bytes = (end.offset + u64::from(end.length) - start) as usize;
        let Scratch {
            stored,
            pages,
            decoder,
        } = scratch;
        stored.resize(stored_bytes, 0);
        self.file
            .read_exact_at(stored, start)
            .map_err(|cause| self.error(FormatError::Io(cause)))?;
        for number in (first..=last).filter(|number| wanted >> (number - first) & 1 == 1) {
            let entry = self.table.frame(number);
            let from = (entry.offset - start) as usize;
            let into = (number - first) as usize * FRAME_BYTES;
            let bytes = &stored[from..from + entry.length as usize];
            let pages = &mut pages[into..into + self.table.frame_bytes(number)];
            decoder
                .decode(number, entry, bytes, pages)
                .map_err(|error| self.error(error))?;
        }
        Ok(u64::from(wanted.count_ones()))
    }
}

/// What one thread needs to decode frames.
pub(crate) struct Scratch {
    stored: Vec<u8>,
    /// The decoded frames of a chunk, each at its place.
    pub(crate) pages: Vec<u8>,
    decoder: Decoder,
}

impl Scratch {
    pub(crate) fn new() -> Result<Self> {
        let decoder = Decoder::new().map_err(|error| Error::Invalid(error.to_string()))?;
        Ok(Self {
            stored: Vec::new(),
            pages: vec![0; CHUNK_FRAMES * FRAME_BYTES],
            decoder,
        })
    }
}

/// The builds of a directory, a bounded number of them open.
#[derive(Debug)]
pub(crate) struct Builds {
    directory: PathBuf,
    open: HashMap<Digest, Arc<OpenBuild>>,
}

impl Builds {
    pub(crate) fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            open: HashMap::new(),
        }
    }

    /// The build `id`, open. What was handed out before stays open as long as it is held.
    ///
    /// # Errors
    /// Missing, damaged, storage.
    pub(crate) fn get(&mut self, id: &Digest) -> Result<Arc<OpenBuild>> {
        if let Some(build) = self.open.get(id) {
            return Ok(build.clone());
        }
        if self.open.len() >= OPEN_BUILDS_MAX {
            self.open.clear();
        }
        let build = Arc::new(OpenBuild::open(&self.directory.join(hex(id)), id)?);
        self.open.insert(*id, build.clone());
        Ok(build)
    }
}

/// Bytes of stored frames that a check reads at once.
const CHECK_BYTES: u64 = 1 << 20;

/// Compares every stored frame of a build with its checksum, decompressing none.
///
/// # Errors
/// Damaged, storage.
pub(crate) fn check_frames(build: &OpenBuild, threads: usize) -> Result<()> {
    let pieces = check_pieces(&build.table);
    let next = AtomicUsize::new(0);
    let work = |_| -> Result<()> {
        let mut stored = Vec::new();
        while let Some((first, last)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            build.check_piece(*first, *last, &mut stored)?;
        }
        Ok(())
    };
    for_each_part(0..threads.clamp(1, pieces.len().max(1)), work)
        .into_iter()
        .collect()
}

/// Runs of frames, first and last, that are stored in about as much as is read at once.
fn check_pieces(table: &BuildTable) -> Vec<(u64, u64)> {
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    let mut end = 0;
    for number in 0..table.frame_count() {
        let frame = table.frame(number);
        match pieces.last_mut() {
            Some(piece) if frame.offset + u64::from(frame.length) <= end => piece.1 = number,
            _ => {
                pieces.push((number, number));
                end = frame.offset + CHECK_BYTES;
            }
        }
    }
    pieces
}

/// Reads the whole build at `path` and verifies every byte; returns its pages.
///
/// # Errors
/// Missing, damaged, storage.
pub fn verify_build(path: &Path, id: &Digest) -> Result<u64> {
    let build = OpenBuild::open(path, id)?;
    let mut scratch = Scratch::new()?;
    let frames = build.table().frame_count();
    for first in (0..frames).step_by(CHUNK_FRAMES) {
        let count = (frames - first).min(CHUNK_FRAMES as u64);
        build.read_frames(&mut scratch, first, ((1u64 << count) - 1) as u32)?;
    }
    Ok(build.table().page_count())
}
