//! Builds as the pager reads them: each open once, its table verified before a frame is.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use diapause_format::{
    build_head, hex, BuildRef, BuildTable, Digest, FormatError, FOOTER_LEN, FRAME_PAGES, HEAD_LEN,
};

use crate::bears::Bears;
use crate::blobs::{Blob, BlobError, BlobSource, Medium, Opened};
use crate::flight::{Claim, Flights, Missed, Waiter};
use crate::workers::{Job, Workers};

pub use crate::frames::{Frame, Frames};

/// How long a reader waits for what another thread is fetching. Not as long as a medium may take to
/// give up: who asks again finds the fetch still under way, or what it brought, and meanwhile the
/// reader's thread can serve others.
pub const WAIT_MAX: Duration = Duration::from_secs(2);
/// Reads of one medium with latency that are answered at once by threads of their own.
pub const READERS_MAX: usize = 64;
/// Requests at once of one medium for what is brought ahead: some are left to reads of guests.
pub(crate) const AHEAD_MAX: usize = 24;
/// Bytes of a frame's entry in a build's table.
const ENTRY_BYTES: u64 = 32;

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

impl std::error::Error for Unreadable {}

impl From<Unreadable> for io::Error {
    fn from(error: Unreadable) -> Self {
        Self::other(error)
    }
}

/// One build, its table verified.
#[derive(Debug)]
pub struct Build {
    pub(crate) number: u64,
    id: Digest,
    pub(crate) blob: Box<dyn Blob>,
    table: BuildTable,
    stale: AtomicBool,
}

/// The builds of one medium, each open once, and the frames of all of them.
#[derive(Debug)]
pub struct Builds {
    source: Arc<dyn BlobSource>,
    open: Arc<Mutex<HashMap<Digest, Weak<Build>>>>,
    opening: Flights<Digest, Arc<Build>, Unreadable>,
    pub(crate) frames: Arc<Frames>,
    pub(crate) workers: Workers,
    readers: Workers,
    pub(crate) bears: Bears,
    pub(crate) wait_max: Duration,
}

type Opening = (Digest, Waiter<Arc<Build>, Unreadable>);

impl Builds {
    /// The builds that `source` has; their frames are kept among `frames`.
    pub fn new(source: Arc<dyn BlobSource>, frames: Arc<Frames>) -> Self {
        Self {
            workers: Workers::new(source.medium().parallel),
            readers: Workers::new(READERS_MAX),
            bears: Bears::new(AHEAD_MAX.min(source.medium().parallel)),
            source,
            open: Arc::default(),
            opening: Flights::default(),
            frames,
            wait_max: WAIT_MAX,
        }
    }

    /// What their medium costs.
    pub fn medium(&self) -> Medium {
        self.source.medium()
    }

    /// Has somebody's read of a medium with latency done by another thread, so that who asks for it
    /// can go on; where very many are, it is given back.
    pub(crate) fn read_aside(&self, job: Job) -> Result<(), Job> {
        self.readers.run_at_once(job)
    }

    /// With another bound on waiting for what another thread is fetching.
    #[must_use]
    pub fn waiting_at_most(self, wait_max: Duration) -> Self {
        Self { wait_max, ..self }
    }

    /// The builds of these names, in their order; who has one open already shares its table. Opens
    /// several at once where the medium has latency.
    ///
    /// # Errors
    /// Missing, damaged, not available: the first of them.
    pub fn get(&self, wanted: &[&BuildRef]) -> Result<Vec<Arc<Build>>, Unreadable> {
        let aside = self.source.medium().has_latency();
        let asked: Vec<_> = wanted
            .iter()
            .map(|build| self.ask_open(build, aside))
            .collect();
        asked
            .into_iter()
            .map(|asked| asked.or_else(|(id, waiter)| self.await_open(&id, &waiter)))
            .collect()
    }

    /// The build, or where to wait for it.
    fn ask_open(&self, wanted: &BuildRef, aside: bool) -> Result<Arc<Build>, Opening> {
        let kept = || locked(&self.open).get(&wanted.id).and_then(Weak::upgrade);
        let landing = match self.opening.claim(wanted.id, kept) {
            Claim::Kept(build) => return Ok(build),
            Claim::Theirs(waiter) => return Err((wanted.id, waiter)),
            Claim::Mine(landing) => landing,
        };
        let waiter = landing.waiter();
        let (source, open) = (self.source.clone(), self.open.clone());
        let (wanted, number) = (*wanted, self.frames.number_build());
        let job = move || {
            let opened = Build::open(&*source, &wanted, number).map(Arc::new);
            if let Ok(build) = &opened {
                let mut open = locked(&open);
                open.retain(|_, build| build.strong_count() > 0);
                open.insert(wanted.id, Arc::downgrade(build));
            }
            landing.land(opened);
        };
        if aside {
            self.workers.run(Box::new(job));
        } else {
            job();
        }
        Err((wanted.id, waiter))
    }

    fn await_open(
        &self,
        id: &Digest,
        waiter: &Waiter<Arc<Build>, Unreadable>,
    ) -> Result<Arc<Build>, Unreadable> {
        let opened = waiter.wait(self.wait_max);
        opened.map_err(|missed| self.missed(&blob_name(id), missed))
    }

    /// What a reader is told whose flight brought nothing.
    pub(crate) fn missed(&self, blob: &str, missed: Missed<Unreadable>) -> Unreadable {
        match missed {
            Missed::Failed(error) => error,
            Missed::Lost => Unreadable::away(blob, "its fetch was given up"),
            Missed::Late => {
                let cause = format!("it was not there within {} s", self.wait_max.as_secs_f32());
                Unreadable::away(blob, cause)
            }
        }
    }

    /// Forgets a build that could not be read: the next to ask for it opens it anew, for it may
    /// have been mended meanwhile.
    pub(crate) fn forget(&self, build: &Build) {
        build.stale.store(true, Ordering::Release);
        let mut open = locked(&self.open);
        let same = |open: &Weak<Build>| std::ptr::eq(open.as_ptr(), build);
        if open.get(&build.id).is_some_and(same) {
            open.remove(&build.id);
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Build {
    fn open(source: &dyn BlobSource, wanted: &BuildRef, number: u64) -> Result<Self, Unreadable> {
        let name = blob_name(&wanted.id);
        let table_bytes = wanted.pages.div_ceil(FRAME_PAGES as u64) * ENTRY_BYTES;
        let end_bytes = table_bytes + FOOTER_LEN as u64;
        let opened = source.open_with_end(&hex(&wanted.id), end_bytes);
        let Opened { blob, end } = opened.map_err(|error| failed(&name, &error))?;
        let size_bytes = blob.size_bytes();
        // Before anything is allocated for a table of a size that another claims.
        if size_bytes < end_bytes + HEAD_LEN as u64 {
            return Err(failed(&name, &BlobError::Short));
        }
        let came = end.len() as u64 == end_bytes;
        let mut reader = Reader {
            blob: &*blob,
            size_bytes,
            at: 0,
            // Where the end came first, a request for the head would tell nothing: it follows from
            // the count of pages, and the id, which is compared, is of it and the table.
            head: came.then(|| build_head(wanted.pages)),
            tail: if came { end } else { Vec::new() },
            tail_bytes: end_bytes as usize,
        };
        let table = BuildTable::read_of(&mut reader, size_bytes, &wanted.id, wanted.pages);
        let table = table.map_err(|error| wrong(&name, error))?;
        Ok(Self {
            number,
            id: wanted.id,
            blob,
            table,
            stale: AtomicBool::new(false),
        })
    }

    /// Where its frames are.
    pub fn table(&self) -> &BuildTable {
        &self.table
    }

    /// What its medium costs.
    pub fn medium(&self) -> Medium {
        self.blob.medium()
    }

    /// Its name, as a person finds it.
    pub fn name(&self) -> String {
        blob_name(&self.id)
    }

    /// Whether it was found to be unreadable: to be opened anew.
    pub fn is_stale(&self) -> bool {
        self.stale.load(Ordering::Acquire)
    }

    pub(crate) fn failed(&self, error: &BlobError) -> Unreadable {
        failed(&self.name(), error)
    }

    pub(crate) fn wrong(&self, error: FormatError) -> Unreadable {
        wrong(&self.name(), error)
    }
}

fn blob_name(id: &Digest) -> String {
    format!("builds/{}", hex(id))
}

fn failed(blob: &str, error: &BlobError) -> Unreadable {
    match error {
        BlobError::Short => Unreadable::damaged(blob, error),
        _ => Unreadable::away(blob, error),
    }
}

fn wrong(blob: &str, error: FormatError) -> Unreadable {
    match error {
        FormatError::Io(error) => failed(blob, &error.into()),
        error => Unreadable::damaged(blob, error),
    }
}

/// A blob as a stream, for its table: table and footer come with one request, or came before.
struct Reader<'a> {
    blob: &'a dyn Blob,
    size_bytes: u64,
    at: u64,
    head: Option<[u8; HEAD_LEN]>,
    tail: Vec<u8>,
    tail_bytes: usize,
}

impl Read for Reader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let tail_at = self.size_bytes - self.tail_bytes as u64;
        let Some(inside) = self.at.checked_sub(tail_at) else {
            let head = self
                .head
                .as_ref()
                .and_then(|head| head.get(self.at as usize..));
            if let Some(rest) = head.filter(|rest| !rest.is_empty()) {
                let length = rest.len().min(into.len());
                into[..length].copy_from_slice(&rest[..length]);
                self.at += length as u64;
                return Ok(length);
            }
            let length = into
                .len()
                .min(usize::try_from(tail_at - self.at).unwrap_or(usize::MAX));
            self.blob.read_at(self.at, &mut into[..length])?;
            self.at += length as u64;
            return Ok(length);
        };
        if self.tail.is_empty() {
            self.tail.resize(self.tail_bytes, 0);
            self.blob.read_at(tail_at, &mut self.tail)?;
        }
        let rest = self.tail.get(inside as usize..).unwrap_or_default();
        let length = rest.len().min(into.len());
        into[..length].copy_from_slice(&rest[..length]);
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
