//! The verb that puts a device together as a plain file.

use std::collections::HashMap;
use std::path::PathBuf;

use diapause_capture::{Base, Captures, HeaderFile, Materialized, Request};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::capture_file::PyPageSource;
use crate::errors::{detached, parse_digest};

/// More threads than this help nobody.
const THREADS_MAX: usize = 64;

/// What a materialize wrote.
#[pyclass(name = "MaterializeResult", module = "diapause._core", get_all, frozen)]
struct PyMaterializeResult {
    written_bytes: u64,
    copied_bytes: u64,
    verified_frames: u64,
}

impl From<Materialized> for PyMaterializeResult {
    fn from(done: Materialized) -> Self {
        Self {
            written_bytes: done.written_bytes,
            copied_bytes: done.copied_bytes,
            verified_frames: done.verified_frames,
        }
    }
}

fn share_captures(
    captures: Option<HashMap<String, PyRef<'_, PyPageSource>>>,
) -> PyResult<Captures> {
    let mut shared = Captures::new();
    for (id, source) in captures.unwrap_or_default() {
        shared.insert(parse_digest(&id)?, source.share());
    }
    Ok(shared)
}

#[pyfunction]
#[pyo3(signature = (
    header, digest, builds_dir, out, captures = None, base = None, threads = 2, sync = false
))]
#[allow(
    clippy::too_many_arguments,
    reason = "they are the keywords of the Python function"
)]
fn materialize(
    py: Python<'_>,
    header: PathBuf,
    digest: &str,
    builds_dir: PathBuf,
    out: PathBuf,
    captures: Option<HashMap<String, PyRef<'_, PyPageSource>>>,
    base: Option<(PathBuf, PathBuf, String)>,
    threads: usize,
    sync: bool,
) -> PyResult<PyMaterializeResult> {
    if threads == 0 || threads > THREADS_MAX {
        return Err(PyValueError::new_err(format!("{threads} threads")));
    }
    let digest = parse_digest(digest)?;
    let captures = share_captures(captures)?;
    let base_digest = base
        .as_ref()
        .map(|(_, _, digest)| parse_digest(digest))
        .transpose()?;
    let base = base
        .as_ref()
        .zip(base_digest.as_ref())
        .map(|((flat, path, _), digest)| Base {
            flat,
            header: HeaderFile { path, digest },
        });
    let header = HeaderFile {
        path: &header,
        digest: &digest,
    };
    let (builds, out) = (&builds_dir, &out);
    let done = detached(py, || {
        diapause_capture::materialize(Request {
            header,
            builds,
            captures,
            base,
            threads,
            out,
            sync,
        })
    })?;
    Ok(done.into())
}

/// Adds this file's names to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyMaterializeResult>()?;
    module.add_function(wrap_pyfunction!(materialize, module)?)
}
