//! One error for each way in which bytes can be wrong.
//!
//! The text names the damaged part and what was found there; the caller adds the blob's name.

use std::fmt;
use std::io;

/// The result of reading or writing a format.
pub type Result<T> = std::result::Result<T, FormatError>;

/// Why bytes are not what a format says they are.
#[derive(Debug)]
pub enum FormatError {
    /// The first bytes (or the last, for a footer) are another format's.
    BadMagic {
        /// Which part was read.
        part: &'static str,
    },
    /// The format is known, its version is not.
    UnknownVersion {
        /// Which part was read.
        part: &'static str,
        /// The version that it states.
        found: u32,
    },
    /// The bytes end before the part does.
    Truncated {
        /// Which part was read.
        part: &'static str,
    },
    /// A value lies beyond its limit or beyond what contains it.
    OutOfRange {
        /// Which value.
        part: &'static str,
        /// What it is.
        found: u64,
        /// The largest (or only) value that would do.
        limit: u64,
    },
    /// A stored CRC32 differs from that of the bytes.
    BadChecksum {
        /// Which part was read.
        part: &'static str,
    },
    /// A stored or expected BLAKE3 digest differs from that of the bytes.
    BadDigest {
        /// Which part was read.
        part: &'static str,
    },
    /// A frame's stored bytes differ from the digest in the frame table.
    BadFrame {
        /// Number of the frame.
        frame: u64,
    },
    /// A frame that decompresses to another length than its pages have.
    BadFrameLength {
        /// Number of the frame.
        frame: u64,
        /// Bytes that its pages have.
        expected: usize,
    },
    /// The bytes can be read but no writer of this version makes them.
    NotCanonical {
        /// What is unusual.
        what: &'static str,
    },
    /// A capture that was never completed.
    NotSealed,
    /// The bytes could not be read or written at all.
    Io(io::Error),
}

impl fmt::Display for FormatError {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadMagic { part } => write!(to, "the magic of the {part} is wrong"),
            Self::UnknownVersion { part, found } => {
                write!(to, "the {part} is of version {found}, which is not known")
            }
            Self::Truncated { part } => write!(to, "it ends inside the {part}"),
            Self::OutOfRange { part, found, limit } => {
                write!(to, "the {part} is {found}, out of range for {limit}")
            }
            Self::BadChecksum { part } => write!(to, "the checksum of the {part} does not match"),
            Self::BadDigest { part } => write!(to, "the digest of the {part} does not match"),
            Self::BadFrame { frame } => write!(to, "the digest of frame {frame} does not match"),
            Self::BadFrameLength { frame, expected } => {
                write!(to, "frame {frame} does not decompress to {expected} bytes")
            }
            Self::NotCanonical { what } => write!(to, "{what}"),
            Self::NotSealed => write!(to, "the capture was not completed"),
            Self::Io(error) => write!(to, "{error}"),
        }
    }
}

impl std::error::Error for FormatError {}

impl From<io::Error> for FormatError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Reads exactly `into`, and says which part ended early.
pub(crate) fn read_part(
    from: &mut impl io::Read,
    into: &mut [u8],
    part: &'static str,
) -> Result<()> {
    from.read_exact(into).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => FormatError::Truncated { part },
        _ => FormatError::Io(error),
    })
}

/// Fails unless `found` is at most `limit`.
pub(crate) fn at_most(part: &'static str, found: u64, limit: u64) -> Result<()> {
    if found <= limit {
        return Ok(());
    }
    Err(FormatError::OutOfRange { part, found, limit })
}

/// Fails unless `found` is exactly `only`.
pub(crate) fn exactly(part: &'static str, found: u64, only: u64) -> Result<()> {
    if found == only {
        return Ok(());
    }
    Err(FormatError::OutOfRange {
        part,
        found,
        limit: only,
    })
}
