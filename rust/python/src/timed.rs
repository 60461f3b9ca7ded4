//! How long reads and touches of a file take.

use std::path::PathBuf;
use std::time::Duration;

use diapause_capture::timed::{read_through, touch, Cache};
use pyo3::prelude::*;

#[pyfunction]
#[pyo3(signature = (path, *, warm))]
fn time_reading(py: Python<'_>, path: PathBuf, warm: bool) -> PyResult<f64> {
    Ok(ms(py.detach(|| read_through(&path, cache(warm)))?))
}

#[pyfunction]
#[pyo3(signature = (path, offsets, length, *, random, warm))]
fn time_touches(
    py: Python<'_>,
    path: PathBuf,
    offsets: Vec<u64>,
    length: u64,
    random: bool,
    warm: bool,
) -> PyResult<Vec<f64>> {
    let took = py.detach(|| touch(&path, &offsets, length, random, cache(warm)))?;
    Ok(took.into_iter().map(|one| ms(one) * 1000.0).collect())
}

fn cache(warm: bool) -> Cache {
    if warm {
        Cache::Warm
    } else {
        Cache::Dropped
    }
}

fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1000.0
}

/// Adds this file's names to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(time_reading, module)?)?;
    module.add_function(wrap_pyfunction!(time_touches, module)?)
}
