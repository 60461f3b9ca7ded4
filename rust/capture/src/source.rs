//! Page sources: what a capture took of one device, wherever it lies.
//!
//! A source is a list of runs of device pages, ascending, each of zeros or of data at ascending
//! **positions** 0, 1, 2, …: the position is what a provisional header maps to. Runs are merged as
//! far as they go on, so the list is small against the pages. Data is read by position, by several
//! threads at once, and verified where the source has sums.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use diapause_format::PAGE_SIZE;
use nix::unistd::{lseek, Whence};

use crate::capture_source::CaptureSource;
use crate::error::{Error, Result};
use crate::overlay_map::parse_map;

/// A run of captured device pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceRun {
    /// First page of the device.
    pub page: u64,
    /// Pages, at least 1.
    pub pages: u64,
    /// Position of the first of them; None for zeros.
    pub position: Option<u64>,
}

/// The pages that one capture took of one device.
#[derive(Debug)]
pub struct PageSource {
    device_pages: u64,
    captured_pages: u64,
    data_pages: u64,
    runs: Vec<SourceRun>,
    data: Data,
}

/// Where the bytes are.
#[derive(Debug)]
enum Data {
    Capture(CaptureSource),
    Raw(RawFile),
}

/// Pages that lie raw in one file.
#[derive(Debug)]
struct RawFile {
    path: PathBuf,
    file: File,
    /// (position of its first page, offset in the file), ascending by position.
    pieces: Vec<(u64, u64)>,
}

impl PageSource {
    /// Opens a sealed capture file; or a sealed buffer, with the file that its other pages spilled
    /// to.
    ///
    /// # Errors
    /// Missing, damaged (also: not sealed), storage.
    pub fn capture(path: &Path, spill: Option<&Path>) -> Result<Self> {
        let (source, runs) = CaptureSource::open(path, spill)?;
        let head = source.head();
        Ok(Self {
            device_pages: head.device_pages,
            captured_pages: head.captured,
            data_pages: head.captured,
            runs,
            data: Data::Capture(source),
        })
    }

    /// Opens a frozen overlay by its map; `page_count` is the device's.
    ///
    /// # Errors
    /// Missing, damaged (the map can't be followed), storage.
    pub fn overlay(path: &Path, map_json: &[u8], page_count: u64) -> Result<Self> {
        let blob = path.display().to_string();
        let file = File::open(path).map_err(|cause| Error::read_failed(&blob, path, cause))?;
        let map =
            parse_map(map_json, page_count).map_err(|cause| Error::Damaged { blob, cause })?;
        let runs = map.iter().map(|run| (run.page, run.pages, run.offset));
        Ok(Self::raw(path, file, page_count, runs))
    }

    /// Opens a plain file as a whole device of `page_count` pages; its holes are not captured.
    ///
    /// # Errors
    /// Missing, storage; invalid when the file is larger than the device.
    pub fn plain(path: &Path, page_count: u64) -> Result<Self> {
        let blob = path.display().to_string();
        let failed = |cause| Error::read_failed(&blob, path, cause);
        let file = File::open(path).map_err(failed)?;
        let size_bytes = file.metadata().map_err(failed)?.len();
        if size_bytes > page_count * PAGE_SIZE as u64 || size_bytes % PAGE_SIZE as u64 != 0 {
            return Err(Error::Invalid(format!(
                "{blob} has {size_bytes} bytes; that is no device of {page_count} pages"
            )));
        }
        let segments = data_segments(&file, size_bytes).map_err(failed)?;
        let page = PAGE_SIZE as u64;
        let runs = segments
            .iter()
            .map(|(start, end)| (start / page, (end - start) / page, Some(*start)));
        Ok(Self::raw(path, file, page_count, runs))
    }

    fn raw(
        path: &Path,
        file: File,
        device_pages: u64,
        from: impl Iterator<Item = (u64, u64, Option<u64>)>,
    ) -> Self {
        let (mut runs, mut pieces) = (Vec::new(), Vec::new());
        let (mut captured_pages, mut data_pages) = (0, 0);
        for (page, pages, offset) in from {
            let position = offset.map(|_| data_pages);
            runs.push(SourceRun {
                page,
                pages,
                position,
            });
            captured_pages += pages;
            if let Some(offset) = offset {
                pieces.push((data_pages, offset));
                data_pages += pages;
            }
        }
        let data = Data::Raw(RawFile {
            path: path.to_owned(),
            file,
            pieces,
        });
        Self {
            device_pages,
            captured_pages,
            data_pages,
            runs,
            data,
        }
    }

    /// Pages of the device.
    pub fn device_pages(&self) -> u64 {
        self.device_pages
    }

    /// Pages captured, zero runs included.
    pub fn captured_pages(&self) -> u64 {
        self.captured_pages
    }

    /// Pages that have a position.
    pub fn data_pages(&self) -> u64 {
        self.data_pages
    }

    /// The runs, ascending.
    pub fn runs(&self) -> &[SourceRun] {
        &self.runs
    }

    /// Reads the pages at `position` and after it into `into`, which is a whole number of pages.
    ///
    /// # Errors
    /// Damaged, storage.
    pub fn read(&self, position: u64, into: &mut [u8]) -> Result<()> {
        assert!(into.len() % PAGE_SIZE == 0);
        let end = position + (into.len() / PAGE_SIZE) as u64;
        if end > self.data_pages {
            return Err(Error::Invalid(format!(
                "position {end} of a capture of {} pages",
                self.data_pages
            )));
        }
        match &self.data {
            Data::Capture(capture) => capture.read(position, into),
            Data::Raw(raw) => raw.read(position, into),
        }
    }
}

impl RawFile {
    fn read(&self, position: u64, into: &mut [u8]) -> Result<()> {
        let page = PAGE_SIZE as u64;
        let (mut position, mut rest) = (position, into);
        let mut at = self.pieces.partition_point(|(first, _)| *first <= position) - 1;
        while !rest.is_empty() {
            let (first, offset) = self.pieces[at];
            at += 1;
            let end = self.pieces.get(at).map_or(u64::MAX, |(first, _)| *first);
            let bytes = rest
                .len()
                .min((end - position).saturating_mul(page) as usize);
            let (now, later) = rest.split_at_mut(bytes);
            self.file
                .read_exact_at(now, offset + (position - first) * page)
                .map_err(|cause| {
                    Error::read_failed(&self.path.display().to_string(), &self.path, cause)
                })?;
            position += bytes as u64 / page;
            rest = later;
        }
        Ok(())
    }
}

/// The parts of a file that are not holes, grown to whole pages, ascending.
///
/// # Errors
/// What `lseek` says.
pub(crate) fn data_segments(file: &File, size_bytes: u64) -> std::io::Result<Vec<(u64, u64)>> {
    let page = PAGE_SIZE as u64;
    let mut segments: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < size_bytes {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            // Nothing but a hole until the end.
            Err(nix::errno::Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = lseek(file, start as i64, Whence::SeekHole)? as u64;
        let (start, end) = (
            start / page * page,
            end.next_multiple_of(page).min(size_bytes),
        );
        match segments.last_mut() {
            Some(last) if last.1 >= start => last.1 = end,
            _ => segments.push((start, end)),
        }
        at = end;
    }
    Ok(segments)
}
