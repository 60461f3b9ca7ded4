//! What the page cache has of files that another process has open.

use diapause_capture::cached;
use pyo3::prelude::*;

/// Bytes, where they can be told, and whether the file is passed through.
type Cached = (Option<u64>, bool);

#[pyfunction]
fn cached_bytes(
    py: Python<'_>,
    pid: i32,
    files: Vec<(String, String)>,
) -> PyResult<Vec<Option<Cached>>> {
    let found = py.detach(|| cached::cached_bytes(pid, &files))?;
    let found = found.into_iter();
    Ok(found
        .map(|one| one.map(|of| (of.bytes, of.passed)))
        .collect())
}

/// Adds this file's names to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cached_bytes, module)?)
}
