//! Builds as the pager reads them: the table once, then single frames, each verified.
//!
//! Frames that were decoded are kept for a while: a window of a device rarely begins and ends with
//! one. Whoever asks for a frame that another thread is fetching waits for that one.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::{cell::RefCell, collections::HashMap};

use diapause_format::{hex, BuildTable, Decoder, Digest, FormatError};
use quick_cache::sync::Cache;
use quick_cache::Weighter;

use crate::blobs::{Blob, BlobError, BlobSource};

/// Bytes of decoded frames that are kept.
const FRAMES_BYTES_MAX: u64 = 16 << 20;

/// Why pages can't be served: which blob, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The blob, as a person finds it.
    pub blob: String,
    /// What is wrong.
    pub cause: String,
    /// Whether its bytes are wrong; else it can't be had.
    pub damaged: bool,
}

impl Unreadable {
    /// A blob whose bytes are wrong.
    pub fn damaged(blob: impl Into<String>, cause: impl ToString) -> Self {
        Self {
            blob: blob.into(),
            cause: cause.to_string(),
            damaged: true,
        }
    }

    /// A blob that can't be had.
    pub fn away(blob: impl Into<String>, cause: impl ToString) -> Self {
        Self {
            damaged: false,
            ..Self::damaged(blob, cause)
        }
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}: {}", self.blob, self.cause)
    }
}

/// Verified pages of one frame.
pub type Frame = Arc<[u8]>;

/// One build, its table verified.
#[derive(Debug)]
pub struct Build {
    number: u64,
    name: String,
    medium: &'static str,
    blob: Box<dyn Blob>,
    table: BuildTable,
}

/// The builds of one medium, each open once, and the frames of all of them.
#[derive(Debug)]
pub struct Builds {
    source: Arc<dyn BlobSource>,
    open: Mutex<HashMap<Digest, Weak<Build>>>,
    frames: Arc<Frames>,
}

/// Decoded frames, by (number of the build, number of the frame).
#[derive(Debug)]
pub struct Frames {
    kept: Cache<(u64, u64), Frame, Bytes>,
    next_build: AtomicU64,
}

#[derive(Debug, Clone)]
struct Bytes;

impl Weighter<(u64, u64), Frame> for Bytes {
    fn weight(&self, _: &(u64, u64), frame: &Frame) -> u64 {
        frame.len() as u64
    }
}

impl Default for Frames {
    fn default() -> Self {
        let items = (FRAMES_BYTES_MAX / diapause_format::FRAME_BYTES as u64) as usize;
        Self {
            kept: Cache::with_weighter(items, FRAMES_BYTES_MAX, Bytes),
            next_build: AtomicU64::new(0),
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Option<(Decoder, Vec<u8>)>> = const { RefCell::new(None) };
}

impl Builds {
    /// The builds that `source` has; their frames are kept among `frames`.
    pub fn new(source: Arc<dyn BlobSource>, frames: Arc<Frames>) -> Self {
        Self {
            source,
            open: Mutex::new(HashMap::new()),
            frames,
        }
    }

    /// The build of this id; whoever has it open already shares its table.
    ///
    /// # Errors
    /// Missing, damaged, not available.
    pub fn get(&self, id: &Digest) -> Result<Arc<Build>, Unreadable> {
        let lock = || self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = lock().get(id).and_then(Weak::upgrade) {
            return Ok(open);
        }
        let number = self.frames.next_build.fetch_add(1, Ordering::Relaxed);
        let opened = Arc::new(Build::open(&*self.source, id, number)?);
        let mut open = lock();
        open.retain(|_, build| build.strong_count() > 0);
        open.insert(*id, Arc::downgrade(&opened));
        Ok(opened)
    }

    /// Forgets a build that was found to be damaged: the next to ask for it opens it anew.
    pub fn forget(&self, id: &Digest) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.remove(id);
    }

    /// The pages of a frame, and whether they were there already.
    ///
    /// # Errors
    /// Damaged, not available.
    pub fn frame(&self, build: &Build, number: u64) -> Result<(Frame, bool), Unreadable> {
        let mut kept = true;
        let frame = self
            .frames
            .kept
            .get_or_insert_with(&(build.number, number), || {
                kept = false;
                build.read_frame(number)
            })?;
        Ok((frame, kept))
    }
}

impl Build {
    fn open(source: &dyn BlobSource, id: &Digest, number: u64) -> Result<Self, Unreadable> {
        let name = hex(id);
        let blob = source.open(&name).map_err(|error| failed(&name, &error))?;
        let size_bytes = blob.size_bytes();
        let mut reader = Reader {
            blob: &*blob,
            at: 0,
        };
        let table = BuildTable::read(&mut reader, size_bytes, id);
        let table = table.map_err(|error| wrong(&name, error))?;
        Ok(Self {
            number,
            name,
            medium: source.medium().name,
            blob,
            table,
        })
    }

    /// Where its frames are.
    pub fn table(&self) -> &BuildTable {
        &self.table
    }

    /// What its medium is called.
    pub fn medium(&self) -> &'static str {
        self.medium
    }

    /// Its id, in digits.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn read_frame(&self, number: u64) -> Result<Frame, Unreadable> {
        let entry = self.table.frame(number);
        SCRATCH.with_borrow_mut(|scratch| {
            if scratch.is_none() {
                let decoder = Decoder::new().map_err(|error| wrong(&self.name, error))?;
                *scratch = Some((decoder, Vec::new()));
            }
            let Some((decoder, stored)) = scratch else {
                unreachable!("it was made just now")
            };
            stored.resize(entry.length as usize, 0);
            let read = self.blob.read_at(entry.offset, stored);
            read.map_err(|error| failed(&self.name, &error))?;
            let mut pages = vec![0; self.table.frame_bytes(number)];
            let decoded = decoder.decode(number, entry, stored, &mut pages);
            decoded.map_err(|error| wrong(&self.name, error))?;
            Ok(pages.into())
        })
    }
}

fn failed(name: &str, error: &BlobError) -> Unreadable {
    let blob = format!("builds/{name}");
    match error {
        BlobError::Short => Unreadable::damaged(blob, error),
        _ => Unreadable::away(blob, error),
    }
}

fn wrong(name: &str, error: FormatError) -> Unreadable {
    match error {
        FormatError::Io(error) => failed(name, &error.into()),
        error => Unreadable::damaged(format!("builds/{name}"), error),
    }
}

/// A blob as a stream, for its table.
struct Reader<'a> {
    blob: &'a dyn Blob,
    at: u64,
}

impl Read for Reader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.blob.size_bytes().saturating_sub(self.at);
        let length = into.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let read = self.blob.read_at(self.at, &mut into[..length]);
        read.map_err(|error| match error {
            BlobError::Missing => io::ErrorKind::NotFound.into(),
            BlobError::Short => io::ErrorKind::UnexpectedEof.into(),
            BlobError::Unavailable(cause) => io::Error::other(cause),
        })?;
        self.at += length as u64;
        Ok(length)
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.at = match to {
            SeekFrom::Start(at) => at,
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        Ok(self.at)
    }
}
