//! The verbs that store what a capture took.

use std::path::PathBuf;

use diapause_capture::{Error, HeaderFile, Packed, Places, Progress};
use diapause_format::{hex, BuildKind};
use pyo3::prelude::*;

use crate::capture_file::PyPageSource;
use crate::errors::{parse_digest, to_python};
use crate::header::list_builds;

/// What a pack stored.
#[pyclass(name = "PackResult", module = "diapause._core", get_all, frozen)]
struct PyPackResult {
    build_id: Option<String>,
    header_digest: String,
    header_bytes: u64,
    stored_pages: u64,
    zero_pages: u64,
    unchanged_pages: u64,
    stored_bytes: u64,
    builds: Vec<(String, u64)>,
    extent_count: u64,
}

impl From<Packed> for PyPackResult {
    fn from(packed: Packed) -> Self {
        Self {
            build_id: packed.build.map(|build| hex(&build.id)),
            header_digest: hex(&packed.header.digest),
            header_bytes: packed.header.size_bytes,
            stored_pages: packed.build.map_or(0, |build| build.page_count),
            zero_pages: packed.zero_pages,
            unchanged_pages: packed.unchanged_pages,
            stored_bytes: packed.build.map_or(0, |build| build.size_bytes),
            builds: list_builds(&packed.header.builds, BuildKind::Packed),
            extent_count: packed.header.extent_count,
        }
    }
}

/// Runs `work` without the GIL; takes it back for each call of the progress function, and raises
/// what that raised.
fn with_progress(
    py: Python<'_>,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(Progress<'_>) -> Result<Packed, Error> + Send,
) -> PyResult<PyPackResult> {
    let mut raised = None;
    let done = py.detach(|| {
        work(&mut |done, total| {
            let Some(tell) = &progress else { return true };
            let told = Python::attach(|py| tell.call1(py, (done, total)));
            raised = told.err();
            raised.is_none()
        })
    });
    match (done, raised) {
        (_, Some(raised)) => Err(raised),
        (Ok(packed), None) => Ok(packed.into()),
        (Err(error), None) => Err(to_python(py, error)),
    }
}

#[pyfunction]
#[pyo3(signature = (
    source, parent_header, parent_digest, builds_dir, tmp_dir, header_out, parent_flat = None,
    progress = None
))]
#[allow(
    clippy::too_many_arguments,
    reason = "they are the keywords of the Python function"
)]
fn pack(
    py: Python<'_>,
    source: &PyPageSource,
    parent_header: PathBuf,
    parent_digest: &str,
    builds_dir: PathBuf,
    tmp_dir: PathBuf,
    header_out: PathBuf,
    parent_flat: Option<PathBuf>,
    progress: Option<Py<PyAny>>,
) -> PyResult<PyPackResult> {
    let digest = parse_digest(parent_digest)?;
    let source = source.get();
    with_progress(py, progress, |progress| {
        let parent = HeaderFile {
            path: &parent_header,
            digest: &digest,
        };
        let places = Places {
            builds: &builds_dir,
            tmp: &tmp_dir,
            header_out: &header_out,
        };
        diapause_capture::pack(source, parent, parent_flat.as_deref(), places, progress)
    })
}

#[pyfunction]
#[pyo3(signature = (path, page_count, builds_dir, tmp_dir, header_out, progress = None))]
fn pack_file(
    py: Python<'_>,
    path: PathBuf,
    page_count: u64,
    builds_dir: PathBuf,
    tmp_dir: PathBuf,
    header_out: PathBuf,
    progress: Option<Py<PyAny>>,
) -> PyResult<PyPackResult> {
    with_progress(py, progress, |progress| {
        let places = Places {
            builds: &builds_dir,
            tmp: &tmp_dir,
            header_out: &header_out,
        };
        diapause_capture::pack_file(&path, page_count, places, progress)
    })
}

/// Adds this file's names to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyPackResult>()?;
    module.add_function(wrap_pyfunction!(pack, module)?)?;
    module.add_function(wrap_pyfunction!(pack_file, module)?)
}
