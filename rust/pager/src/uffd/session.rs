//! One VMM that is being served: its messages, what waits, and its end.
//!
//! Two locks. `order` is held alone by whoever reads messages, and shared by whoever fills pages:
//! [`super::fill`] says why. `queue` holds the faults that were read and not answered. Whoever puts
//! faults there serves afterwards, unless as many threads as may be do so already; each of those
//! looks again before it leaves, in the same critical section. So no fault is left lying.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::build::Unreadable;

use super::fill::Window;
use super::host::{Ending, Guest, Keep, Why};
use super::ioctl::{event, Message, FAULT_NOT_MISSING};
use super::ledger::{Fact, Ledger, MESSAGES_MAX};
use super::regions::Regions;
use super::serve::Scratch;
use super::vmm::Vmm;

/// Pages of one window that are waited for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    pub(super) window: Window,
    /// A bit for each.
    pub(super) wanted: u64,
    /// When the first of them was read.
    pub(super) since: Instant,
    pub(super) stalled: bool,
}

/// A fault that has to be tried again.
#[derive(Debug)]
pub(super) struct Stalled {
    pub(super) fault: Fault,
    pub(super) at: Instant,
}

/// A fault that a thread serves.
#[derive(Debug)]
pub(super) struct InHand {
    ticket: u64,
    since: Instant,
    told: bool,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) pending: VecDeque<Fault>,
    pub(super) stalled: Vec<Stalled>,
    pub(super) in_hand: Vec<InHand>,
    next_ticket: u64,
}

/// What is waited for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct State {
    /// Faults that can't be answered for want of bytes.
    pub stalled: usize,
    /// Faults that were read and not answered, without those.
    pub waiting: usize,
    /// Pages that are there.
    pub filled_pages: u64,
    /// Pages that were given back.
    pub removed_pages: u64,
    /// All pages.
    pub pages: u64,
}

/// An answer that takes longer is one that nobody else should wait for; nothing that is in memory
/// does, also not on a machine that is busy.
const SLOW: Duration = Duration::from_millis(2);
/// So many quick answers after a slow one, and it is taken for chance.
const QUICK: u32 = 64;

/// One VMM.
#[derive(Debug)]
pub struct Session {
    // Dropped first: the VMM dies before anything else of it goes.
    vmm: Vmm,
    id: u64,
    pid: i32,
    pub(super) regions: Regions,
    pub(super) ledger: Ledger,
    guest: OnceLock<Guest>,
    pub(super) order: RwLock<()>,
    queue: Mutex<Queue>,
    ending: OnceLock<Ending>,
    /// Quick answers that are wanted.
    slow: AtomicU32,
    stream: Option<UnixStream>,
}

impl Session {
    /// A VMM that nobody served before.
    pub fn new(
        id: u64,
        pid: i32,
        vmm: Vmm,
        regions: Regions,
        ledger: Ledger,
        stream: Option<UnixStream>,
    ) -> Self {
        Self {
            vmm,
            id,
            pid,
            regions,
            ledger,
            guest: OnceLock::new(),
            order: RwLock::default(),
            queue: Mutex::default(),
            ending: OnceLock::new(),
            slow: AtomicU32::new(1),
            stream,
        }
    }

    /// Notes what a predecessor read and did not get to note, and has whoever waits ask again: the
    /// faults that it read and did not answer are lost else.
    ///
    /// # Errors
    /// Where the kernel refuses: the VMM is to be killed.
    pub fn take_up(&self) -> Result<(), Why> {
        for message in self.ledger.unsettled() {
            if let event::REMOVE | event::UNMAP = message.event {
                self.note_removed(&message);
            }
        }
        self.ledger.settle(MESSAGES_MAX);
        for region in self.regions.list() {
            let woken = self.vmm.uffd().wake(region.base, region.size);
            woken.map_err(|error| Why::Kernel(error.to_string()))?;
        }
        Ok(())
    }

    /// Says what it is served with, once.
    pub fn equip(&self, guest: Guest) {
        let first = self.guest.set(guest).is_ok();
        debug_assert!(first);
    }

    /// The name of the VMM.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        &self.vmm
    }

    /// What has to be kept of it.
    pub fn keep(&self) -> Keep<'_> {
        Keep {
            uffd: self.vmm.uffd().as_fd(),
            vmm: self.vmm.process().as_fd(),
            ledger: self.ledger.file(),
            regions: self.regions.list(),
            pid: self.pid,
            stream: self.stream.as_ref().map(AsFd::as_fd),
        }
    }

    /// What is waited for now.
    pub fn state(&self) -> State {
        let queue = self.lock();
        State {
            stalled: queue.stalled.len(),
            waiting: queue.pending.len() + queue.in_hand.len(),
            filled_pages: self.ledger.count(Fact::Filled),
            removed_pages: self.ledger.count(Fact::Removed),
            pages: self.regions.pages(),
        }
    }

    /// Kills the VMM, for a reason that counts where it is the first.
    pub fn kill(&self, why: Why) {
        if self.ending.set(Ending::Killed(why.clone())).is_ok() {
            if let Some(guest) = self.guest.get() {
                guest.witness.killing(&why);
            }
            self.vmm.process().kill();
        }
    }

    /// The VMM is gone: tells whoever counts, once.
    pub fn gone(&self) {
        let ending = self.ending.get_or_init(|| Ending::Exited);
        if let Some(guest) = self.guest.get() {
            guest.witness.ended(ending);
        }
    }

    /// Whether nothing is to be served any more.
    pub fn is_over(&self) -> bool {
        self.ending.get().is_some()
    }

    /// Whether its answers take long, or nobody knows yet.
    pub fn is_slow(&self) -> bool {
        self.slow.load(Ordering::Relaxed) > 0
    }

    pub(super) fn note_latency(&self, latency: Duration) {
        let order = Ordering::Relaxed;
        let left = self.slow.load(order);
        if latency > SLOW {
            self.slow.store(QUICK, order);
        } else if left > 0 {
            self.slow.store(left - 1, order);
        }
    }

    /// Reads all messages; how many threads would find something to do now.
    pub fn ready(&self) -> usize {
        if let Err(why) = self.drain() {
            self.kill(why);
        }
        let queue = self.lock();
        let room = self.parallel().saturating_sub(queue.in_hand.len());
        queue.pending.len().min(room)
    }

    /// Serves what waits, as long as something does. Returns at once where enough threads do so.
    pub fn work(&self, scratch: &mut Scratch) {
        let mut queue = self.lock();
        while queue.in_hand.len() < self.parallel() && !self.is_over() {
            let Some(fault) = queue.pending.pop_front() else {
                return;
            };
            let ticket = queue.next_ticket;
            queue.next_ticket += 1;
            queue.in_hand.push(InHand {
                ticket,
                since: fault.since,
                told: false,
            });
            drop(queue);
            if catch_unwind(AssertUnwindSafe(|| self.serve(fault, scratch))).is_err() {
                *scratch = Scratch::default();
                self.kill(Why::Panicked);
            }
            queue = self.lock();
            queue.in_hand.retain(|in_hand| in_hand.ticket != ticket);
        }
    }

    /// Looks after what waits: faults that are to be tried again become work, and one that a thread
    /// has not answered within the bound ends the VMM. Whether there is work, and when to look
    /// again.
    pub fn tend(&self, now: Instant) -> (bool, Option<Instant>) {
        let Some(guest) = self.guest.get().filter(|_| !self.is_over()) else {
            return (false, None);
        };
        let (stall_max, mut hung, mut slow) = (guest.options.stall_max, false, false);
        let mut queue = self.lock();
        for fault in &mut queue.in_hand {
            let waits = now.saturating_duration_since(fault.since);
            // A read may begin just before the bound, and then has its own.
            hung |= waits > 2 * stall_max;
            if waits > stall_max / 4 && !fault.told {
                fault.told = true;
                slow = true;
            }
        }
        let (due, left): (Vec<_>, Vec<_>) = std::mem::take(&mut queue.stalled)
            .into_iter()
            .partition(|stalled| stalled.at <= now);
        queue.stalled = left;
        let work = !due.is_empty();
        queue
            .pending
            .extend(due.into_iter().map(|stalled| stalled.fault));
        let again = queue.stalled.iter().map(|stalled| stalled.at).min();
        drop(queue);
        if slow {
            let blob = "the device";
            let why = Unreadable::away(blob, "it does not answer");
            guest.witness.stalled(&why);
        }
        if hung {
            self.kill(Why::Hung);
        }
        (work, again)
    }

    /// The window of a page: aligned in the device, so that windows of one device are the same
    /// for all of its VMMs, and none beyond its region.
    pub(super) fn window(&self, number: usize, page: u64) -> Window {
        let region = &self.regions.list()[number];
        let pages = self.guest().options.window_pages(region.page_size);
        let before = region.offset / region.page_size;
        let first = ((before + page) / pages * pages).max(before) - before;
        let end = ((before + page) / pages * pages + pages - before).min(region.pages());
        Window {
            region: number,
            first,
            count: (end - first) as u32,
        }
    }

    /// Reads messages until there are none, and notes what they say.
    pub(super) fn drain(&self) -> Result<(), Why> {
        let _alone = self.order.write().unwrap_or_else(PoisonError::into_inner);
        loop {
            let read = |place: &mut [u8]| nix::unistd::read(self.vmm.uffd(), place);
            let messages = match self.ledger.take(read) {
                Ok(messages) => messages,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(Why::Kernel(error.to_string())),
            };
            let noted = messages.iter().try_for_each(|message| self.note(message));
            self.ledger.settle(messages.len());
            noted?;
            if messages.len() < MESSAGES_MAX {
                return Ok(());
            }
        }
    }

    fn note(&self, message: &Message) -> Result<(), Why> {
        match message.event {
            event::PAGEFAULT if message.args[0] & FAULT_NOT_MISSING == 0 => {
                let at = message.args[1];
                let (region, page) = self.regions.find(at).ok_or(Why::Stray(at))?;
                self.push(self.window(region, page), page);
                Ok(())
            }
            event::REMOVE | event::UNMAP => {
                self.note_removed(message);
                Ok(())
            }
            other => Err(Why::Unknown(other)),
        }
    }

    fn note_removed(&self, message: &Message) {
        let mut pages = 0;
        for (first, count) in self.regions.pages_of(message.args[0], message.args[1]) {
            self.ledger.remove(first, count);
            pages += count;
        }
        if let Some(guest) = self.guest.get() {
            guest.witness.removed(pages);
        }
    }

    /// One more page that is waited for; faults of one window are answered together.
    fn push(&self, window: Window, page: u64) {
        let wanted = 1 << (page - window.first);
        let mut queue = self.lock();
        let same = queue
            .pending
            .iter_mut()
            .find(|fault| fault.window == window);
        match same {
            Some(fault) => fault.wanted |= wanted,
            None => queue.pending.push_back(Fault {
                window,
                wanted,
                since: Instant::now(),
                stalled: false,
            }),
        }
    }

    pub(super) fn guest(&self) -> &Guest {
        let Some(guest) = self.guest.get() else {
            unreachable!("messages are read after the guest is known")
        };
        guest
    }

    fn parallel(&self) -> usize {
        self.guest().options.parallel.max(1)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
