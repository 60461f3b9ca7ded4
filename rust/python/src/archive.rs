//! The host's end of a copy: a tree as a stream on a descriptor, and back.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::os::fd::{BorrowedFd, RawFd};
use std::path::{Path, PathBuf};

use diapause_archive::{Bounds, Error, Placed, Progress, Special, Summary, Trust};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::{is_full, named, no_space};

const BUFFER_BYTES: usize = 64 << 10;
/// The progress function takes the interpreter's lock, so it is not called for every piece.
const TELL_EVERY_BYTES: u64 = 1 << 20;

/// What was copied.
#[pyclass(name = "ArchiveSummary", module = "diapause._core", get_all, frozen)]
struct PySummary {
    entries: u64,
    bytes: u64,
    notes: Vec<String>,
    more_notes: u64,
}

impl From<Summary> for PySummary {
    fn from(summary: Summary) -> Self {
        Self {
            entries: summary.entries,
            bytes: summary.bytes,
            notes: summary.notes,
            more_notes: summary.more_notes,
        }
    }
}

fn to_python(py: Python<'_>, error: Error, place: &Path) -> PyErr {
    let (path, cause) = (error.path(), error.cause());
    match error {
        Error::Refused { .. } => {
            named(py, "ArchiveRefused", &[("entry", &path), ("cause", &cause)])
        }
        Error::File { cause, .. } if is_full(&cause) => no_space(py, place, 0),
        Error::TooLarge(_) => named(py, "RootfsTooLarge", &[("cause", &cause)]),
        _ => named(py, "CopyFailed", &[("what", &path), ("cause", &cause)]),
    }
}

/// A file of our own on the caller's descriptor, so that neither closes the other's.
#[allow(unsafe_code)]
fn own(descriptor: RawFd) -> PyResult<File> {
    if descriptor < 0 {
        return Err(PyValueError::new_err("a descriptor is not negative"));
    }
    // SAFETY: it is not negative, the caller keeps it open during the call, and it is borrowed for
    // as long as it takes to duplicate it; the kernel refuses one that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    Ok(File::from(borrowed.try_clone_to_owned()?))
}

/// Runs `work` without the GIL; takes it back for some calls of the progress function.
fn with_progress<T: Send>(
    py: Python<'_>,
    place: &Path,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(Progress<'_>) -> Result<T, Error> + Send,
) -> PyResult<T> {
    let mut raised = None;
    let mut told = 0u64;
    let done = py.detach(|| {
        work(&mut |bytes, total| {
            let Some(tell) = &progress else { return true };
            if bytes < told {
                return true;
            }
            told = bytes + TELL_EVERY_BYTES;
            raised = Python::attach(|py| tell.call1(py, (bytes, total))).err();
            raised.is_none()
        })
    });
    match (done, raised) {
        (_, Some(raised)) => Err(raised),
        (Ok(done), None) => Ok(done),
        (Err(error), None) => Err(to_python(py, error, place)),
    }
}

#[pyfunction]
#[pyo3(signature = (path, top, descriptor, progress = None))]
fn archive_pack(
    py: Python<'_>,
    path: PathBuf,
    top: &[u8],
    descriptor: RawFd,
    progress: Option<Py<PyAny>>,
) -> PyResult<PySummary> {
    let out = BufWriter::with_capacity(BUFFER_BYTES, own(descriptor)?);
    with_progress(py, &path, progress, |progress| {
        diapause_archive::pack(&path, top, out, progress)
    })
    .map(PySummary::from)
}

#[pyfunction]
#[pyo3(signature = (descriptor, path, name = None, progress = None))]
fn archive_unpack(
    py: Python<'_>,
    descriptor: RawFd,
    path: PathBuf,
    name: Option<&[u8]>,
    progress: Option<Py<PyAny>>,
) -> PyResult<PySummary> {
    let input = BufReader::with_capacity(BUFFER_BYTES, own(descriptor)?);
    with_progress(py, &path, progress, |progress| {
        diapause_archive::unpack(input, &path, name, Trust::NoSetId, progress)
    })
    .map(PySummary::from)
}

/// An entry of an image of which its file does not say everything.
#[pyclass(name = "RootfsEntry", module = "diapause._core", get_all, frozen)]
struct PyPlaced {
    path: Py<PyBytes>,
    mode: u32,
    uid: u32,
    gid: u32,
    /// The letter that debugfs has for it and its numbers; None for what a file was made for.
    special: Option<(char, u32, u32)>,
    attributes: Vec<(String, Py<PyBytes>)>,
}

impl PyPlaced {
    fn new(py: Python<'_>, placed: Placed) -> Self {
        let attribute = |(name, value): (Vec<u8>, Vec<u8>)| {
            let name = String::from_utf8_lossy(&name).into_owned(); // ASCII, as the crate says
            (name, PyBytes::new(py, &value).unbind())
        };
        Self {
            path: PyBytes::new(py, &placed.path).unbind(),
            mode: placed.mode,
            uid: placed.uid,
            gid: placed.gid,
            special: placed.special.map(|special| match special {
                Special::Character(major, minor) => ('c', major, minor),
                Special::Block(major, minor) => ('b', major, minor),
                Special::Pipe => ('p', 0, 0),
            }),
            attributes: placed.attributes.into_iter().map(attribute).collect(),
        }
    }
}

#[pyfunction]
#[pyo3(signature = (descriptor, path, bytes_max, entries_max, progress = None))]
fn rootfs_unpack(
    py: Python<'_>,
    descriptor: RawFd,
    path: PathBuf,
    bytes_max: u64,
    entries_max: u64,
    progress: Option<Py<PyAny>>,
) -> PyResult<(PySummary, Vec<PyPlaced>)> {
    let input = BufReader::with_capacity(BUFFER_BYTES, own(descriptor)?);
    let bounds = Bounds {
        bytes: bytes_max,
        entries: entries_max,
    };
    let (summary, placed) = with_progress(py, &path, progress, |progress| {
        diapause_archive::unpack_rootfs(input, &path, bounds, progress)
    })?;
    let placed = placed.into_iter().map(|one| PyPlaced::new(py, one));
    Ok((summary.into(), placed.collect()))
}

/// Adds this file's names to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PySummary>()?;
    module.add_class::<PyPlaced>()?;
    module.add_function(wrap_pyfunction!(rootfs_unpack, module)?)?;
    module.add_function(wrap_pyfunction!(archive_pack, module)?)?;
    module.add_function(wrap_pyfunction!(archive_unpack, module)?)
}
