//! Where blobs are read from: an interface of a few calls, and the media behind it.
//!
//! What a medium returns is believed by nobody: whoever reads compares it with a digest. Each call
//! returns in bounded time, and says which way it failed.

mod directory;
mod http;
mod layered;

use std::fmt;
use std::io::{self, IoSliceMut, Read};

pub use directory::Directory;
pub use http::{HttpLimits, HttpSource};
pub use layered::Layered;

/// What reading from a medium costs, for whoever decides how much to read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Medium {
    /// What statistics call it.
    pub name: &'static str,
    /// Bytes of pages that one request should bring.
    pub window_bytes: u64,
    /// Requests under way at once; more than one where a request is mostly waiting.
    pub parallel: usize,
}

impl Medium {
    /// Whether a request is mostly waiting: worth a thread of its own, and more bytes than asked.
    pub fn has_latency(&self) -> bool {
        self.parallel > 1
    }
}

/// Why a blob can't be read now.
#[derive(Debug, Clone, PartialEq, Eq)]
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

impl std::error::Error for BlobError {}

impl From<io::Error> for BlobError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing,
            io::ErrorKind::UnexpectedEof => Self::Short,
            _ => match error.downcast::<Self>() {
                Ok(inside) => inside,
                Err(error) => Self::Unavailable(error.to_string()),
            },
        }
    }
}

impl From<BlobError> for io::Error {
    fn from(error: BlobError) -> Self {
        match error {
            BlobError::Missing => io::ErrorKind::NotFound.into(),
            BlobError::Short => io::ErrorKind::UnexpectedEof.into(),
            other => Self::other(other),
        }
    }
}

/// A blob that was found.
#[derive(Debug)]
pub struct Opened {
    /// The blob.
    pub blob: Box<dyn Blob>,
    /// Bytes of its end that came with finding it; none where asking for them costs no round trip.
    pub end: Vec<u8>,
}

/// A medium that holds blobs by name; what it returns is believed by nobody.
pub trait BlobSource: fmt::Debug + Send + Sync {
    /// Finds a blob whose last `end_bytes` will be read first. A blob that is put in the place of
    /// another is found by the next call.
    ///
    /// # Errors
    /// Any [`BlobError`].
    fn open_with_end(&self, name: &str, end_bytes: u64) -> Result<Opened, BlobError>;

    /// Finds a blob.
    ///
    /// # Errors
    /// Any [`BlobError`].
    fn open(&self, name: &str) -> Result<Box<dyn Blob>, BlobError> {
        self.open_with_end(name, 0).map(|opened| opened.blob)
    }

    /// What reading from it costs, at worst.
    fn medium(&self) -> Medium;
}

/// One blob; read by many threads at once.
pub trait Blob: fmt::Debug + Send + Sync {
    /// Its size.
    fn size_bytes(&self) -> u64;

    /// What reading it costs.
    fn medium(&self) -> Medium;

    /// Fills the buffers, one after the other, with what it has from `offset` on: one request.
    ///
    /// # Errors
    /// Any [`BlobError`].
    fn read_into(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<(), BlobError>;

    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// Any [`BlobError`].
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
        self.read_into(offset, &mut [IoSliceMut::new(into)])
    }

    /// `length` bytes from `offset` on as they come, from one request where the medium has latency.
    /// An error of the stream becomes a [`BlobError`] by `From`.
    ///
    /// # Errors
    /// Any [`BlobError`].
    fn stream(&self, offset: u64, length: u64) -> Result<Box<dyn Read + '_>, BlobError> {
        Ok(Box::new(Pieces {
            blob: self,
            offset,
            left: length,
        }))
    }

    /// These bytes will be asked for soon, after others.
    fn will_need(&self, _offset: u64, _length: u64) {}
}

/// A blob read piece by piece, as its reader wants them.
struct Pieces<'a, B: ?Sized> {
    blob: &'a B,
    offset: u64,
    left: u64,
}

impl<B: Blob + ?Sized> Read for Pieces<'_, B> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let length = into
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.blob.read_at(self.offset, &mut into[..length])?;
        self.offset += length as u64;
        self.left -= length as u64;
        Ok(length)
    }
}
