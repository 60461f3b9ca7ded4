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
}

/// What the kernel was given of one file.
#[derive(Debug, Clone, Default)]
pub struct Given {
    read: Bits,
    order: Vec<u32>,
    stored: Bits,
    stored_count: u64,
}

impl Given {
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

    /// How many granules were stored ahead.
    pub fn stored_count(&self) -> u64 {
        self.stored_count
    }

    /// Whether a granule was stored ahead.
    pub fn was_stored(&self, number: u32) -> bool {
        self.stored.has(number)
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
}
