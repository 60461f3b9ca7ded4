//! The verbs of pack.

use pyo3::prelude::*;

/// Adds this file's names to the module.
pub(crate) fn register(_module: &Bound<'_, PyModule>) -> PyResult<()> {
    Ok(())
}
