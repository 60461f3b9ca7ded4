//! `diapause-agent pack` and `unpack`: the guest's end of a copy, run like any other command.
//!
//! The stream is on standard output or input. Standard error is one line of JSON at the end, which
//! the host reads under a limit and takes for what a guest says.

use std::fs::File;
use std::io::{self, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use diapause_archive::{pack, unpack, Error, Summary, Trust};
use serde::Serialize;

/// What is to be copied, and where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Copy {
    /// Writes `path` as a stream under the name `top`.
    Pack {
        /// What to read.
        path: PathBuf,
        /// Its name in the stream; `.` for a directory's contents.
        top: String,
    },
    /// Puts a stream at `path`.
    Unpack {
        /// Where to write.
        path: PathBuf,
        /// The name it gets where `path` is a directory; none for a directory's contents.
        name: Option<String>,
    },
}

#[derive(Serialize)]
struct Report {
    entries: u64,
    bytes: u64,
    notes: Vec<String>,
    more_notes: u64,
    error: Option<Failure>,
}

#[derive(Serialize)]
struct Failure {
    kind: &'static str,
    path: String,
    cause: String,
}

/// Copies, reports on standard error, and says how it ended.
pub fn run(copy: &Copy) -> ExitCode {
    // Unbuffered: the buffer of `std` flushes at every line end.
    // SAFETY: both are open, as std opens missing ones at its start, and neither is closed here.
    let (input, output) = unsafe {
        (
            ManuallyDrop::new(File::from(OwnedFd::from_raw_fd(0))),
            ManuallyDrop::new(File::from(OwnedFd::from_raw_fd(1))),
        )
    };
    let mut silent = |_, _| true;
    let done = match copy {
        Copy::Pack { path, top } => {
            let out = io::BufWriter::with_capacity(64 << 10, &*output);
            pack(path, top.as_bytes(), out, &mut silent)
        }
        Copy::Unpack { path, name } => {
            let name = name.as_deref().map(str::as_bytes);
            let from = io::BufReader::with_capacity(64 << 10, &*input);
            unpack(from, path, name, Trust::Full, &mut silent)
        }
    };
    report(done)
}

fn report(done: Result<Summary, Error>) -> ExitCode {
    let (summary, error) = match done {
        Ok(summary) => (summary, None),
        Err(error) => (Summary::default(), Some(error)),
    };
    let code = if error.is_none() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    };
    let report = Report {
        entries: summary.entries,
        bytes: summary.bytes,
        notes: summary.notes,
        more_notes: summary.more_notes,
        error: error.map(|error| Failure {
            kind: error.kind(),
            path: error.path(),
            cause: error.cause(),
        }),
    };
    let line = serde_json::to_string(&report).unwrap_or_default();
    let _ = writeln!(io::stderr(), "{line}");
    code
}
