//! `diapause._core`: the data plane as Python sees it, one file per verb.
//!
//! Bytes never pass through the interpreter one page at a time; the GIL is released around all I/O.
#![deny(unsafe_code)]

mod archive;
mod cached;
mod capture_file;
mod check;
mod errors;
mod freeze;
mod header;
mod materialize;
mod pack;
mod timed;

use pyo3::prelude::*;

/// The data plane of Diapause.
#[pymodule(gil_used = false)]
#[pyo3(name = "_core")]
fn core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("PAGE_SIZE", 4096)?;
    module.add("FRAME_PAGES", 16)?;
    archive::register(module)?;
    cached::register(module)?;
    capture_file::register(module)?;
    check::register(module)?;
    freeze::register(module)?;
    header::register(module)?;
    materialize::register(module)?;
    pack::register(module)?;
    timed::register(module)
}
