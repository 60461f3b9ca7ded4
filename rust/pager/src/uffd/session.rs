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
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::build::Unreadable;
use crate::device::{Origin, Part};

use super::fill::{Bytes, Filler, Trouble, Window};
use super::host::{Ending, Guest, Keep, OnBad, Served, Why};
use super::ioctl::{event, Message, FAULT_NOT_MISSING};
use super::ledger::{Fact, Ledger, MESSAGES_MAX};
use super::regions::Regions;
use super::vmm::Vmm;

/// What a thread needs to serve, kept from fault to fault.
#[derive(Debug, Default)]
pub struct Scratch {
    parts: Vec<Part>,
}

/// Pages of one window that are waited for.
#[derive(Debug, Clone, Copy)]
struct Fault {
    window: Window,
    /// A bit for each.
    wanted: u64,
    /// When the first of them was read.
    since: Instant,
    stalled: bool,
}

/// A fault that has to be tried again.
#[derive(Debug)]
struct Stalled {
    fault: Fault,
    at: Instant,
}

/// A fault that a thread serves.
#[derive(Debug)]
struct InHand {
    ticket: u64,
    since: Instant,
    told: bool,
}

#[derive(Debug, Default)]
struct Queue {
    pending: VecDeque<Fault>,
    stalled: Vec<Stalled>,
    in_hand: Vec<InHand>,
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
    regions: Regions,
    ledger: Ledger,
    guest: OnceLock<Guest>,
    order: RwLock<()>,
    queue: Mutex<Queue>,
    ending: OnceLock<Ending>,
    /// Quick answers that are wanted.
    slow: AtomicU32,
    _stream: Option<UnixStream>,
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
            _stream: stream,
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
        if self.ending.set(Ending::Killed(why)).is_ok() {
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

    fn note_latency(&self, latency: Duration) {
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
    /// has not answered within the bound ends the VMM. Whether there is work, and when to look again.
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

    /// Fills pages ahead of the VMM, from the device's byte `offset` on, verified and in windows.
    /// Stops where somebody waits for something. Returns how far it came, in the device, and how
    /// many pages were filled.
    ///
    /// # Errors
    /// Where bytes can't be had: nothing is lost, nobody waits for them.
    pub fn prefill(
        &self,
        offset: u64,
        end: u64,
        scratch: &mut Scratch,
    ) -> Result<(u64, u64), Unreadable> {
        let result = self.prefill_windows(offset, end, scratch);
        // Messages that were read in between are nobody else's.
        self.work(scratch);
        result
    }

    fn prefill_windows(
        &self,
        offset: u64,
        end: u64,
        scratch: &mut Scratch,
    ) -> Result<(u64, u64), Unreadable> {
        let (mut at, mut pages) = (offset, 0);
        while at < end && !self.is_over() {
            let queue = self.lock();
            let busy = !queue.pending.is_empty() || !queue.in_hand.is_empty();
            drop(queue);
            if busy {
                break;
            }
            let Some((window, next)) = self.window_of_offset(at) else {
                at += self.guest().options.window_bytes;
                continue;
            };
            let fault = Fault {
                window,
                wanted: 0,
                since: Instant::now(),
                stalled: false,
            };
            match self.answer(&fault, scratch) {
                Ok((_, filled)) => pages += u64::from(filled),
                Err(Trouble::Unreadable(why)) => return Err(why),
                Err(_) => break,
            }
            at = next;
        }
        Ok((at, pages))
    }

    /// The window at an offset of the device, and the offset where the next begins.
    fn window_of_offset(&self, offset: u64) -> Option<(Window, u64)> {
        let mut regions = self.regions.list().iter().enumerate();
        let (number, region) = regions
            .find(|(_, region)| (region.offset..region.offset + region.size).contains(&offset))?;
        let window = self.window(number, (offset - region.offset) / region.page_size);
        let end = window.first + u64::from(window.count);
        Some((window, region.offset + end * region.page_size))
    }

    /// The window of a page: aligned in the device, so that windows of one device are the same
    /// for all of its VMMs, and none beyond its region.
    fn window(&self, number: usize, page: u64) -> Window {
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
    fn drain(&self) -> Result<(), Why> {
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

    fn serve(&self, fault: Fault, scratch: &mut Scratch) {
        match self.answer(&fault, scratch) {
            Ok((origin, filled)) => {
                let latency = fault.since.elapsed();
                self.note_latency(latency);
                self.guest().witness.served(&Served {
                    origin,
                    latency,
                    pages: fault.wanted.count_ones(),
                    bytes: u64::from(filled) * self.regions.list()[fault.window.region].page_size,
                    stalled: fault.stalled,
                });
            }
            // Its pidfd says so too.
            Err(Trouble::Gone | Trouble::Changing) => {}
            // Perhaps it is a page of the window that nobody waits for.
            Err(Trouble::Unreadable(_)) if fault.window.count > 1 => self.split(&fault),
            Err(Trouble::Unreadable(why)) => self.stall(fault, why),
            Err(Trouble::Vanished(at)) => self.kill(Why::Vanished(at)),
            Err(Trouble::Kernel(error @ (Errno::ENOMEM | Errno::ENOSPC))) => {
                self.stall(fault, Unreadable::away("memory", error));
            }
            Err(Trouble::Kernel(error)) => self.kill(Why::Kernel(error.to_string())),
        }
    }

    /// Fills a window; where the bytes came from, and how many pages were filled.
    fn answer(&self, fault: &Fault, scratch: &mut Scratch) -> Result<(Origin, u32), Trouble> {
        let filler = self.filler(fault.window);
        let (mut first, mut origin) = (0, Origin::Zero);
        scratch.parts.clear();
        let data = filler.plan(fault.wanted).data;
        if data != 0 {
            let end = u64::BITS - data.leading_zeros();
            first = data.trailing_zeros();
            origin = self.fetch(&filler, first, end - first, scratch)?;
        }
        let bytes = Bytes {
            first,
            parts: &scratch.parts,
        };
        let filled = self.in_order(|| filler.fill(fault.wanted, &bytes));
        scratch.parts.clear();
        Ok((origin, filled?))
    }

    /// Does something that messages must not come between, again as long as one does.
    fn in_order<T>(&self, act: impl Fn() -> Result<T, Trouble>) -> Result<T, Trouble> {
        for tries in 0_u32.. {
            let shared = self.order.read().unwrap_or_else(PoisonError::into_inner);
            let result = act();
            drop(shared);
            if !matches!(result, Err(Trouble::Changing)) || self.is_over() {
                return result;
            }
            if let Err(why) = self.drain() {
                self.kill(why);
                break;
            }
            // The thread whose message was read has to run before the kernel lets us go on.
            match tries {
                0..8 => thread::yield_now(),
                _ => thread::sleep(Duration::from_micros(50 << (tries - 8).min(5))),
            }
        }
        Err(Trouble::Changing)
    }

    /// Reads pages of a window, whole pages in each part.
    fn fetch(
        &self,
        filler: &Filler<'_>,
        first: u32,
        count: u32,
        scratch: &mut Scratch,
    ) -> Result<Origin, Trouble> {
        let page_size = filler.region.page_size;
        let page = filler.window.first + u64::from(first);
        let offset = filler.region.offset + page * page_size;
        let size = u64::from(count) as usize * page_size as usize;
        let read = self.guest().pages.read(offset, size, &mut scratch.parts);
        let origin = read.map_err(Trouble::Unreadable)?;
        if are_whole_pages(&scratch.parts, size, page_size as usize) {
            return Ok(origin);
        }
        let got: usize = scratch.parts.iter().map(Part::len).sum();
        if got != size {
            let cause = format!("{got} bytes at {offset}, {size} were asked for");
            return Err(Trouble::Unreadable(Unreadable::damaged(
                "the device",
                cause,
            )));
        }
        let mut bytes = vec![0; size];
        let mut left = &mut bytes[..];
        for part in scratch.parts.drain(..) {
            let (here, rest) = left.split_at_mut(part.len());
            part.copy_to(here);
            left = rest;
        }
        scratch.parts.push(Part::Bytes(bytes));
        Ok(origin)
    }

    /// Each page that is waited for alone.
    fn split(&self, fault: &Fault) {
        let count = fault.window.count;
        let pages = (0..count).filter(|page| fault.wanted >> page & 1 == 1);
        let mut queue = self.lock();
        for page in pages {
            let first = fault.window.first + u64::from(page);
            let window = Window {
                first,
                count: 1,
                ..fault.window
            };
            queue.pending.push_front(Fault {
                window,
                wanted: 1,
                ..*fault
            });
        }
    }

    /// A fault that can't be answered now waits; one that has waited long enough is the end.
    fn stall(&self, mut fault: Fault, why: Unreadable) {
        let options = self.guest().options;
        let now = Instant::now();
        let until = fault.since + options.stall_max;
        if !fault.stalled {
            fault.stalled = true;
            self.guest().witness.stalled(&why);
        }
        if now < until {
            // The last try is at the bound.
            let at = until.min(now + options.retry_after);
            self.lock().stalled.push(Stalled { fault, at });
            return;
        }
        let poison = || self.filler(fault.window).poison(fault.wanted);
        if options.on_bad == OnBad::Poison && self.in_order(poison).is_ok() {
            self.guest().witness.poisoned(&why);
            return;
        }
        self.kill(Why::Unreadable(why));
        // For whoever else looks at its memory: an error, not zeros. The dead don't mind if not.
        let _ = self.in_order(poison);
    }

    fn filler(&self, window: Window) -> Filler<'_> {
        Filler {
            uffd: self.vmm.uffd(),
            ledger: &self.ledger,
            region: &self.regions.list()[window.region],
            first_bit: self.regions.first_bit(window.region) + window.first,
            window,
        }
    }

    fn guest(&self) -> &Guest {
        let Some(guest) = self.guest.get() else {
            unreachable!("messages are read after the guest is known")
        };
        guest
    }

    fn parallel(&self) -> usize {
        self.guest().options.parallel.max(1)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether parts are as many bytes as they should be, whole pages in each.
fn are_whole_pages(parts: &[Part], size: usize, page_size: usize) -> bool {
    let whole = parts.iter().all(|part| part.len() % page_size == 0);
    whole && parts.iter().map(Part::len).sum::<usize>() == size
}
