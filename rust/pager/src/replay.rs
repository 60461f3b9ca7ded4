//! Fills the memory that a VMM handed in ahead of it, as a trace says: verified bytes, copied in
//! pieces of 64 KiB by threads of their own, of the kind that [`crate::prefetch`] has for files.
//!
//! It goes before no fault: while some are waited for it stands back, for a while. What the VMM
//! gave back stays so, and what it has already is left alone ([`uffd::ahead`]). It is a hint to the
//! end: what can't be read or copied is left to the fault that will wait for it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::given::Given;
use crate::server::Server;
use crate::trace::{pieces, Trace, GRANULE};
use crate::uffd::session::Session;
use crate::uffd::{self, Scratch};
use crate::workers::Workers;

/// Bytes that are read at once.
const PIECE: u64 = 1 << 20;
/// The same over a medium with latency: what one request brings.
const PIECE_REMOTE: u64 = 4 << 20;
/// Granules that are sorted by their place: their order among themselves matters less than reads
/// that are whole.
const SORTED: usize = 64;
const SORTED_REMOTE: usize = 512;
/// Pieces that are under way at once: of one VMM over a medium with latency, and of all.
const AT_ONCE_REMOTE: usize = 6;
const AT_ONCE: usize = 8;
/// How long a piece stands back for faults, at most.
const YIELD: Duration = Duration::from_millis(5);
const YIELD_STEP: Duration = Duration::from_micros(50);
/// How long a VMM that was let in may take to be served.
const SERVED_MAX: Duration = Duration::from_secs(1);

static WORKERS: LazyLock<Workers> = LazyLock::new(|| Workers::new(AT_ONCE));

/// What is kept of a replay: a successor begins it anew, and finds what is there already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplayText {
    /// The trace.
    pub trace: PathBuf,
    /// The most that is brought.
    pub budget_bytes: u64,
}

/// What a VMM was given of its memory, and in which order it asked.
#[derive(Debug, Default)]
pub struct Came {
    given: Mutex<Given>,
    ahead_bytes: AtomicU64,
}

impl Came {
    /// Of a VMM that a predecessor served.
    pub fn late() -> Self {
        Self {
            given: Mutex::new(Given::late()),
            ..Self::default()
        }
    }

    /// Looks at it.
    pub fn with<T>(&self, look: impl FnOnce(&mut Given) -> T) -> T {
        look(&mut self.given.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Bytes that were there before they were asked for.
    pub fn ahead_bytes(&self) -> u64 {
        self.ahead_bytes.load(Ordering::Relaxed)
    }
}

/// A replay for one VMM.
pub struct Replay {
    /// What counts, and opens devices.
    pub server: Arc<Server>,
    /// What serves the VMM.
    pub uffd: Arc<uffd::Server>,
    /// Its name there.
    pub vmm: u64,
    /// The name of the file that its memory is.
    pub file: String,
    /// The same as bytes.
    pub device: Arc<Device>,
    /// What it has.
    pub came: Arc<Came>,
}

/// A replay that is under way.
struct Job {
    replay: Replay,
    pieces: Vec<(u64, u64)>,
    next: AtomicUsize,
    budget_bytes: u64,
}

impl Replay {
    /// Begins to bring a trace, at most so many bytes.
    pub fn begin(self, trace: &Trace, budget_bytes: u64) {
        let remote = self.device.has_latency();
        let (piece, sorted, at_once) = match remote {
            true => (PIECE_REMOTE, SORTED_REMOTE, AT_ONCE_REMOTE),
            false => (PIECE, SORTED, 1),
        };
        let mut wanted = self.came.with(|given| {
            let numbers = trace.granules.iter().map(|one| one.number);
            let new = numbers.filter(|number| given.take(*number));
            new.take(granules_of(budget_bytes)).collect::<Vec<_>>()
        });
        let pieces = pieces(&mut wanted, self.device.size_bytes(), piece, sorted);
        let workers = at_once.min(pieces.len());
        let job = Arc::new(Job {
            replay: self,
            pieces,
            next: AtomicUsize::new(0),
            budget_bytes,
        });
        for _ in 0..workers {
            let job = job.clone();
            WORKERS.run(Box::new(move || job.run()));
        }
    }
}

/// How many bytes of a trace have room in a budget.
pub fn planned_bytes(trace: &Trace, budget_bytes: u64) -> u64 {
    let count = trace.granules.len().min(granules_of(budget_bytes));
    let all = trace.granules[..count].iter();
    all.map(|one| GRANULE.min(trace.device_bytes - u64::from(one.number) * GRANULE))
        .sum()
}

fn granules_of(bytes: u64) -> usize {
    usize::try_from(bytes / GRANULE).unwrap_or(usize::MAX)
}

impl Job {
    fn run(&self) {
        if self.session_soon().is_none() {
            return;
        }
        let mut scratch = Scratch::default();
        loop {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            let Some((offset, length)) = self.pieces.get(at) else {
                return;
            };
            if self.bring(*offset, offset + length, &mut scratch).is_none() {
                self.next.fetch_add(self.pieces.len(), Ordering::Relaxed);
            }
        }
    }

    /// Brings a piece; None where there is no sense in going on.
    fn bring(&self, offset: u64, end: u64, scratch: &mut Scratch) -> Option<()> {
        let (device, mut at) = (&self.replay.device, offset);
        let mut patience = Patience::new(device.has_latency());
        while at < end {
            if self.replay.came.ahead_bytes() >= self.budget_bytes {
                return None; // pages may be larger than what was planned
            }
            let session = self.session()?;
            let wanted = session.wanted(at, end);
            at = wanted.next;
            if wanted.length == 0 {
                continue;
            }
            patience.stand_back(&session);
            let mut parts = Vec::new();
            if let Err(why) = device.read(wanted.offset, wanted.length as usize, &mut parts) {
                eprintln!(
                    "{}: no more of it is brought ahead: {why}",
                    self.replay.file
                );
                return None;
            }
            let pause = |session: &Session| patience.stand_back(session);
            let filled = session.fill_ahead(wanted.offset, &parts, pause, scratch)?;
            self.replay
                .came
                .ahead_bytes
                .fetch_add(filled, Ordering::Relaxed);
            self.replay.server.seen.stored(&self.replay.file, filled);
        }
        Some(())
    }

    fn session(&self) -> Option<Arc<Session>> {
        let session = self.replay.uffd.session(self.replay.vmm)?;
        (!session.is_over()).then_some(session)
    }

    /// The VMM, which may not be served yet: it is let in before.
    fn session_soon(&self) -> Option<Arc<Session>> {
        let until = Instant::now() + SERVED_MAX;
        loop {
            let session = self.replay.uffd.session(self.replay.vmm);
            if session.is_some() || Instant::now() > until {
                return session;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// For how long faults go first.
struct Patience {
    left: Duration,
}

impl Patience {
    /// Over a medium with latency faults wait for it, and not for us.
    fn new(remote: bool) -> Self {
        Self {
            left: if remote { Duration::ZERO } else { YIELD },
        }
    }

    fn stand_back(&mut self, session: &Session) {
        let begin = Instant::now();
        while session.is_busy() && begin.elapsed() < self.left {
            std::thread::sleep(YIELD_STEP);
        }
        self.left = self.left.saturating_sub(begin.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_planned_keeps_to_the_budget_and_to_the_device() {
        let trace = Trace::empty(3 * GRANULE - 4096).with(&[2, 0], &[0, 2]);
        assert_eq!(planned_bytes(&trace, GRANULE), GRANULE - 4096);
        assert_eq!(planned_bytes(&trace, u64::MAX), 2 * GRANULE - 4096);
        assert_eq!(planned_bytes(&trace, GRANULE - 1), 0);
    }
}
