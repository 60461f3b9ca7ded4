//! Filling pages of a VMM, so that no page ever shows what was given back.
//!
//! The order that makes it right: *the facts about a page are looked at and the page is filled
//! while no message is read* (the caller holds `order` for that; messages are read by whoever holds
//! it alone). Then, for a page p that is filled with the device's bytes:
//! - a REMOVE of p that was read before is in the ledger: it was found there;
//! - one that is queued, or was read and its thread has not run on, answers EAGAIN: it is read
//!   next, and the page is decided anew;
//! - one that is queued later waits to be read until the fill is over, and drops the page then.

use nix::errno::Errno;

use crate::build::Unreadable;
use crate::device::Part;

use super::ioctl::{Filled, Uffd};
use super::ledger::{mask, Fact, Ledger};
use super::regions::{Region, HUGE_BYTES};

/// Pages that are filled together, at most 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Their region.
    pub region: usize,
    /// The first of them in its region.
    pub first: u64,
    /// How many.
    pub count: u32,
}

/// Why a window could not be filled.
#[derive(Debug)]
pub enum Trouble {
    /// Its bytes can't be had.
    Unreadable(Unreadable),
    /// A message has to be read first.
    Changing,
    /// The VMM is gone.
    Gone,
    /// A page that was filled and not given back is missing.
    Vanished(u64),
    /// The kernel refuses.
    Kernel(Errno),
}

/// The bytes of some pages of a window, whole pages in each part.
#[derive(Debug)]
pub struct Bytes<'a> {
    /// The first of these pages in the window.
    pub first: u32,
    /// Their bytes.
    pub parts: &'a [Part],
}

/// What a window needs, a bit for each page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// The device's bytes.
    pub data: u64,
    /// Zeros: they were given back, and are waited for.
    pub zeros: u64,
    /// A look: they should be there.
    pub check: u64,
}

/// One window of one VMM, being filled.
#[derive(Debug)]
pub struct Filler<'a> {
    /// The VMM's memory.
    pub uffd: &'a Uffd,
    /// What is known of its pages.
    pub ledger: &'a Ledger,
    /// The window's region.
    pub region: &'a Region,
    /// The number of the window's first page among all pages.
    pub first_bit: u64,
    /// The window.
    pub window: Window,
}

impl Filler<'_> {
    /// What the window needs where these of its pages are waited for, or where none is and it is
    /// filled ahead. Pages that were given back are filled only where they are waited for: the VMM
    /// did not want their memory.
    pub fn plan(&self, wanted: u64) -> Plan {
        let (first, count) = (self.first_bit, self.window.count);
        let removed = self.ledger.get(Fact::Removed, first, count);
        let filled = self.ledger.get(Fact::Filled, first, count);
        // Who waits for zeros only does not wait for the device.
        let zeros_only = wanted != 0 && wanted & !removed == 0;
        let data = if zeros_only { 0 } else { mask(count) };
        Plan {
            data: data & !removed & !filled,
            zeros: removed & wanted,
            check: filled & !removed & wanted,
        }
    }

    /// Fills what the plan says; how many pages were filled. The caller holds `order`.
    ///
    /// # Errors
    /// Any [`Trouble`]; pages that were filled before it stay.
    pub fn fill(&self, wanted: u64, bytes: &Bytes<'_>) -> Result<u32, Trouble> {
        let plan = self.plan(wanted);
        let mut done = Done::default();
        let result = self.fill_plan(&plan, bytes, &mut done);
        self.ledger
            .set(Fact::Filled, self.first_bit, done.there | done.filled);
        if done.there != 0 || done.unmapped || plan.check != 0 {
            // Somebody else filled them: who waits may have come too late to be woken by that.
            let (at, len) = self.range(0, self.window.count);
            self.uffd.wake(at, len).map_err(kernel)?;
        }
        result.map(|()| done.filled.count_ones())
    }

    fn fill_plan(&self, plan: &Plan, bytes: &Bytes<'_>, done: &mut Done) -> Result<(), Trouble> {
        let mut page = bytes.first;
        let mut left = plan.data;
        for part in bytes.parts {
            let count = (part.len() as u64 / self.region.page_size) as u32;
            let here = mask(count.min(64)) << page;
            for (first, count) in runs(left & here) {
                self.fill_run(part, first - page, (first, count), done)?;
            }
            left &= !here;
            page += count;
            if page >= self.window.count {
                break;
            }
        }
        if left != 0 {
            // More is needed than was fetched: what was known when it was fetched is not so now.
            return Err(Trouble::Changing);
        }
        for run in runs(plan.zeros) {
            self.zero_run(run, done)?;
        }
        runs(plan.check).try_for_each(|run| self.check_run(run))
    }

    /// Pages `run` of the window are those of `part` from its page `inside` on.
    fn fill_run(
        &self,
        part: &Part,
        inside: u32,
        run: (u32, u32),
        done: &mut Done,
    ) -> Result<(), Trouble> {
        let page_size = self.region.page_size as usize;
        let from = inside as usize * page_size;
        let bytes = match part {
            Part::Zeros(_) => return self.zero_run(run, done),
            Part::Frame(frame, first, length) => &frame[first + from..first + length],
            Part::Bytes(bytes) => &bytes[from..],
        };
        self.each(run, done, |at, first, count| {
            let from = (first - run.0) as usize * page_size;
            self.uffd
                .copy(at, &bytes[from..from + count as usize * page_size])
        })
    }

    fn zero_run(&self, run: (u32, u32), done: &mut Done) -> Result<(), Trouble> {
        let size = self.region.page_size;
        if size == HUGE_BYTES {
            let zeros =
                super::memory::zeros(size as usize).map_err(|_| Trouble::Kernel(Errno::ENOMEM))?;
            return self.each((run.0, 1), done, |at, _, _| self.uffd.copy(at, zeros));
        }
        self.each(run, done, |at, _, count| {
            self.uffd.zero(at, u64::from(count) * size)
        })
    }

    /// Fills a run, around pages that are there already.
    fn each(
        &self,
        (mut first, mut count): (u32, u32),
        done: &mut Done,
        how: impl Fn(u64, u32, u32) -> Filled,
    ) -> Result<(), Trouble> {
        let mut at_once = count;
        while count > 0 {
            let step = count.min(at_once);
            let advance = match how(self.range(first, step).0, first, step) {
                Filled::Bytes(bytes) => {
                    let pages = ((bytes / self.region.page_size) as u32).clamp(1, step);
                    done.filled |= mask(pages) << first;
                    pages
                }
                Filled::Present => {
                    done.there |= 1 << first;
                    1
                }
                // Perhaps two mappings meet in the run.
                Filled::Unmapped if step > 1 => {
                    at_once = 1;
                    0
                }
                // Who waits for it finds out when he looks again.
                Filled::Unmapped => {
                    done.unmapped = true;
                    1
                }
                Filled::Changing => return Err(Trouble::Changing),
                Filled::Gone => return Err(Trouble::Gone),
                Filled::Failed(error) => return Err(Trouble::Kernel(error)),
            };
            first += advance;
            count -= advance;
        }
        Ok(())
    }

    /// Pages that were filled and not given back are there, or nobody knows what they should be.
    ///
    /// Poisoning asks that without a moment in which anybody could see a wrong byte: a page that is
    /// there is left alone, EEXIST. (A COPY that can't succeed does not tell: it reads its source
    /// before it looks.) Before Linux 6.6 such a page is taken for one that was given back.
    fn check_run(&self, run: (u32, u32)) -> Result<(), Trouble> {
        for page in run.0..run.0 + run.1 {
            let (at, len) = self.range(page, 1);
            match self.uffd.poison(at, len) {
                Filled::Present | Filled::Unmapped => {}
                Filled::Bytes(_) => return Err(Trouble::Vanished(at)),
                Filled::Changing => return Err(Trouble::Changing),
                Filled::Gone => return Err(Trouble::Gone),
                Filled::Failed(Errno::EINVAL) => self.zero_run((page, 1), &mut Done::default())?,
                Filled::Failed(error) => return Err(Trouble::Kernel(error)),
            }
        }
        Ok(())
    }

    /// Makes touches of these pages fail; those that were given back stay zeros. The caller holds
    /// `order`.
    ///
    /// # Errors
    /// Any [`Trouble`].
    pub fn poison(&self, wanted: u64) -> Result<(), Trouble> {
        let removed = self
            .ledger
            .get(Fact::Removed, self.first_bit, self.window.count);
        let mut done = Done::default();
        for run in runs(wanted & !removed) {
            self.each(run, &mut done, |at, _, count| {
                self.uffd
                    .poison(at, u64::from(count) * self.region.page_size)
            })?;
        }
        Ok(())
    }

    /// Address and length of pages of the window.
    fn range(&self, first: u32, count: u32) -> (u64, u64) {
        let at = self.region.address(self.window.first + u64::from(first));
        (at, u64::from(count) * self.region.page_size)
    }
}

/// What came of it, a bit for each page.
#[derive(Debug, Default)]
struct Done {
    /// By us.
    filled: u64,
    /// Before.
    there: u64,
    /// Whether some are nowhere.
    unmapped: bool,
}

/// The runs of set bits: (first, count).
fn runs(mut bits: u64) -> impl Iterator<Item = (u32, u32)> {
    std::iter::from_fn(move || {
        let first = bits.trailing_zeros();
        let count = bits.checked_shr(first)?.trailing_ones();
        bits &= !(mask(count) << first);
        Some((first, count))
    })
}

fn kernel(error: std::io::Error) -> Trouble {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ESRCH) => Trouble::Gone,
        Some(error) => Trouble::Kernel(error),
        None => Trouble::Kernel(Errno::EIO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_the_bits(bits: u64, more: u64) {
            let bits = bits & more;
            let all = runs(bits).fold(0, |all, (first, count)| {
                assert_eq!(all & (mask(count) << first), 0);
                assert!(first + count == 64 || bits >> (first + count) & 1 == 0);
                all | mask(count) << first
            });
            prop_assert_eq!(all, bits);
        }
    }
}
