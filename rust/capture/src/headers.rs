//! Header files: opened for reading as streams, written once, made provisional.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use diapause_format::{
    hex, overwrite, BuildKind, BuildRef, Digest, Extent, FormatError, HeaderReader, HeaderSummary,
    HeaderWriter, Target, FULL_HEADER, NEW_BUILD,
};

use crate::blob::{NewFile, WriteFailed};
use crate::error::{Error, Result};
use crate::source::PageSource;

/// A header file that is known by its digest.
#[derive(Debug, Clone, Copy)]
pub struct HeaderFile<'a> {
    /// Where it lies.
    pub path: &'a Path,
    /// Its digest.
    pub digest: &'a Digest,
}

impl HeaderFile<'_> {
    /// Begins to read it.
    ///
    /// # Errors
    /// Missing, damaged, storage.
    pub fn open(&self) -> Result<HeaderReader<File>> {
        let name = hex(self.digest);
        let file = File::open(self.path);
        let file = file.map_err(|cause| Error::read_failed(&name, self.path, cause))?;
        HeaderReader::new(file, Some(*self.digest)).map_err(|error| self.error(error))
    }

    /// What reading it reported.
    pub fn error(&self, error: FormatError) -> Error {
        Error::reading(&hex(self.digest), self.path, error)
    }
}

/// Writes the header of a device that is all zero.
///
/// # Errors
/// Storage, invalid.
pub fn write_zero_header(path: &Path, page_count: u64) -> Result<HeaderSummary> {
    let out = NewFile::create_for(path)?;
    let summary = zero_header(&out, page_count).map_err(|error| out.error(error))?;
    out.sync()?;
    out.publish(path)?;
    Ok(summary)
}

/// A header of zeros, to any writer.
pub(crate) fn zero_header(
    to: impl std::io::Write,
    page_count: u64,
) -> std::result::Result<HeaderSummary, FormatError> {
    let mut writer = HeaderWriter::new(to, page_count)?;
    if page_count > 0 {
        let all = Extent {
            page: 0,
            length: page_count,
            target: Target::ZERO,
        };
        writer.push(all, |_| unreachable!("zeros have no build"))?;
    }
    Ok(writer.finish()?.0)
}

/// Writes the provisional header: what `source` took maps to it, under the name `capture`.
///
/// # Errors
/// Missing or damaged (the parent), storage, invalid.
pub fn write_provisional(
    parent: HeaderFile<'_>,
    source: &PageSource,
    capture: &Digest,
    path: &Path,
) -> Result<HeaderSummary> {
    let mut reader = parent.open()?;
    check_device(source, reader.page_count())?;
    let out = NewFile::create_for(path)?.needing(header_bytes(source));
    let build = BuildRef {
        id: *capture,
        pages: source.data_pages(),
        kind: BuildKind::Capture,
    };
    let over = source.runs().iter().map(|run| {
        let target = run.position.map_or(Target::ZERO, |position| Target {
            build: NEW_BUILD,
            position,
        });
        Extent {
            page: run.page,
            length: run.pages,
            target,
        }
    });
    let summary = write_over(&mut reader, over, build, &out, |error| parent.error(error))?;
    out.sync()?;
    out.publish(path)?;
    Ok(summary)
}

/// Writes the header of `over` on top of a parent to `out`; `damaged` names the parent.
pub(crate) fn write_over<R: Read>(
    parent: &mut HeaderReader<R>,
    over: impl Iterator<Item = Extent>,
    build: BuildRef,
    out: &NewFile,
    damaged: impl Fn(FormatError) -> Error,
) -> Result<HeaderSummary> {
    let mut writer =
        HeaderWriter::new(out, parent.page_count()).map_err(|error| tell(error, out, &damaged))?;
    overwrite(parent, over.map(Ok), build, &mut writer)
        .map_err(|error| tell(error, out, &damaged))?;
    Ok(writer
        .finish()
        .map_err(|error| tell(error, out, &damaged))?
        .0)
}

/// Whether an error is of writing `out` or of reading the parent.
fn tell(error: FormatError, out: &NewFile, damaged: &impl Fn(FormatError) -> Error) -> Error {
    let error = match error {
        FormatError::Io(error) => error,
        FormatError::OutOfRange {
            part: FULL_HEADER, ..
        } => {
            return Error::Invalid(error.to_string());
        }
        _ => return damaged(error),
    };
    match WriteFailed::unmark(error) {
        Ok(cause) => out.write_failed(cause),
        Err(cause) => damaged(FormatError::Io(cause)),
    }
}

/// About how much the header of a capture takes beyond its parent's.
pub(crate) fn header_bytes(source: &PageSource) -> u64 {
    4096 + 16 * source.runs().len() as u64
}

pub(crate) fn check_device(source: &PageSource, page_count: u64) -> Result<()> {
    if source.device_pages() == page_count {
        return Ok(());
    }
    let found = source.device_pages();
    Err(Error::Invalid(format!(
        "a capture of {found} pages over a header of {page_count}"
    )))
}
