//! The verbs of headers: make one, verify one, look something up.

use std::path::PathBuf;

use diapause_capture::{write_provisional, write_zero_header, Error, HeaderFile};
use diapause_format::{
    hex, BuildKind, BuildRef, Digest, Extent, HeaderIndex, HeaderSummary, Target,
};
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;

use crate::capture_file::PyPageSource;
use crate::errors::{detached, parse_digest};

/// More extents than this are not listed for Python.
const LISTED_EXTENTS_MAX: u64 = 1_000_000;

/// What a verified header says.
#[pyclass(name = "HeaderInfo", module = "diapause._core", get_all, frozen)]
pub(crate) struct PyHeaderInfo {
    page_count: u64,
    extent_count: u64,
    mapped_pages: u64,
    builds: Vec<(String, u64)>,
    captures: Vec<(String, u64)>,
    digest: String,
    size_bytes: u64,
}

/// The builds of one kind as (id, pages).
pub(crate) fn list_builds(builds: &[BuildRef], kind: BuildKind) -> Vec<(String, u64)> {
    let of_kind = builds.iter().filter(|build| build.kind == kind);
    of_kind.map(|build| (hex(&build.id), build.pages)).collect()
}

impl From<HeaderSummary> for PyHeaderInfo {
    fn from(summary: HeaderSummary) -> Self {
        Self {
            page_count: summary.page_count,
            extent_count: summary.extent_count,
            mapped_pages: summary.mapped_pages,
            builds: list_builds(&summary.builds, BuildKind::Packed),
            captures: list_builds(&summary.builds, BuildKind::Capture),
            digest: hex(&summary.digest),
            size_bytes: summary.size_bytes,
        }
    }
}

#[pyfunction]
fn zero_header(py: Python<'_>, path: PathBuf, page_count: u64) -> PyResult<String> {
    Ok(hex(
        &detached(py, || write_zero_header(&path, page_count))?.digest
    ))
}

#[pyfunction]
fn provisional_header(
    py: Python<'_>,
    parent_header: PathBuf,
    parent_digest: &str,
    source: &PyPageSource,
    capture_id: &str,
    out: PathBuf,
) -> PyResult<PyHeaderInfo> {
    let (digest, capture) = (parse_digest(parent_digest)?, parse_digest(capture_id)?);
    let parent = HeaderFile {
        path: &parent_header,
        digest: &digest,
    };
    let source = source.get();
    Ok(detached(py, || write_provisional(parent, source, &capture, &out))?.into())
}

#[pyfunction]
fn header_info(py: Python<'_>, path: PathBuf, digest: &str) -> PyResult<PyHeaderInfo> {
    let digest = parse_digest(digest)?;
    let header = HeaderFile {
        path: &path,
        digest: &digest,
    };
    let summary = detached(py, || {
        header.open()?.finish().map_err(|error| header.error(error))
    })?;
    Ok(summary.into())
}

fn load(py: Python<'_>, path: PathBuf, digest: &Digest) -> PyResult<HeaderIndex> {
    let header = HeaderFile {
        path: &path,
        digest,
    };
    detached(py, || {
        HeaderIndex::load(header.open()?).map_err(|error| header.error(error))
    })
}

fn name_of(index: &HeaderIndex, target: Target) -> Option<String> {
    (!target.is_zero()).then(|| hex(&index.build(target.build).id))
}

type ListedExtent = (u64, u64, Option<String>, u64);

#[pyfunction]
fn header_extents(py: Python<'_>, path: PathBuf, digest: &str) -> PyResult<Vec<ListedExtent>> {
    let index = load(py, path, &parse_digest(digest)?)?;
    let count = index.summary().extent_count;
    if count > LISTED_EXTENTS_MAX {
        return Err(PyValueError::new_err(format!(
            "{count} extents are too many to list"
        )));
    }
    let listed = |extent: Extent| {
        (
            extent.page,
            extent.length,
            name_of(&index, extent.target),
            extent.target.position,
        )
    };
    Ok(index.extents().map(listed).collect())
}

#[pyfunction]
fn lookup(
    py: Python<'_>,
    path: PathBuf,
    digest: &str,
    page: u64,
) -> PyResult<Option<(String, u64)>> {
    let index = load(py, path, &parse_digest(digest)?)?;
    let target = index.lookup(page);
    let target = target.ok_or_else(|| PyIndexError::new_err(format!("there is no page {page}")))?;
    Ok(name_of(&index, target).map(|name| (name, target.position)))
}

#[pyfunction]
fn verify_build(py: Python<'_>, path: PathBuf, build_id: &str) -> PyResult<u64> {
    let id = parse_digest(build_id)?;
    detached(py, || diapause_capture::verify_build(&path, &id))
}

#[pyfunction]
fn blake3_file(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    let digest = detached(py, || -> Result<Digest, Error> {
        diapause_capture::digest_file(&path)
    });
    Ok(hex(&digest?))
}

#[pyfunction]
fn blake3_bytes(py: Python<'_>, data: &[u8]) -> String {
    py.detach(|| hex(&diapause_format::digest(data)))
}

/// Adds this file's names to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyHeaderInfo>()?;
    module.add_function(wrap_pyfunction!(zero_header, module)?)?;
    module.add_function(wrap_pyfunction!(provisional_header, module)?)?;
    module.add_function(wrap_pyfunction!(header_info, module)?)?;
    module.add_function(wrap_pyfunction!(header_extents, module)?)?;
    module.add_function(wrap_pyfunction!(lookup, module)?)?;
    module.add_function(wrap_pyfunction!(verify_build, module)?)?;
    module.add_function(wrap_pyfunction!(blake3_file, module)?)?;
    module.add_function(wrap_pyfunction!(blake3_bytes, module)?)
}
