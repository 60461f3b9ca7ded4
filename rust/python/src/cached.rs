//! What the page cache has of files that another process has open.

use diapause_capture::cached;
use pyo3::prelude::*;

#[pyfunction]
fn cached_bytes(py: Python<'_>, pid: i32, names: Vec<String>) -> PyResult<Vec<Option<u64>>> {
    Ok(py.detach(|| cached::cached_bytes(pid, &names))?)
}

/// Adds this file's names to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cached_bytes, module)?)
}
