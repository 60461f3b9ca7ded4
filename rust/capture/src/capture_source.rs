//! Reads a capture: a sealed file, or a sealed buffer and what spilled from it.
//!
//! The list is verified when it is opened, the sums too where there are any; a page is verified by
//! its sum each time it is read. Without sums (a buffer) its bytes are what the file system keeps.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use diapause_format::capture_file::{CaptureHead, CaptureLayout, CAPTURE_HEAD_LEN, SUM_LEN};
use diapause_format::{digest16, FormatError, PAGE_SIZE};

use crate::error::{Error, Result};
use crate::source::SourceRun;

/// List entries read at once.
const CHUNK_ENTRIES: u64 = 1 << 16;

/// A file of a capture, and which layout its offsets follow.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: File,
    layout: CaptureLayout,
}

/// An open capture.
#[derive(Debug)]
pub(crate) struct CaptureSource {
    head: CaptureHead,
    main: Part,
    spill: Option<Part>,
}

impl Part {
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(into, offset).map_err(|cause| {
            Error::read_failed(&self.path.display().to_string(), &self.path, cause)
        })
    }

    fn damaged(&self, error: FormatError) -> Error {
        Error::reading(&self.path.display().to_string(), &self.path, error)
    }
}

/// Reads the head of a capture file or buffer, sealed or not.
///
/// # Errors
/// Missing, damaged, storage.
pub fn read_head(path: &Path) -> Result<(CaptureHead, File)> {
    let blob = path.display().to_string();
    let failed = |cause| Error::read_failed(&blob, path, cause);
    let file = File::open(path).map_err(failed)?;
    let size_bytes = file.metadata().map_err(failed)?.len();
    let mut bytes = vec![0; CAPTURE_HEAD_LEN.min(size_bytes as usize)];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    let head = CaptureHead::decode(&bytes, size_bytes);
    Ok((
        head.map_err(|error| Error::reading(&blob, path, error))?,
        file,
    ))
}

impl CaptureSource {
    pub(crate) fn open(path: &Path, spill: Option<&Path>) -> Result<(Self, Vec<SourceRun>)> {
        let (head, file) = read_head(path)?;
        let main = Part {
            path: path.to_owned(),
            file,
            layout: head.layout(),
        };
        if !head.sealed {
            return Err(main.damaged(FormatError::NotSealed));
        }
        let spilled = head.captured > head.resident();
        let spill = match (spilled, spill) {
            (false, _) => None,
            (true, Some(spill)) => Some(open_spill(spill, head.captured)?),
            (true, None) => {
                return Err(Error::Invalid(format!(
                    "{} spilled; its file is not named",
                    path.display()
                )))
            }
        };
        let source = Self { head, main, spill };
        let runs = source.read_list()?;
        source.verify_sums()?;
        Ok((source, runs))
    }

    pub(crate) fn head(&self) -> &CaptureHead {
        &self.head
    }

    /// The file that holds the entry or page at `position`, and how many from there on it holds.
    fn part(&self, position: u64) -> (&Part, u64) {
        let resident = self.head.resident();
        match &self.spill {
            Some(spill) if position >= resident => (spill, self.head.captured - position),
            _ => (&self.main, resident - position),
        }
    }

    /// Reads and verifies the list, as runs.
    fn read_list(&self) -> Result<Vec<SourceRun>> {
        let mut runs: Vec<SourceRun> = Vec::new();
        let mut hash = blake3::Hasher::new();
        let mut bytes = Vec::new();
        let mut position = 0;
        while position < self.head.captured {
            let (part, held) = self.part(position);
            let count = held.min(CHUNK_ENTRIES);
            bytes.resize(8 * count as usize, 0);
            part.read(part.layout.list_entry(position), &mut bytes)?;
            hash.update(&bytes);
            for (at, entry) in bytes.chunks_exact(8).enumerate() {
                let mut page = [0; 8];
                page.copy_from_slice(entry);
                self.add(&mut runs, u64::from_le_bytes(page), position + at as u64)?;
            }
            position += count;
        }
        if hash.finalize() != self.head.list_digest {
            return Err(self.main.damaged(FormatError::BadDigest {
                part: "list of pages",
            }));
        }
        Ok(runs)
    }

    fn add(&self, runs: &mut Vec<SourceRun>, page: u64, position: u64) -> Result<()> {
        let next = runs.last().map_or(0, |last| last.page + last.pages);
        if page < next || page >= self.head.device_pages {
            let (part, limit) = ("page in the list", self.head.device_pages);
            return Err(self.main.damaged(FormatError::OutOfRange {
                part,
                found: page,
                limit,
            }));
        }
        match runs.last_mut() {
            Some(last) if page == next => last.pages += 1,
            _ => runs.push(SourceRun {
                page,
                pages: 1,
                position: Some(position),
            }),
        }
        Ok(())
    }

    /// Verifies the sums themselves; only a whole file has them.
    fn verify_sums(&self) -> Result<()> {
        let Some(expected) = self.head.sums_digest else {
            return Ok(());
        };
        let mut hash = blake3::Hasher::new();
        let mut bytes = Vec::new();
        let mut position = 0;
        while position < self.head.captured {
            let count = (self.head.captured - position).min(CHUNK_ENTRIES);
            bytes.resize(SUM_LEN * count as usize, 0);
            self.main.read(self.main.layout.sum(position), &mut bytes)?;
            hash.update(&bytes);
            position += count;
        }
        if hash.finalize() != expected {
            return Err(self.main.damaged(FormatError::BadDigest { part: "sums" }));
        }
        Ok(())
    }

    pub(crate) fn read(&self, position: u64, into: &mut [u8]) -> Result<()> {
        let (mut position, mut rest) = (position, into);
        while !rest.is_empty() {
            let (part, held) = self.part(position);
            let bytes = rest.len().min((held as usize).saturating_mul(PAGE_SIZE));
            let (now, later) = rest.split_at_mut(bytes);
            part.read(part.layout.page(position), now)?;
            self.verify(position, now)?;
            position += (bytes / PAGE_SIZE) as u64;
            rest = later;
        }
        Ok(())
    }

    fn verify(&self, position: u64, pages: &[u8]) -> Result<()> {
        if self.head.sums_digest.is_none() {
            return Ok(());
        }
        let mut sums = vec![0; pages.len() / PAGE_SIZE * SUM_LEN];
        self.main.read(self.main.layout.sum(position), &mut sums)?;
        for (page, sum) in pages
            .chunks_exact(PAGE_SIZE)
            .zip(sums.chunks_exact(SUM_LEN))
        {
            if digest16(page) != sum {
                return Err(self.main.damaged(FormatError::BadDigest {
                    part: "captured page",
                }));
            }
        }
        Ok(())
    }
}

fn open_spill(path: &Path, captured: u64) -> Result<Part> {
    let blob = path.display().to_string();
    let file = File::open(path).map_err(|cause| Error::read_failed(&blob, path, cause))?;
    Ok(Part {
        path: path.to_owned(),
        file,
        layout: CaptureLayout::for_pages(captured),
    })
}
