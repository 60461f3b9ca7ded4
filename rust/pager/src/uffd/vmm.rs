//! The process whose memory is served, and the one rule about its descriptor: the VMM is dead
//! before we close it.
//!
//! Where the last descriptor of a userfaultfd closes, whoever waits and whoever touches later reads
//! zeros. So a [`Vmm`] that is dropped, on whatever path, kills first, waits until nobody is in the
//! address space any more, and closes then. Where that can't be seen within a bound the descriptor
//! stays open for ever: a leak is the lesser evil.

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::process::Process;

use super::ioctl::{Filled, Uffd};
use super::regions::SMALL_BYTES;

/// How long a killed VMM may take to be gone.
const GONE_MAX: Duration = Duration::from_secs(60);
/// How long it takes.
const SOON: Duration = Duration::from_millis(100);

/// How many descriptors may stay open. A peer that hands in the descriptor of a process other than
/// itself gets there; it must not take all that we may have.
const LEAKED_MAX: usize = 64;
static LEAKED: AtomicUsize = AtomicUsize::new(0);

/// Where an address space is asked whether it is still there; the kernel asks that first.
const ANY_PAGE: u64 = 1 << 16;

/// A VMM and the descriptor of its memory.
#[derive(Debug)]
pub struct Vmm {
    /// Its memory.
    uffd: ManuallyDrop<Uffd>,
    /// Itself.
    process: ManuallyDrop<Process>,
}

impl Vmm {
    /// Takes responsibility for it.
    pub fn new(uffd: Uffd, process: Process) -> Self {
        Self {
            uffd: ManuallyDrop::new(uffd),
            process: ManuallyDrop::new(process),
        }
    }

    /// Its memory.
    pub fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Itself.
    pub fn process(&self) -> &Process {
        &self.process
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.process.kill();
        // SAFETY: both are taken here only, once: nobody looks at them after this.
        let corpse = unsafe {
            Corpse {
                uffd: ManuallyDrop::take(&mut self.uffd),
                process: ManuallyDrop::take(&mut self.process),
            }
        };
        if corpse.is_gone(SOON) {
            return;
        }
        // Whoever dropped it has others to serve. A thread that can't be had leaves it open too.
        let corpse = ManuallyDrop::new(corpse);
        let bury = move || {
            if corpse.is_gone(GONE_MAX) || LEAKED.fetch_add(1, Ordering::Relaxed) >= LEAKED_MAX {
                drop(ManuallyDrop::into_inner(corpse));
            }
        };
        let _ = thread::Builder::new().spawn(bury);
    }
}

/// A VMM that was killed and is perhaps not gone yet. Inside of a `ManuallyDrop` it stays open.
#[derive(Debug)]
struct Corpse {
    uffd: Uffd,
    process: Process,
}

impl Corpse {
    /// Whether nobody can touch its memory any more, after waiting at most this long.
    fn is_gone(&self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        if !self.process.ended(wait) {
            return false;
        }
        // Another process may share the address space (vfork), and the last one leaves it a moment
        // after its pidfd says so.
        loop {
            match self.uffd.probe(ANY_PAGE, SMALL_BYTES) {
                Ok(Filled::Gone) => return true,
                // Nothing was ever registered with it.
                Ok(Filled::Failed(Errno::EINVAL)) => return true,
                _ if Instant::now() >= until => return false,
                _ => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}
