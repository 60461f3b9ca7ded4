//! The verbs that read what is stored and compare it with its digests.

use std::path::PathBuf;

use diapause_capture::check::{check, Blob};
use diapause_capture::overlay_head::check_overlay_head;
use diapause_capture::{
    rebuild, sum_device as digests_of, Error, FlatPages, FlatSums, HeaderFile, SummedBase,
};
use diapause_format::{Differ, Side};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::{detached, parse_digest};

/// More extents than this are not listed for Python.
const LISTED_EXTENTS_MAX: usize = 1_000_000;

fn blob(kind: &str, path: PathBuf, known: &str) -> PyResult<Blob> {
    match kind {
        "build" => Ok(Blob::Build(path, parse_digest(known)?)),
        "header" => Ok(Blob::Header(path, parse_digest(known)?)),
        "whole" => Ok(Blob::Whole(path, parse_digest(known)?)),
        "flat" => Ok(Blob::Flat(path, PathBuf::from(known))),
        "capture" => Ok(Blob::Capture(
            path,
            (!known.is_empty()).then(|| PathBuf::from(known)),
        )),
        "read" => Ok(Blob::Unsummed(path)),
        _ => Err(PyValueError::new_err(format!(
            "{kind:?} is no kind of blob"
        ))),
    }
}

/// What was found, and of which kind: nothing is known of what could not be read.
fn cause(error: Error) -> (String, &'static str) {
    match error {
        Error::Missing { .. } => ("it is missing".to_owned(), "missing"),
        Error::Damaged { cause, .. } => (cause, "damaged"),
        Error::Storage { cause, .. } => (format!("it could not be read: {cause}"), "unread"),
        other => (format!("it could not be read: {other}"), "unread"),
    }
}

#[pyfunction]
#[pyo3(signature = (blobs, threads = 2))]
fn check_blobs(
    py: Python<'_>,
    blobs: Vec<(String, PathBuf, String)>,
    threads: usize,
) -> PyResult<Vec<(usize, String, &'static str)>> {
    let blobs = blobs
        .into_iter()
        .map(|(kind, path, known)| blob(&kind, path, &known))
        .collect::<PyResult<Vec<_>>>()?;
    let found = py.detach(|| check(&blobs, threads));
    let told = found.into_iter().map(|(at, error)| {
        let (cause, kind) = cause(error);
        (at, cause, kind)
    });
    Ok(told.collect())
}

/// The digests that a flat file has to have.
#[pyclass(name = "DeviceSums", module = "diapause._core", frozen)]
struct PyDeviceSums(FlatSums);

#[pymethods]
impl PyDeviceSums {
    fn write(&self, py: Python<'_>, out: PathBuf) -> PyResult<()> {
        detached(py, || self.0.write(&out))
    }
}

#[pyfunction]
#[pyo3(signature = (header, digest, builds_dir, base = None, threads = 1, progress = None))]
fn sum_device(
    py: Python<'_>,
    header: PathBuf,
    digest: &str,
    builds_dir: PathBuf,
    base: Option<(PathBuf, String, PathBuf)>,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<PyDeviceSums> {
    let digest = parse_digest(digest)?;
    let base_digest = base.as_ref().map(|(_, digest, _)| parse_digest(digest));
    let base_digest = base_digest.transpose()?;
    let mut raised = None;
    let mut tell = |done, total| {
        let Some(tell) = &progress else { return true };
        let told = Python::attach(|py| tell.call1(py, (done, total)));
        raised = told.err();
        raised.is_none()
    };
    let sums = detached(py, || {
        let header = HeaderFile {
            path: &header,
            digest: &digest,
        };
        let old = match &base {
            Some((_, _, sums)) => Some(FlatSums::read(sums)?),
            None => None,
        };
        let base = match (&base, &base_digest, &old) {
            (Some((path, _, _)), Some(digest), Some(sums)) => Some(SummedBase {
                header: HeaderFile { path, digest },
                sums,
            }),
            _ => None,
        };
        digests_of(header, &builds_dir, base, threads, &mut tell)
    });
    match raised {
        Some(raised) => Err(raised),
        None => Ok(PyDeviceSums(sums?)),
    }
}

/// What a build was made again of.
#[pyclass(name = "RebuildResult", module = "diapause._core", get_all, frozen)]
struct PyRebuildResult {
    kept_frames: u64,
    packed_frames: u64,
    size_bytes: u64,
}

#[pyfunction]
fn rebuild_build(
    py: Python<'_>,
    build_id: &str,
    sources: Vec<(PathBuf, String, PathBuf, Option<PathBuf>)>,
    builds_dir: PathBuf,
    tmp_dir: PathBuf,
) -> PyResult<PyRebuildResult> {
    let id = parse_digest(build_id)?;
    let from = sources
        .into_iter()
        .map(|(header, digest, flat, sums)| {
            let header = (header, parse_digest(&digest)?);
            Ok(FlatPages { header, flat, sums })
        })
        .collect::<PyResult<Vec<_>>>()?;
    let made = detached(py, || rebuild(&id, &from, &builds_dir, &tmp_dir))?;
    Ok(PyRebuildResult {
        kept_frames: made.kept_frames,
        packed_frames: made.packed_frames,
        size_bytes: made.size_bytes,
    })
}

#[pyfunction]
#[pyo3(signature = (path, device_bytes, folding = false))]
fn check_overlay(py: Python<'_>, path: PathBuf, device_bytes: u64, folding: bool) -> PyResult<()> {
    detached(py, || check_overlay_head(&path, device_bytes, folding))
}

/// What two headers of one device map differently.
#[pyclass(name = "HeaderDifference", module = "diapause._core", get_all, frozen)]
struct PyHeaderDifference {
    changed_pages: u64,
    zeroed_pages: u64,
    extent_count: u64,
    extents: Vec<(u64, u64)>,
}

#[pyfunction]
#[pyo3(signature = (old, old_digest, new, new_digest, limit = 0))]
fn header_difference(
    py: Python<'_>,
    old: PathBuf,
    old_digest: &str,
    new: PathBuf,
    new_digest: &str,
    limit: usize,
) -> PyResult<PyHeaderDifference> {
    let (old_digest, new_digest) = (parse_digest(old_digest)?, parse_digest(new_digest)?);
    let limit = limit.min(LISTED_EXTENTS_MAX);
    detached(py, || {
        let old = HeaderFile {
            path: &old,
            digest: &old_digest,
        };
        let new = HeaderFile {
            path: &new,
            digest: &new_digest,
        };
        let (first, second) = (old.open()?, new.open()?);
        if first.page_count() != second.page_count() {
            return Err(Error::Invalid(
                "the devices are of different sizes".to_owned(),
            ));
        }
        let mut found = PyHeaderDifference {
            changed_pages: 0,
            zeroed_pages: 0,
            extent_count: 0,
            extents: Vec::new(),
        };
        let mut differ = Differ::new(first, second);
        let damaged = |side| match side {
            Side::Old(error) => old.error(error),
            Side::New(error) => new.error(error),
        };
        let mut end = None;
        while let Some(run) = differ.next_difference().map_err(damaged)? {
            found.changed_pages += run.length;
            found.zeroed_pages += if run.new.is_zero() { run.length } else { 0 };
            if end == Some(run.page) {
                if let Some(last) = found
                    .extents
                    .last_mut()
                    .filter(|last| last.0 + last.1 == run.page)
                {
                    last.1 += run.length;
                }
            } else {
                found.extent_count += 1;
                if found.extents.len() < limit {
                    found.extents.push((run.page, run.length));
                }
            }
            end = Some(run.page + run.length);
        }
        Ok(found)
    })
}

/// Adds this file's names to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyHeaderDifference>()?;
    module.add_function(wrap_pyfunction!(check_blobs, module)?)?;
    module.add_class::<PyDeviceSums>()?;
    module.add_class::<PyRebuildResult>()?;
    module.add_function(wrap_pyfunction!(sum_device, module)?)?;
    module.add_function(wrap_pyfunction!(rebuild_build, module)?)?;
    module.add_function(wrap_pyfunction!(check_overlay, module)?)?;
    module.add_function(wrap_pyfunction!(header_difference, module)?)
}
