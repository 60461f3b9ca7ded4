//! Answering faults: bytes from the source, into the VMM's memory, and what is done where that
//! can't be.

use std::sync::PoisonError;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::build::Unreadable;
use crate::device::{Origin, Part};

use super::fill::{Bytes, Filler, Trouble, Window};
use super::host::{OnBad, Served, Why};
use super::session::{Fault, Session, Stalled};

/// What a thread needs to serve, kept from fault to fault.
#[derive(Debug, Default)]
pub struct Scratch {
    parts: Vec<Part>,
}

/// How a window was filled.
struct Answer {
    origin: Origin,
    /// Pages.
    filled: u32,
}

impl Session {
    /// Answers a fault, or has it tried again, or ends the VMM.
    pub(super) fn serve(&self, fault: Fault, scratch: &mut Scratch) {
        match self.answer(&fault, scratch) {
            Ok(Answer { origin, filled }) => {
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

    /// Fills a window.
    fn answer(&self, fault: &Fault, scratch: &mut Scratch) -> Result<Answer, Trouble> {
        let filler = self.filler(fault.window);
        let (mut first, mut origin) = (0, Origin::Zero);
        scratch.parts.clear();
        let data = filler.plan(fault.wanted).data;
        if data != 0 {
            let end = u64::BITS - data.leading_zeros();
            first = data.trailing_zeros();
            origin = self.fetch(&filler, first, end - first, scratch)?;
            let page_size = filler.region.page_size;
            let page = filler.window.first + u64::from(first);
            let length = u64::from(end - first) * page_size;
            let offset = filler.region.offset + page * page_size;
            self.guest().witness.read(offset, length);
        }
        let bytes = Bytes {
            first,
            parts: &scratch.parts,
        };
        let filled = self.in_order(|| filler.fill(fault.wanted, &bytes));
        scratch.parts.clear();
        Ok(Answer {
            origin,
            filled: filled?,
        })
    }

    /// Does something that messages must not come between, again as long as one does.
    pub(super) fn in_order<T>(&self, act: impl Fn() -> Result<T, Trouble>) -> Result<T, Trouble> {
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

    pub(super) fn filler(&self, window: Window) -> Filler<'_> {
        Filler {
            uffd: self.vmm().uffd(),
            ledger: &self.ledger,
            region: &self.regions.list()[window.region],
            first_bit: self.regions.first_bit(window.region) + window.first,
            window,
        }
    }
}

/// Whether parts are as many bytes as they should be, whole pages in each.
fn are_whole_pages(parts: &[Part], size: usize, page_size: usize) -> bool {
    let whole = parts.iter().all(|part| part.len() % page_size == 0);
    whole && parts.iter().map(Part::len).sum::<usize>() == size
}
