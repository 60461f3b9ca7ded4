//! Which granules of a file the kernel was given: those that it asked for, in order, and those that
//! were stored ahead of it.
//!
//! It says what need not be brought again, and what a trace is made of; what the page cache has
//! dropped since is not known here, and is asked for as anything else.

use crate::trace::{GRANULE, GRANULES_MAX};

/// Granules as bits.
#[derive(Debug, Clone, Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn has(&self, number: u32) -> bool {
        let word = self.0.get(number as usize / 64).copied().unwrap_or(0);
        word >> (number % 64) & 1 == 1
    }

    /// Whether it was not there before.
    fn add(&mut self, number: u32) -> bool {
        let at = number as usize / 64;
        if self.0.len() <= at {
            self.0.resize(at + 1, 0);
        }
        let new = !self.has(number);
        self.0[at] |= 1 << (number % 64);
        new
    }

    /// Those that are there, ascending.
    fn all(&self) -> impl Iterator<Item = u32> + '_ {
        let words = self.0.iter().enumerate().filter(|(_, word)| **word != 0);
        words.flat_map(|(at, word)| {
            let bits = (0..64).filter(move |bit| word >> bit & 1 == 1);
            bits.map(move |bit| at as u32 * 64 + bit)
        })
    }
}

/// What the kernel was given of one file.
#[derive(Debug, Clone, Default)]
pub struct Given {
    read: Bits,
    order: Vec<u32>,
    stored: Bits,
    stored_count: u64,
    used: Bits,
    late: bool,
}

impl Given {
    /// What was given before is not known: a predecessor did it.
    pub fn late() -> Self {
        Self {
            late: true,
            ..Self::default()
        }
    }

    /// Whether there was a predecessor, which knew more.
    pub fn is_late(&self) -> bool {
        self.late
    }

    /// The kernel asked for these bytes.
    pub fn read(&mut self, offset: u64, size_bytes: u64) {
        for number in granules(offset, size_bytes) {
            if self.read.add(number) && self.order.len() < GRANULES_MAX {
                self.order.push(number);
            }
        }
    }

    /// Takes a granule to be stored ahead; false where the kernel has it or somebody is at it.
    pub fn take(&mut self, number: u32) -> bool {
        let new = !self.read.has(number) && self.stored.add(number);
        self.stored_count += u64::from(new);
        new
    }

    /// The granules that the kernel asked for, in order.
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// The order in which these granules, ascending, were first asked for, as far as it is known.
    /// What was asked of a predecessor came before all that was asked of us.
    pub fn order_of(&self, touched: &[u32]) -> Vec<u32> {
        let unseen = touched.iter().filter(|number| !self.read.has(**number));
        let before = unseen.filter(|_| self.late).copied();
        before.chain(self.order.iter().copied()).collect()
    }

    /// How many granules were stored ahead.
    pub fn stored_count(&self) -> u64 {
        self.stored_count
    }

    /// Whether a granule was stored ahead.
    pub fn was_stored(&self, number: u32) -> bool {
        self.stored.has(number)
    }

    /// The granules that were stored ahead, ascending, as runs: the first and how many.
    pub fn stored_runs(&self) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for number in self.stored.all() {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == number => *count += 1,
                _ => runs.push((number, 1)),
            }
        }
        runs
    }

    /// A granule was seen to be touched; true the first time, where it had been stored ahead.
    pub fn use_stored(&mut self, number: u32) -> bool {
        self.stored.has(number) && self.used.add(number)
    }
}

/// The granules that some bytes lie in.
pub fn granules(offset: u64, size_bytes: u64) -> impl Iterator<Item = u32> {
    let end = (offset + size_bytes).div_ceil(GRANULE);
    // 2^44 bytes at most: 2^28 granules.
    (offset / GRANULE..end).map(|number| number as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_granule_is_given_once() {
        let mut given = Given::default();
        given.read(10 * GRANULE - 1, 2);
        given.read(3 * GRANULE, GRANULE);
        given.read(9 * GRANULE, 4096);
        assert_eq!(given.order(), [9, 10, 3]);
        assert!(!given.take(10) && given.take(200) && !given.take(200));
        assert!(given.was_stored(200) && !given.was_stored(10));
        assert_eq!(given.stored_count(), 1);
        given.read(200 * GRANULE, 1);
        assert_eq!(given.order().last(), Some(&200));
    }

    #[test]
    fn what_was_stored_is_used_once() {
        let mut given = Given::default();
        for number in [63, 64, 200, 5, 65] {
            assert!(given.take(number));
        }
        assert_eq!(given.stored_runs(), [(5, 1), (63, 3), (200, 1)]);
        assert!(given.use_stored(64) && !given.use_stored(64) && !given.use_stored(7));
    }

    #[test]
    fn what_a_predecessor_was_asked_for_came_first() {
        let (mut whole, mut late) = (Given::default(), Given::late());
        for given in [&mut whole, &mut late] {
            given.read(9 * GRANULE, 1);
            given.read(4 * GRANULE, 1);
        }
        assert_eq!(whole.order_of(&[2, 4, 7, 9]), [9, 4]);
        assert_eq!(late.order_of(&[2, 4, 7, 9]), [2, 7, 9, 4]);
        assert!(late.is_late() && !whole.is_late());
    }
}
