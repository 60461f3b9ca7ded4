//! The verbs of the frozen section: guest RAM of a VMM, and the buffer that its pages go to.

use std::fs::File;
use std::path::PathBuf;
use std::time::Instant;

use diapause_capture::buffer::{CaptureBuffer, Filled};
use diapause_capture::scan::{self, DirtyRule, MemoryFile, RamRange, Run};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Guest RAM as it lies in a VMM process.
#[pyclass(name = "GuestRam", module = "diapause._core", frozen)]
struct PyGuestRam {
    pid: i32,
    ram: RamRange,
    pagemap: File,
    tracked: bool,
}

fn rule_of(name: &str) -> PyResult<DirtyRule> {
    match name {
        // Compared pages are the anonymous ones: under armed tracking that is a superset of what
        // was written, and packing drops those that are the parent's.
        "private" | "compared" => Ok(DirtyRule::Private),
        "tracked" => Ok(DirtyRule::Tracked),
        _ => Err(PyValueError::new_err(format!(
            "{name:?} is no dirty source"
        ))),
    }
}

#[pymethods]
impl PyGuestRam {
    #[new]
    fn new(pid: i32, memory: &str, size_bytes: u64) -> PyResult<Self> {
        let ram = scan::find_ram(pid, &MemoryFile::at(memory)?, size_bytes)?;
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        let tracked = scan::is_tracked(&pagemap, ram)?;
        Ok(Self {
            pid,
            ram,
            pagemap,
            tracked,
        })
    }

    #[getter]
    fn tracked(&self) -> bool {
        self.tracked
    }

    #[getter]
    fn page_count(&self) -> u64 {
        self.ram.page_count()
    }

    fn estimate(&self, py: Python<'_>, rule: &str) -> PyResult<u64> {
        Ok(scan::count_pages(&self.runs(py, rule)?))
    }

    fn dirty_runs(&self, py: Python<'_>, rule: &str) -> PyResult<Vec<(u64, u64)>> {
        Ok(self
            .runs(py, rule)?
            .iter()
            .map(|run| (run.first, run.count))
            .collect())
    }

    fn rearm(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| scan::rearm(&self.pagemap, self.ram))?)
    }
}

impl PyGuestRam {
    fn runs(&self, py: Python<'_>, rule: &str) -> PyResult<Vec<Run>> {
        let rule = rule_of(rule)?;
        Ok(py.detach(|| scan::dirty_runs(&self.pagemap, self.ram, rule))?)
    }
}

/// A buffer on tmpfs for one capture of guest RAM.
#[pyclass(name = "CaptureBuffer", module = "diapause._core")]
struct PyCaptureBuffer {
    buffer: CaptureBuffer,
    path: PathBuf,
}

/// What a filled buffer holds; times in milliseconds.
#[pyclass(name = "Filled", module = "diapause._core", get_all, frozen)]
struct PyFilled {
    page_count: u64,
    spilled_pages: u64,
    scan_ms: f64,
    copy_ms: f64,
    spill_ms: f64,
}

#[pymethods]
impl PyCaptureBuffer {
    #[new]
    fn new(py: Python<'_>, path: PathBuf, capacity: u64, device_pages: u64) -> PyResult<Self> {
        let buffer = py.detach(|| CaptureBuffer::make(&path, capacity, device_pages))?;
        Ok(Self { buffer, path })
    }

    #[getter]
    fn path(&self) -> PathBuf {
        self.path.clone()
    }

    #[getter]
    fn capacity(&self) -> u64 {
        self.buffer.capacity()
    }

    fn fill(
        &mut self,
        py: Python<'_>,
        ram: &PyGuestRam,
        rule: &str,
        unmerged: Vec<(u64, u64)>,
        spill: PathBuf,
    ) -> PyResult<PyFilled> {
        let began = Instant::now();
        let mut runs = ram.runs(py, rule)?;
        if !unmerged.is_empty() {
            let earlier: Vec<Run> = unmerged
                .into_iter()
                .map(|(first, count)| Run { first, count })
                .collect();
            runs = scan::merge_runs(&runs, &earlier);
        }
        if runs
            .last()
            .is_some_and(|run| run.first + run.count > ram.ram.page_count())
        {
            return Err(PyValueError::new_err(
                "a run lies behind the end of guest RAM",
            ));
        }
        let scanned = began.elapsed();
        let filled = py.detach(|| self.buffer.fill(ram.pid, ram.ram, &runs, &spill))?;
        Ok(as_python(filled, scanned.as_secs_f64() * 1e3))
    }
}

fn as_python(filled: Filled, scan_ms: f64) -> PyFilled {
    PyFilled {
        page_count: filled.page_count,
        spilled_pages: filled.spilled_pages,
        scan_ms,
        copy_ms: filled.copy.as_secs_f64() * 1e3,
        spill_ms: filled.spill.as_secs_f64() * 1e3,
    }
}

/// Adds this file's names to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyGuestRam>()?;
    module.add_class::<PyCaptureBuffer>()?;
    module.add_class::<PyFilled>()
}
