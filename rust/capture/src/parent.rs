//! The pages that a capture is compared with: the parent's, from a flat file or through its header
//! and builds.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use diapause_format::{Extent, HeaderReader, PAGE_SIZE};

use crate::error::{Error, Result};
use crate::fetch::{Fetcher, Piece};
use crate::headers::HeaderFile;
use crate::source::SourceRun;

/// Where the parent's bytes come from.
pub(crate) enum ParentPages<'a> {
    /// There is none: all zero.
    Zero,
    /// A plain file of the whole device.
    Flat(ParentFlat),
    /// The parent's builds.
    Builds(Box<ParentThroughBuilds<'a>>),
}

impl ParentPages<'_> {
    /// Fetches what can't be read run by run; `into` has the pages of the runs, which ascend from
    /// call to call.
    ///
    /// # Errors
    /// Missing, damaged, storage.
    pub(crate) fn prepare(&mut self, runs: &[SourceRun], into: &mut [u8]) -> Result<()> {
        match self {
            Self::Builds(builds) => builds.prepare(runs, into),
            Self::Zero => {
                into.fill(0);
                Ok(())
            }
            Self::Flat(_) => Ok(()),
        }
    }

    /// Reads the parent's pages of one run, unless `prepare` has.
    ///
    /// # Errors
    /// Missing, damaged, storage.
    pub(crate) fn read(&self, run: &SourceRun, into: &mut [u8]) -> Result<()> {
        match self {
            Self::Flat(flat) => flat.read(run.page, into),
            Self::Zero | Self::Builds(_) => Ok(()),
        }
    }
}

/// A plain file of the parent's whole device.
pub(crate) struct ParentFlat {
    path: PathBuf,
    file: File,
}

impl ParentFlat {
    pub(crate) fn open(path: &Path, page_count: u64) -> Result<Self> {
        let blob = path.display().to_string();
        let failed = |cause| Error::read_failed(&blob, path, cause);
        let file = File::open(path).map_err(failed)?;
        let size_bytes = file.metadata().map_err(failed)?.len();
        if size_bytes != page_count * PAGE_SIZE as u64 {
            let cause = format!("it has {size_bytes} bytes, not {page_count} pages");
            return Err(Error::Damaged { blob, cause });
        }
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    fn read(&self, page: u64, into: &mut [u8]) -> Result<()> {
        let read = self.file.read_exact_at(into, page * PAGE_SIZE as u64);
        read.map_err(|cause| {
            Error::read_failed(&self.path.display().to_string(), &self.path, cause)
        })
    }
}

/// The parent's pages through its header, read once from front to back.
pub(crate) struct ParentThroughBuilds<'a> {
    header: HeaderFile<'a>,
    reader: HeaderReader<File>,
    rest: Option<Extent>,
    fetcher: Fetcher,
    pieces: Vec<Piece>,
}

impl<'a> ParentThroughBuilds<'a> {
    pub(crate) fn new(
        header: HeaderFile<'a>,
        reader: HeaderReader<File>,
        fetcher: Fetcher,
    ) -> Self {
        Self {
            header,
            reader,
            rest: None,
            fetcher,
            pieces: Vec::new(),
        }
    }

    fn prepare(&mut self, runs: &[SourceRun], into: &mut [u8]) -> Result<()> {
        into.fill(0);
        let mut to = 0;
        for run in runs {
            self.collect(run, to)?;
            to += run.pages;
        }
        // Pages of one frame may come to any place of `into`, from any thread; each page has one
        // place.
        let into = Mutex::new(into);
        let sink = |page: u64, bytes: &[u8]| {
            let at = page as usize * PAGE_SIZE;
            let mut into = into.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            into[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        self.fetcher
            .fetch(&mut self.pieces, self.reader.builds(), &sink)
    }

    /// Turns the part of the header that a run covers into pieces for the pages from `to` on.
    fn collect(&mut self, run: &SourceRun, to: u64) -> Result<()> {
        let end = run.page + run.pages;
        let mut page = run.page;
        while page < end {
            let extent = match self.rest.take() {
                Some(extent) => extent,
                None => self.next_extent()?,
            };
            let Some(extent) = extent.trimmed_to(page) else {
                continue;
            };
            let pages = extent.end().min(end) - page;
            if !extent.target.is_zero() {
                let (build, position) = (extent.target.build, extent.target.position);
                let to = to + page - run.page;
                self.pieces.push(Piece {
                    build,
                    position,
                    to,
                    pages,
                });
            }
            page += pages;
            self.rest = extent.trimmed_to(page);
        }
        Ok(())
    }

    fn next_extent(&mut self) -> Result<Extent> {
        let next = self
            .reader
            .next_extent()
            .map_err(|error| self.header.error(error))?;
        // The runs lie inside the device, and extents cover it: the reader would have said
        // otherwise.
        next.ok_or_else(|| Error::Invalid("a capture goes beyond its header".to_owned()))
    }
}
