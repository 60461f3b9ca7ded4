//! Where blobs are read from: an interface of two calls, and the local directory.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// What reading from a medium costs, for whoever decides how much to read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Medium {
    /// What statistics call it.
    pub name: &'static str,
    /// Bytes that one request should bring.
    pub window_bytes: u64,
    /// Requests under way at once.
    pub parallel: usize,
}

/// Why a blob can't be read now.
#[derive(Debug)]
pub enum BlobError {
    /// It is not there.
    Missing,
    /// It ends before what was asked for.
    Short,
    /// The medium does not answer, or refuses.
    Unavailable(String),
}

impl fmt::Display for BlobError {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => write!(to, "it is missing"),
            Self::Short => write!(to, "it is shorter than it says"),
            Self::Unavailable(cause) => write!(to, "it can't be read: {cause}"),
        }
    }
}

impl From<io::Error> for BlobError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing,
            io::ErrorKind::UnexpectedEof => Self::Short,
            _ => Self::Unavailable(error.to_string()),
        }
    }
}

/// A medium that holds blobs by name; what it returns is believed by nobody.
pub trait BlobSource: fmt::Debug + Send + Sync {
    /// Finds a blob. A blob that is put in the place of another is found by the next call.
    ///
    /// # Errors
    /// Any [`BlobError`].
    fn open(&self, name: &str) -> Result<Box<dyn Blob>, BlobError>;

    /// What reading from it costs.
    fn medium(&self) -> Medium;
}

/// One blob; read by many threads at once.
pub trait Blob: fmt::Debug + Send + Sync {
    /// Its size.
    fn size_bytes(&self) -> u64;

    /// Fills `into` from `offset` on; returns in bounded time.
    ///
    /// # Errors
    /// Any [`BlobError`].
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), BlobError>;
}

/// A local directory, a file for each blob.
#[derive(Debug)]
pub struct Directory(pub PathBuf);

#[derive(Debug)]
struct LocalFile {
    file: File,
    size_bytes: u64,
}

impl BlobSource for Directory {
    fn open(&self, name: &str) -> Result<Box<dyn Blob>, BlobError> {
        let file = File::open(self.0.join(name))?;
        let size_bytes = file.metadata()?.len();
        Ok(Box::new(LocalFile { file, size_bytes }))
    }

    fn medium(&self) -> Medium {
        Medium {
            name: "local",
            window_bytes: 64 << 10,
            parallel: 1,
        }
    }
}

impl Blob for LocalFile {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
        Ok(self.file.read_exact_at(into, offset)?)
    }
}
