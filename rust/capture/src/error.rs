//! Errors of the data plane: each names the blob or the file that it is about.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use diapause_format::FormatError;

/// The result of work on blobs.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, and with which blob or file.
#[derive(Debug)]
pub enum Error {
    /// A blob's bytes are not what its name or its digest says.
    Damaged {
        /// The digest that names it, or the path of a capture.
        blob: String,
        /// What was found.
        cause: String,
    },
    /// There is no such blob.
    Missing {
        /// The digest that names it, or its path.
        blob: String,
    },
    /// The file system refused.
    Storage {
        /// The file that was written or read.
        path: PathBuf,
        /// Bytes that the work still had to write, as far as it knows.
        needed_bytes: u64,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The caller's arguments contradict each other.
    Invalid(String),
    /// The caller's progress function asked to stop.
    Stopped,
}

impl Error {
    /// An error of the format of blob `blob`, which was read from `path`.
    pub fn reading(blob: &str, path: &Path, error: FormatError) -> Self {
        match error {
            FormatError::Io(cause) => Self::read_failed(blob, path, cause),
            cause => Self::Damaged {
                blob: blob.to_owned(),
                cause: cause.to_string(),
            },
        }
    }

    /// A failed open or read of blob `blob` at `path`: missing, unreadable (damaged), or the file
    /// system's own trouble.
    pub fn read_failed(blob: &str, path: &Path, cause: io::Error) -> Self {
        let blob = blob.to_owned();
        match (cause.kind(), cause.raw_os_error()) {
            (io::ErrorKind::NotFound, _) => Self::Missing { blob },
            (io::ErrorKind::UnexpectedEof, _) => Self::Damaged {
                blob,
                cause: "it is shorter than it says".to_owned(),
            },
            (_, Some(libc::EIO)) => Self::Damaged {
                blob,
                cause: cause.to_string(),
            },
            _ => Self::Storage {
                path: path.to_owned(),
                needed_bytes: 0,
                cause,
            },
        }
    }

    /// A failed write of `path`.
    pub fn write_failed(path: &Path, needed_bytes: u64, cause: io::Error) -> Self {
        Self::Storage {
            path: path.to_owned(),
            needed_bytes,
            cause,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged { blob, cause } => write!(to, "blob {blob} is damaged: {cause}"),
            Self::Missing { blob } => write!(to, "blob {blob} is missing"),
            Self::Storage { path, cause, .. } => write!(to, "{}: {cause}", path.display()),
            Self::Invalid(what) => write!(to, "{what}"),
            Self::Stopped => write!(to, "stopped"),
        }
    }
}

impl std::error::Error for Error {}
