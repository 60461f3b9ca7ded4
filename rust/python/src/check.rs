//! The verbs that read what is stored and compare it with its digests.

use std::path::PathBuf;

use diapause_capture::check::{check, Blob};
use diapause_capture::{Error, FlatSums, HeaderFile};
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
        _ => Err(PyValueError::new_err(format!(
            "{kind:?} is no kind of blob"
        ))),
    }
}

fn cause(error: Error) -> (String, bool) {
    match error {
        Error::Missing { .. } => ("it is missing".to_owned(), true),
        Error::Damaged { cause, .. } => (cause, false),
        other => (other.to_string(), false),
    }
}

#[pyfunction]
#[pyo3(signature = (blobs, threads = 2))]
fn check_blobs(
    py: Python<'_>,
    blobs: Vec<(String, PathBuf, String)>,
    threads: usize,
) -> PyResult<Vec<(usize, String, bool)>> {
    let blobs = blobs
        .into_iter()
        .map(|(kind, path, known)| blob(&kind, path, &known))
        .collect::<PyResult<Vec<_>>>()?;
    let found = py.detach(|| check(&blobs, threads));
    let told = found.into_iter().map(|(at, error)| {
        let (cause, missing) = cause(error);
        (at, cause, missing)
    });
    Ok(told.collect())
}

#[pyfunction]
#[pyo3(signature = (flat, out, threads = 1))]
fn sum_flat(py: Python<'_>, flat: PathBuf, out: PathBuf, threads: usize) -> PyResult<u64> {
    detached(py, || {
        let (sums, read_bytes) = FlatSums::of(&flat, threads)?;
        sums.write(&out)?;
        Ok(read_bytes)
    })
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
    module.add_function(wrap_pyfunction!(sum_flat, module)?)?;
    module.add_function(wrap_pyfunction!(header_difference, module)?)
}
