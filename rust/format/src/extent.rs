//! Extents: runs of pages that map to a run of positions in one build, or to zero.

/// Where the first page of an extent lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Target {
    /// Number of the build, from 1, as its reader or writer counts them; 0 is zero pages.
    pub build: u32,
    /// Page in the build; 0 for zero pages.
    pub position: u64,
}

impl Target {
    /// Pages of zeros, which nothing stores.
    pub const ZERO: Self = Self {
        build: 0,
        position: 0,
    };

    /// Whether the pages are zeros.
    pub fn is_zero(&self) -> bool {
        self.build == 0
    }

    /// The target of the page `pages` further on.
    pub fn after(&self, pages: u64) -> Self {
        let step = if self.is_zero() { 0 } else { pages };
        Self {
            build: self.build,
            position: self.position + step,
        }
    }
}

/// A run of at least one page of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First page of the device.
    pub page: u64,
    /// Pages, at least 1.
    pub length: u64,
    /// Where the first of them lies; the others follow it.
    pub target: Target,
}

impl Extent {
    /// The first page after it.
    pub fn end(&self) -> u64 {
        self.page + self.length
    }

    /// Whether `next` goes on where this ends, on the device and in the build.
    #[inline]
    pub fn continues_in(&self, next: &Self) -> bool {
        self.end() == next.page && self.target.after(self.length) == next.target
    }

    /// Cuts off the first `pages` and returns them; `pages` is less than the length.
    pub fn split_front(&mut self, pages: u64) -> Self {
        assert!(0 < pages && pages < self.length);
        let front = Self {
            length: pages,
            ..*self
        };
        self.page += pages;
        self.length -= pages;
        self.target = self.target.after(pages);
        front
    }

    /// Drops everything before device page `page`; None when nothing is left.
    pub fn trimmed_to(mut self, page: u64) -> Option<Self> {
        if page >= self.end() {
            return None;
        }
        if page > self.page {
            self.split_front(page - self.page);
        }
        Some(self)
    }
}

/// Joins extents that continue each other; what comes out is never mergeable again.
#[derive(Debug, Default)]
pub struct Merge {
    open: Option<Extent>,
}

impl Merge {
    /// Takes the next extent; returns the one that is now complete, if any.
    #[inline]
    pub fn push(&mut self, next: Extent) -> Option<Extent> {
        match &mut self.open {
            Some(open) if open.continues_in(&next) => {
                open.length += next.length;
                None
            }
            _ => self.open.replace(next),
        }
    }

    /// The last one.
    pub fn finish(&mut self) -> Option<Extent> {
        self.open.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(page: u64, length: u64, build: u32, position: u64) -> Extent {
        Extent {
            page,
            length,
            target: Target { build, position },
        }
    }

    #[test]
    fn only_what_continues_is_merged() {
        let mut merge = Merge::default();
        assert_eq!(merge.push(extent(0, 2, 1, 5)), None);
        assert_eq!(merge.push(extent(2, 1, 1, 7)), None);
        assert_eq!(merge.push(extent(3, 1, 1, 9)), Some(extent(0, 3, 1, 5)));
        assert_eq!(merge.push(extent(4, 1, 0, 0)), Some(extent(3, 1, 1, 9)));
        assert_eq!(merge.push(extent(5, 8, 0, 0)), None);
        assert_eq!(merge.finish(), Some(extent(4, 9, 0, 0)));
        assert_eq!(merge.finish(), None);
    }

    #[test]
    fn a_split_keeps_both_targets() {
        let mut rest = extent(10, 5, 3, 100);
        assert_eq!(rest.split_front(2), extent(10, 2, 3, 100));
        assert_eq!(rest, extent(12, 3, 3, 102));
        assert_eq!(rest.trimmed_to(14), Some(extent(14, 1, 3, 104)));
        assert_eq!(rest.trimmed_to(15), None);
        assert_eq!(rest.trimmed_to(3), Some(rest));
    }
}
