//! The verbs of captures: page sources, and finishing a capture file from its buffer.

use std::path::PathBuf;
use std::sync::Arc;

use diapause_capture::PageSource;
use diapause_format::capture_file::{CaptureHead, CaptureLayout};
use diapause_format::PAGE_SIZE;
use pyo3::prelude::*;

use crate::errors::detached;

/// The pages that one capture took of one device.
#[pyclass(name = "PageSource", module = "diapause._core", frozen)]
pub(crate) struct PyPageSource(Arc<PageSource>);

impl PyPageSource {
    pub(crate) fn get(&self) -> &PageSource {
        &self.0
    }

    pub(crate) fn share(&self) -> Arc<PageSource> {
        self.0.clone()
    }
}

#[pymethods]
impl PyPageSource {
    #[staticmethod]
    #[pyo3(signature = (path, spill = None))]
    fn capture(py: Python<'_>, path: PathBuf, spill: Option<PathBuf>) -> PyResult<Self> {
        let source = detached(py, || PageSource::capture(&path, spill.as_deref()))?;
        Ok(Self(Arc::new(source)))
    }

    #[staticmethod]
    fn overlay(py: Python<'_>, path: PathBuf, map_json: &[u8], page_count: u64) -> PyResult<Self> {
        let source = detached(py, || PageSource::overlay(&path, map_json, page_count))?;
        Ok(Self(Arc::new(source)))
    }

    #[getter]
    fn device_pages(&self) -> u64 {
        self.0.device_pages()
    }

    #[getter]
    fn page_count(&self) -> u64 {
        self.0.captured_pages()
    }

    fn runs(&self) -> Vec<(u64, u64)> {
        let runs = self.0.runs().iter();
        runs.map(|run| (run.page, run.pages)).collect()
    }

    #[getter]
    fn bytes(&self) -> u64 {
        self.0.data_pages() * PAGE_SIZE as u64
    }
}

/// What the head of a capture file or buffer says.
#[pyclass(name = "CaptureInfo", module = "diapause._core", get_all, frozen)]
pub(crate) struct PyCaptureInfo {
    sealed: bool,
    device_pages: u64,
    captured_pages: u64,
    capacity: u64,
    size_bytes: u64,
}

impl From<CaptureHead> for PyCaptureInfo {
    fn from(head: CaptureHead) -> Self {
        Self {
            sealed: head.sealed,
            device_pages: head.device_pages,
            captured_pages: head.captured,
            capacity: head.capacity,
            size_bytes: CaptureLayout::for_pages(head.capacity).size_bytes,
        }
    }
}

#[pyfunction]
fn write_out(py: Python<'_>, buffer: PathBuf, out: PathBuf) -> PyResult<PyCaptureInfo> {
    Ok(detached(py, || diapause_capture::write_out(&buffer, &out))?.into())
}

#[pyfunction]
fn capture_info(py: Python<'_>, path: PathBuf) -> PyResult<PyCaptureInfo> {
    Ok(detached(py, || diapause_capture::read_head(&path))?
        .0
        .into())
}

/// Adds this file's names to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyPageSource>()?;
    module.add_class::<PyCaptureInfo>()?;
    module.add_function(wrap_pyfunction!(write_out, module)?)?;
    module.add_function(wrap_pyfunction!(capture_info, module)?)
}
