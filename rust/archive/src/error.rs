//! What can go wrong, and how a name that others chose is shown.

use std::fmt;
use std::io;

use nix::errno::Errno;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why nothing was copied.
#[derive(Debug)]
pub enum Error {
    /// The stream holds what no stream may hold. Nothing of it was kept.
    Refused {
        /// The entry that it was at, as the stream names it.
        entry: Vec<u8>,
        /// What is wrong with it.
        cause: String,
    },
    /// A call failed on a file.
    File {
        /// The file.
        path: Vec<u8>,
        /// What the kernel says.
        cause: io::Error,
    },
    /// Source and destination don't fit, as `cp` would say.
    Unfit {
        /// The path that it is about.
        path: Vec<u8>,
        /// Why it can't be.
        cause: &'static str,
    },
    /// The stream holds more than was allowed. Nothing of it was kept.
    TooLarge(String),
    /// The stream itself could not be read or written.
    Stream(io::Error),
    /// The progress function said so.
    Cancelled,
}

impl Error {
    pub(crate) fn refused(entry: &[u8], cause: impl Into<String>) -> Self {
        Self::Refused {
            entry: entry.to_vec(),
            cause: cause.into(),
        }
    }

    /// One word for what kind of failure it is.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "refused",
            Self::File { .. } => "file",
            Self::Unfit { .. } => "unfit",
            Self::TooLarge(_) => "too_large",
            Self::Stream(_) => "stream",
            Self::Cancelled => "cancelled",
        }
    }

    /// The file or entry that it is about, escaped; empty where it is about none.
    pub fn path(&self) -> String {
        match self {
            Self::Refused { entry: path, .. }
            | Self::File { path, .. }
            | Self::Unfit { path, .. } => escape(path),
            Self::TooLarge(_) | Self::Stream(_) | Self::Cancelled => String::new(),
        }
    }

    /// Why, without the path.
    pub fn cause(&self) -> String {
        match self {
            Self::Refused { cause, .. } | Self::TooLarge(cause) => cause.clone(),
            Self::File { cause, .. } | Self::Stream(cause) => cause.to_string(),
            Self::Unfit { cause, .. } => (*cause).to_owned(),
            Self::Cancelled => "cancelled".to_owned(),
        }
    }

    pub(crate) fn file(path: &[u8], errno: Errno) -> Self {
        Self::File {
            path: path.to_vec(),
            cause: errno.into(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { entry, cause } => write!(to, "refused at {}: {cause}", escape(entry)),
            Self::File { path, cause } => write!(to, "{}: {cause}", escape(path)),
            Self::Unfit { path, cause } => write!(to, "{}: {cause}", escape(path)),
            Self::TooLarge(cause) => write!(to, "too large: {cause}"),
            Self::Stream(cause) => write!(to, "the stream: {cause}"),
            Self::Cancelled => write!(to, "cancelled"),
        }
    }
}

impl std::error::Error for Error {}

/// A name as text: printable ASCII as it is, everything else written out, cut where it is long.
pub fn escape(name: &[u8]) -> String {
    const SHOWN_MAX: usize = 200;
    let shown = &name[..name.len().min(SHOWN_MAX)];
    let mut text = shown.escape_ascii().to_string();
    if name.len() > SHOWN_MAX {
        text.push_str("...");
    }
    text
}
