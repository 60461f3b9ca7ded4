//! Errors of the data plane as the classes of `diapause.errors`.

use std::path::Path;

use diapause_capture::Error;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The Python exception for an error, or the one that its import raised instead.
pub(crate) fn to_python(py: Python<'_>, error: Error) -> PyErr {
    match error {
        Error::Damaged { blob, cause } => {
            named(py, "BlobDamaged", &[("blob", &blob), ("cause", &cause)])
        }
        Error::Missing { blob } => named(py, "BlobMissing", &[("blob", &blob)]),
        Error::Storage {
            path,
            needed_bytes,
            cause,
        } if is_full(&cause) => no_space(py, &path, needed_bytes),
        Error::Storage { path, cause, .. } => {
            let what = path.display().to_string();
            named(
                py,
                "StorageFailed",
                &[("what", &what), ("cause", &cause.to_string())],
            )
        }
        Error::Invalid(what) => PyValueError::new_err(what),
        // Whoever passed the progress function raises what that raised.
        Error::Stopped => PyValueError::new_err("stopped"),
    }
}

pub(crate) fn is_full(cause: &std::io::Error) -> bool {
    matches!(
        cause.kind(),
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
    )
}

pub(crate) fn no_space(py: Python<'_>, path: &Path, needed_bytes: u64) -> PyErr {
    let directory = path
        .parent()
        .unwrap_or(Path::new("."))
        .display()
        .to_string();
    let raised = || -> PyResult<PyErr> {
        let fields = PyDict::new(py);
        fields.set_item("what", path.display().to_string())?;
        fields.set_item("needed_bytes", needed_bytes)?;
        fields.set_item("available_bytes", available(py, &directory)?)?;
        fields.set_item("directory", &directory)?;
        raise(py, "NotEnoughSpace", &fields)
    };
    raised().unwrap_or_else(|failed| failed)
}

fn available(py: Python<'_>, directory: &str) -> PyResult<u64> {
    let usage = py
        .import("shutil")?
        .call_method1("disk_usage", (directory,))?;
    usage.getattr("free")?.extract()
}

pub(crate) fn named(py: Python<'_>, class: &str, texts: &[(&str, &str)]) -> PyErr {
    let raised = || -> PyResult<PyErr> {
        let fields = PyDict::new(py);
        for (name, text) in texts {
            fields.set_item(name, text)?;
        }
        raise(py, class, &fields)
    };
    raised().unwrap_or_else(|failed| failed)
}

fn raise(py: Python<'_>, class: &str, fields: &Bound<'_, PyDict>) -> PyResult<PyErr> {
    let class = py.import("diapause.errors")?.getattr(class)?;
    Ok(PyErr::from_value(class.call((), Some(fields))?))
}

/// Runs `work` without the GIL and turns its error.
pub(crate) fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> PyResult<T> {
    py.detach(work).map_err(|error| to_python(py, error))
}

/// Reads a digest or id: 64 lower-case hex digits.
pub(crate) fn parse_digest(text: &str) -> PyResult<diapause_format::Digest> {
    let parsed = diapause_format::parse_hex32(text);
    parsed.ok_or_else(|| PyValueError::new_err(format!("{text:?} is not 64 lower-case hex digits")))
}
