//! Compares captured pages with the parent's, and remembers each page's fate in two bits.

use diapause_format::{is_zero, PAGE_SIZE};

/// What becomes of a captured page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// All zero: nothing is stored.
    Zero,
    /// The parent's page: its mapping stays.
    Unchanged,
    /// Goes into the new build.
    Stored,
}

/// The fate of one page. A zero page is zero whatever the parent had: that mapping costs least.
#[inline]
pub fn judge(page: &[u8], parent: &[u8]) -> Fate {
    debug_assert!(page.len() == PAGE_SIZE && parent.len() == PAGE_SIZE);
    if is_zero(page) {
        Fate::Zero
    } else if page == parent {
        Fate::Unchanged
    } else {
        Fate::Stored
    }
}

/// The fates of the pages of a capture, in its order.
#[derive(Debug, Default)]
pub struct Fates {
    bits: Vec<u8>,
    length: usize,
}

impl Fates {
    /// Adds the next page's.
    pub fn push(&mut self, fate: Fate) {
        let shift = self.length % 4 * 2;
        if shift == 0 {
            self.bits.push(0);
        }
        if let Some(last) = self.bits.last_mut() {
            *last |= (fate as u8) << shift;
        }
        self.length += 1;
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The fate of the page at `at` in the capture.
    ///
    /// # Panics
    /// When there are not that many.
    pub fn get(&self, at: usize) -> Fate {
        assert!(at < self.length);
        match self.bits[at / 4] >> (at % 4 * 2) & 3 {
            0 => Fate::Zero,
            1 => Fate::Unchanged,
            _ => Fate::Stored,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_zero_before_it_is_unchanged() {
        let (zero, one) = ([0; PAGE_SIZE], [1; PAGE_SIZE]);
        assert_eq!(judge(&zero, &zero), Fate::Zero);
        assert_eq!(judge(&zero, &one), Fate::Zero);
        assert_eq!(judge(&one, &one), Fate::Unchanged);
        let mut late = one;
        late[PAGE_SIZE - 1] = 2;
        assert_eq!(judge(&late, &one), Fate::Stored);
    }

    #[test]
    fn fates_are_kept_in_order() {
        let mut fates = Fates::default();
        let order = [
            Fate::Stored,
            Fate::Zero,
            Fate::Unchanged,
            Fate::Unchanged,
            Fate::Stored,
        ];
        assert!(fates.is_empty());
        order.iter().for_each(|fate| fates.push(*fate));
        assert_eq!(fates.len(), 5);
        assert!(order
            .iter()
            .enumerate()
            .all(|(at, fate)| fates.get(at) == *fate));
    }
}
