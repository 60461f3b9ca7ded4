//! Filling a VMM's memory ahead of it: what it needs of a part of its device, and bytes of that
//! part into its memory. As [`super::fill`] has it: no page that was given back, none that is
//! there.

use std::collections::BTreeSet;

use crate::device::Part;

use super::fill::{Bytes, Window};
use super::ledger::Fact;
use super::serve::Scratch;
use super::session::Session;

/// Pages that are filled by one copy, at most: a fault waits for no longer than that.
const COPIED_PAGES_MAX: u64 = 16;

/// A part of the device that a VMM has nothing of yet, at least at its ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The first byte, of a page.
    pub offset: u64,
    /// How many bytes, whole pages; perhaps none.
    pub length: u64,
    /// Where to look on.
    pub next: u64,
}

impl Session {
    /// What is to be filled of the device's bytes `offset..end`, within one region; pages are
    /// whole, so it may begin before and end behind.
    pub fn wanted(&self, offset: u64, end: u64) -> Wanted {
        let Some((number, from)) = self.region_from(offset) else {
            return Wanted {
                offset,
                length: 0,
                next: end,
            };
        };
        let region = &self.regions.list()[number];
        let size = region.page_size;
        let until = end.min(region.offset + region.size).max(from);
        let first = (from - region.offset) / size;
        let last = (until - region.offset).div_ceil(size);
        let missing = |page: &u64| self.is_missing(number, *page);
        let begin = (first..last).find(missing).unwrap_or(last);
        let end = (begin..last)
            .rev()
            .find(missing)
            .map_or(begin, |page| page + 1);
        Wanted {
            offset: region.offset + begin * size,
            length: (end - begin) * size,
            next: (region.offset + last * size).max(until),
        }
    }

    /// Fills what is missing of the device's bytes from `offset` on, which are `parts` and whole
    /// pages of one region; `pause` is called between two copies. How many bytes were filled; None
    /// where there is no sense in going on.
    pub fn fill_ahead(
        &self,
        offset: u64,
        parts: &[Part],
        mut pause: impl FnMut(&Self),
        scratch: &mut Scratch,
    ) -> Option<u64> {
        let (number, from) = self.region_from(offset)?;
        let region = &self.regions.list()[number];
        let size = region.page_size;
        let length = parts.iter().map(Part::len).sum::<usize>() as u64;
        let (mut page, mut filled) = ((from - region.offset) / size, 0);
        let last = page + length / size;
        let mut left = Cut::new(parts);
        while page < last {
            if self.is_over() {
                return None;
            }
            pause(self);
            let count = (last - page).min(COPIED_PAGES_MAX);
            let window = Window {
                region: number,
                first: page,
                count: count as u32,
            };
            let parts = left.take((count * size) as usize, size as usize)?;
            let now = self.fill_window(window, &parts);
            // Messages that were read in between are nobody else's.
            self.work(scratch);
            filled += u64::from(now?) * size;
            page += count;
        }
        Some(filled)
    }

    fn fill_window(&self, window: Window, parts: &[Part]) -> Option<u32> {
        let filler = self.filler(window);
        if filler.plan(0).data == 0 {
            return Some(0);
        }
        let bytes = Bytes { first: 0, parts };
        // A fault finds out what is wrong with a page; nobody waits for these.
        self.in_order(|| filler.fill(0, &bytes)).ok()
    }

    /// Whether somebody waits for something.
    pub fn is_busy(&self) -> bool {
        let queue = self.lock();
        !queue.pending.is_empty() || !queue.in_hand.is_empty()
    }

    /// The granules of the device that the VMM has something of which it did not give back,
    /// ascending, and how many pages that is.
    pub fn granules(&self, granule_bytes: u64) -> (Vec<u32>, u64) {
        let (mut found, mut pages) = (BTreeSet::new(), 0);
        for (number, region) in self.regions.list().iter().enumerate() {
            for first in (0..region.pages()).step_by(64) {
                let there = self.there(number, first, (region.pages() - first).min(64) as u32);
                pages += u64::from(there.count_ones());
                for page in (0..64).filter(|bit| there >> bit & 1 == 1) {
                    let at = region.offset + (first + page) * region.page_size;
                    let behind = (at + region.page_size).div_ceil(granule_bytes);
                    found.extend((at / granule_bytes) as u32..behind as u32);
                }
            }
        }
        (found.into_iter().collect(), pages)
    }

    /// Which of up to 64 pages of a region are there and were not given back.
    fn there(&self, region: usize, first: u64, count: u32) -> u64 {
        let bit = self.regions.first_bit(region) + first;
        let removed = self.ledger.get(Fact::Removed, bit, count);
        self.ledger.get(Fact::Filled, bit, count) & !removed
    }

    fn is_missing(&self, region: usize, page: u64) -> bool {
        let bit = self.regions.first_bit(region) + page;
        let facts = [Fact::Removed, Fact::Filled];
        facts.iter().all(|fact| self.ledger.get(*fact, bit, 1) == 0)
    }

    /// The region that a byte of the device lies in, or the next one, and the first byte there.
    fn region_from(&self, offset: u64) -> Option<(usize, u64)> {
        let regions = self.regions.list().iter().enumerate();
        let behind = regions.filter(|(_, region)| region.offset + region.size > offset);
        let (number, region) = behind.min_by_key(|(_, region)| region.offset)?;
        Some((number, region.offset.max(offset)))
    }
}

/// Parts that are taken from their front.
struct Cut<'a> {
    parts: &'a [Part],
    /// Bytes that were taken of the first.
    taken: usize,
}

impl<'a> Cut<'a> {
    fn new(parts: &'a [Part]) -> Self {
        Self { parts, taken: 0 }
    }

    /// The next `length` bytes, whole pages in each part; None where there are not so many.
    fn take(&mut self, length: usize, page_size: usize) -> Option<Vec<Part>> {
        let (mut left, mut taken) = (length, Vec::new());
        while left > 0 {
            let part = self.parts.first()?;
            let count = (part.len() - self.taken).min(left);
            taken.push(cut(part, self.taken, count));
            self.taken += count;
            left -= count;
            if self.taken == part.len() {
                (self.parts, self.taken) = (&self.parts[1..], 0);
            }
        }
        if taken.iter().all(|part| part.len() % page_size == 0) {
            return Some(taken);
        }
        let mut bytes = vec![0; length];
        let mut rest = &mut bytes[..];
        for part in taken {
            let (here, behind) = rest.split_at_mut(part.len());
            part.copy_to(here);
            rest = behind;
        }
        Some(vec![Part::Bytes(bytes)])
    }
}

fn cut(part: &Part, from: usize, length: usize) -> Part {
    match part {
        Part::Zeros(_) => Part::Zeros(length),
        Part::Frame(frame, first, _) => Part::Frame(frame.clone(), first + from, length),
        Part::Bytes(bytes) => Part::Bytes(bytes[from..from + length].to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes_of(parts: &[Part]) -> Vec<u8> {
        let mut all = Vec::new();
        for part in parts {
            let mut bytes = vec![1; part.len()];
            part.copy_to(&mut bytes);
            all.extend(bytes);
        }
        all
    }

    proptest! {
        #[test]
        fn what_is_cut_is_what_there_was_in_whole_pages(
            lengths in prop::collection::vec((0..3_u8, 1..9_usize), 1..9),
            step in 1..4_usize,
        ) {
            const PAGE: usize = 4;
            let parts: Vec<Part> = lengths.iter().enumerate().map(|(at, (kind, length))| {
                let bytes = vec![at as u8 + 7; length + 3];
                match kind {
                    0 => Part::Zeros(*length),
                    1 => Part::Frame(bytes.into(), 2, *length),
                    _ => Part::Bytes(vec![at as u8 + 7; *length]),
                }
            }).collect();
            let all = bytes_of(&parts);
            let (mut left, mut got) = (Cut::new(&parts), Vec::new());
            while let Some(taken) = left.take(step * PAGE, PAGE) {
                prop_assert!(taken.iter().all(|part| part.len() % PAGE == 0));
                got.extend(bytes_of(&taken));
            }
            prop_assert_eq!(&got[..], &all[..all.len() / (step * PAGE) * step * PAGE]);
        }
    }
}
