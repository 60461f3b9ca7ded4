//! What the server of VMMs asks of whoever uses it, and what it tells.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use crate::build::Unreadable;
use crate::device::{Device, Origin, Part};

use super::handshake::Refusal;
use super::regions::{Region, HUGE_BYTES, SMALL_BYTES};

/// Where pages come from; asked by many threads at once.
pub trait Pages: fmt::Debug + Send + Sync {
    /// Its size.
    fn size_bytes(&self) -> u64;

    /// Bytes from `offset` on, `size` of them, as parts in order; in bounded time.
    ///
    /// # Errors
    /// Damaged, not available: asked again until the bound.
    fn read(&self, offset: u64, size: usize, parts: &mut Vec<Part>) -> Result<Origin, Unreadable>;
}

impl Pages for Device {
    fn size_bytes(&self) -> u64 {
        Self::size_bytes(self)
    }

    fn read(&self, offset: u64, size: usize, parts: &mut Vec<Part>) -> Result<Origin, Unreadable> {
        Self::read(self, offset, size, parts)
    }
}

/// Faults that were answered together.
#[derive(Debug, Clone, Copy)]
pub struct Served {
    /// Where the bytes came from.
    pub origin: Origin,
    /// From reading the message to waking the thread.
    pub latency: Duration,
    /// Pages that were waited for.
    pub pages: u32,
    /// Bytes that are there now and were not before.
    pub bytes: u64,
    /// Whether it could not be answered at once.
    pub stalled: bool,
}

/// Why a VMM was killed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// A blob could not be read within the bound.
    Unreadable(Unreadable),
    /// A thread waited for the device, or for the kernel, for longer than the bound.
    Hung,
    /// A page was gone without a word, so nobody knows what belongs there.
    Vanished(u64),
    /// It waits for an address that is in no region.
    Stray(u64),
    /// A message of a kind that it should not send.
    Unknown(u8),
    /// The kernel refused what it should not.
    Kernel(String),
    /// A fault of this program.
    Panicked,
    /// Somebody asked for it.
    Asked,
}

impl fmt::Display for Why {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(why) => write!(to, "{why}"),
            Self::Hung => write!(to, "a page was not there within the bound"),
            Self::Vanished(at) => write!(to, "the page at {at:#x} is gone and nobody said so"),
            Self::Stray(at) => write!(to, "{at:#x} is in no region"),
            Self::Unknown(kind) => write!(to, "a message of kind {kind:#x}"),
            Self::Kernel(cause) => write!(to, "the kernel says {cause}"),
            Self::Panicked => write!(to, "the pager failed"),
            Self::Asked => write!(to, "the pager was asked to end it"),
        }
    }
}

/// How the service of a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It ended by itself, or somebody else ended it.
    Exited,
    /// It was killed.
    Killed(Why),
}

/// Who counts. Called by the threads that serve, so it returns at once.
pub trait Witness: fmt::Debug + Send + Sync {
    /// So many bytes of the device from `offset` on were read for faults that are answered next:
    /// what is asked for after such an answer is told after it.
    fn read(&self, _offset: u64, _bytes: u64) {}
    /// Faults were answered.
    fn served(&self, _served: &Served) {}
    /// An access waits for bytes that can't be had now; told once for each access.
    fn stalled(&self, _why: &Unreadable) {}
    /// A page was poisoned for want of its bytes.
    fn poisoned(&self, _why: &Unreadable) {}
    /// It is about to be killed.
    fn killing(&self, _why: &Why) {}
    /// Pages were given back.
    fn removed(&self, _pages: u64) {}
    /// The VMM is gone.
    fn ended(&self, _ending: &Ending) {}
}

/// What to do about a page that can't be had within the bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBad {
    /// The VMM is killed, then the page is poisoned for whoever else looks at its memory.
    Kill,
    /// The page is poisoned: the thread gets SIGBUS, and the VMM may go on without it.
    Poison,
}

/// How one VMM is served.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Bytes that a fault on a small page brings, aligned in the device: a power of two of at least
    /// a page and at most 64. A huge page comes alone.
    pub window_bytes: u64,
    /// How long an access may wait for bytes that can't be had.
    pub stall_max: Duration,
    /// How long until they are asked for again.
    pub retry_after: Duration,
    /// What happens after `stall_max`.
    pub on_bad: OnBad,
    /// Threads that serve it at once.
    pub parallel: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            window_bytes: 64 << 10,
            stall_max: Duration::from_secs(60),
            retry_after: Duration::from_millis(250),
            on_bad: OnBad::Kill,
            parallel: 4,
        }
    }
}

impl Options {
    /// Pages of this size that come together.
    pub fn window_pages(&self, page_size: u64) -> u64 {
        if page_size == HUGE_BYTES {
            return 1;
        }
        (self.window_bytes / SMALL_BYTES).clamp(1, 64)
    }
}

/// What a VMM is served with.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its memory as it was.
    pub pages: Arc<dyn Pages>,
    /// Who counts.
    pub witness: Arc<dyn Witness>,
    /// How.
    pub options: Options,
}

/// What a keeper holds for a VMM, so that a successor can serve it.
///
/// It closes its descriptors like anything else: whoever holds the last `uffd` must have killed the
/// VMM before.
#[derive(Debug)]
pub struct Kept {
    /// The VMM's memory.
    pub uffd: OwnedFd,
    /// The VMM, a pidfd.
    pub vmm: OwnedFd,
    /// What was given back ([`super::ledger`]).
    pub ledger: OwnedFd,
    /// The regions.
    pub regions: Vec<Region>,
}

/// The same, borrowed: what has to be duplicated.
#[derive(Debug)]
pub struct Keep<'a> {
    /// The VMM's memory.
    pub uffd: BorrowedFd<'a>,
    /// The VMM, a pidfd.
    pub vmm: BorrowedFd<'a>,
    /// What was given back.
    pub ledger: BorrowedFd<'a>,
    /// The regions.
    pub regions: &'a [Region],
    /// The VMM's number, for people.
    pub pid: i32,
    /// Its connection, where this process took it.
    pub stream: Option<BorrowedFd<'a>>,
}

impl Keep<'_> {
    /// Duplicates of all of it.
    ///
    /// # Errors
    /// Where there are too many descriptors.
    pub fn duplicate(&self) -> io::Result<Kept> {
        Ok(Kept {
            uffd: self.uffd.try_clone_to_owned()?,
            vmm: self.vmm.try_clone_to_owned()?,
            ledger: self.ledger.try_clone_to_owned()?,
            regions: self.regions.to_vec(),
        })
    }
}

/// Who stands behind a socket that VMMs connect to.
pub trait Host: fmt::Debug + Send + Sync {
    /// The size of the device whose pages they get.
    fn size_bytes(&self) -> u64;

    /// Somebody is about to be let in. What he sends is lost where this process dies before
    /// [`Self::admitted`] has returned.
    ///
    /// # Errors
    /// Where that could not be noted: he is not let in.
    fn knocked(&self) -> io::Result<()> {
        Ok(())
    }

    /// A handshake is complete. Called before the first fault is answered: what is kept here
    /// survives this process. `id` names the VMM in calls of the server.
    ///
    /// # Errors
    /// Where it is not to be served: it is killed then.
    fn admitted(&self, id: u64, keep: &Keep<'_>) -> io::Result<Guest>;

    /// Nobody who knocked is in his handshake any more.
    fn deserted(&self) {}

    /// A handshake was refused. A peer that sent a userfaultfd is being killed: its memory would
    /// read as zeros else.
    fn refused(&self, _pid: i32, _why: &Refusal) {}
}
