//! Puts a device together as a plain sparse file, every byte verified on its way.
//!
//! Without a base all of it is written; with one (the flat file of a relative) that file is cloned
//! first and only the runs that the two headers map differently are written. The header is read as
//! a stream in windows of bounded size, so memory does not grow with the device. The file counts
//! once this returned: before, the header was not read to its verified end.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use diapause_format::{BuildRef, Differ, Side, Target, PAGE_SIZE};
use nix::fcntl::{fallocate, FallocateFlags};

use crate::blob::NewFile;
use crate::builds::Builds;
use crate::clone::clone_file;
use crate::error::{Error, Result};
use crate::fetch::{Captures, Fetcher, Piece};
use crate::headers::HeaderFile;

/// Bounds of a window: pages fetched, and pieces held, before they are written.
const WINDOW_PAGES: u64 = 32 << 10;
const WINDOW_PIECES: usize = 32 << 10;

/// A device that exists as a plain file already.
#[derive(Debug, Clone, Copy)]
pub struct Base<'a> {
    /// The plain file.
    pub flat: &'a Path,
    /// The header that says what it holds.
    pub header: HeaderFile<'a>,
}

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Materialized {
    /// Bytes from builds and captures.
    pub written_bytes: u64,
    /// Bytes cloned from the base.
    pub copied_bytes: u64,
    /// Frames read and verified.
    pub verified_frames: u64,
}

/// Everything that [`materialize`] is asked for.
#[derive(Debug)]
pub struct Request<'a> {
    /// The device's header.
    pub header: HeaderFile<'a>,
    /// Where builds lie.
    pub builds: &'a Path,
    /// The page source of each capture that the header maps to.
    pub captures: Captures,
    /// What to begin with.
    pub base: Option<Base<'a>>,
    /// Threads that verify and decompress.
    pub threads: usize,
    /// The new file.
    pub out: &'a Path,
    /// Whether it is durable when this returns.
    pub sync: bool,
}

/// Writes the device to a new file; it is gone when this fails.
///
/// # Errors
/// Missing, damaged, storage, invalid.
pub fn materialize(request: Request<'_>) -> Result<Materialized> {
    let out = NewFile::create(request.out)?;
    let fetcher = Fetcher::new(
        Builds::new(request.builds),
        request.captures,
        request.threads,
    );
    let mut writer = Writer {
        out: &out,
        fetcher,
        pieces: Vec::new(),
        window_pages: 0,
        written: AtomicU64::new(0),
    };
    let copied_bytes = match request.base {
        Some(base) => write_difference(&mut writer, request.header, base)?,
        None => write_all(&mut writer, request.header).map(|()| 0)?,
    };
    if request.sync {
        out.sync()?;
    }
    let written_bytes = writer.written.load(Ordering::Relaxed);
    let verified_frames = writer.fetcher.verified_frames();
    out.keep();
    Ok(Materialized {
        written_bytes,
        copied_bytes,
        verified_frames,
    })
}

fn write_all(writer: &mut Writer<'_>, header: HeaderFile<'_>) -> Result<()> {
    let mut reader = header.open()?;
    writer.set_length(reader.page_count())?;
    while let Some(extent) = reader.next_extent().map_err(|error| header.error(error))? {
        writer.add(extent.page, extent.length, extent.target, reader.builds())?;
    }
    writer.flush(reader.builds())
}

/// Clones the base and writes what differs; returns the bytes that were cloned.
fn write_difference(
    writer: &mut Writer<'_>,
    header: HeaderFile<'_>,
    base: Base<'_>,
) -> Result<u64> {
    let failed = |cause| Error::read_failed(&base.flat.display().to_string(), base.flat, cause);
    let flat = File::open(base.flat).map_err(failed)?;
    let (old, new) = (base.header.open()?, header.open()?);
    let size_bytes = new.page_count() * PAGE_SIZE as u64;
    if flat.metadata().map_err(failed)?.len() != size_bytes || old.page_count() != new.page_count()
    {
        return Err(Error::Invalid(
            "the base is of another size than the device".to_owned(),
        ));
    }
    writer.set_length(new.page_count())?;
    let copied = clone_file(&flat, writer.out.file(), size_bytes);
    let copied =
        copied.map_err(|cause| Error::write_failed(writer.out.path(), size_bytes, cause))?;
    let damaged = |side| match side {
        Side::Old(error) => base.header.error(error),
        Side::New(error) => header.error(error),
    };
    let mut differ = Differ::new(old, new);
    while let Some(run) = differ.next_difference().map_err(damaged)? {
        if run.new.is_zero() {
            writer.punch(run.page, run.length)?;
        } else {
            writer.add(run.page, run.length, run.new, differ.new_builds())?;
        }
    }
    writer.flush(differ.new_builds())?;
    Ok(copied)
}

/// Collects a window of pieces and writes them.
struct Writer<'a> {
    out: &'a NewFile,
    fetcher: Fetcher,
    pieces: Vec<Piece>,
    window_pages: u64,
    written: AtomicU64,
}

impl Writer<'_> {
    fn failed(&self, needed_bytes: u64, cause: std::io::Error) -> Error {
        Error::write_failed(self.out.path(), needed_bytes, cause)
    }

    fn set_length(&self, page_count: u64) -> Result<()> {
        let size_bytes = page_count * PAGE_SIZE as u64;
        self.out
            .file()
            .set_len(size_bytes)
            .map_err(|cause| self.failed(size_bytes, cause))
    }

    fn add(&mut self, page: u64, pages: u64, target: Target, builds: &[BuildRef]) -> Result<()> {
        if target.is_zero() {
            return Ok(());
        }
        let (mut page, mut pages, mut target) = (page, pages, target);
        while pages > 0 {
            let now = pages.min(WINDOW_PAGES - self.window_pages);
            let Target { build, position } = target;
            self.pieces.push(Piece {
                build,
                position,
                to: page,
                pages: now,
            });
            self.window_pages += now;
            if self.window_pages == WINDOW_PAGES || self.pieces.len() == WINDOW_PIECES {
                self.flush(builds)?;
            }
            (page, pages, target) = (page + now, pages - now, target.after(now));
        }
        Ok(())
    }

    fn flush(&mut self, builds: &[BuildRef]) -> Result<()> {
        let (out, written) = (self.out, &self.written);
        let window_bytes = self.window_pages * PAGE_SIZE as u64;
        let sink = |page: u64, bytes: &[u8]| {
            written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            let wrote = out.file().write_all_at(bytes, page * PAGE_SIZE as u64);
            wrote.map_err(|cause| Error::write_failed(out.path(), window_bytes, cause))
        };
        self.fetcher.fetch(&mut self.pieces, builds, &sink)?;
        self.window_pages = 0;
        Ok(())
    }

    /// Makes pages of the base zero: a hole, or zeros where the file system makes none.
    fn punch(&self, page: u64, pages: u64) -> Result<()> {
        let (offset, length) = (page * PAGE_SIZE as u64, pages * PAGE_SIZE as u64);
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(self.out.file(), flags, offset as i64, length as i64) {
            Ok(()) => Ok(()),
            Err(nix::errno::Errno::EOPNOTSUPP) => self.write_zeros(offset, length),
            Err(error) => Err(self.failed(length, error.into())),
        }
    }

    fn write_zeros(&self, offset: u64, length: u64) -> Result<()> {
        let zeros = vec![0; length.min(1 << 20) as usize];
        let mut at = offset;
        while at < offset + length {
            let bytes = &zeros[..(offset + length - at).min(1 << 20) as usize];
            let wrote = self.out.file().write_all_at(bytes, at);
            wrote.map_err(|cause| self.failed(length, cause))?;
            at += bytes.len() as u64;
        }
        Ok(())
    }
}
