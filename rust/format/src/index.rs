//! A header in memory, for lookups: ten bytes for each extent.

use std::io::Read;

use crate::error::Result;
use crate::extent::{Extent, Target};
use crate::header::{BuildRef, HeaderSummary};
use crate::header_read::HeaderReader;

/// Extents that there is room for from the start.
const ROOM_EXTENTS: u64 = 1 << 20;

/// Every extent of one verified header.
#[derive(Debug)]
pub struct HeaderIndex {
    summary: HeaderSummary,
    starts: Vec<u32>,
    builds: Vec<u16>,
    positions: Vec<u32>,
}

impl HeaderIndex {
    /// Reads a header to its end.
    ///
    /// # Errors
    /// Whatever reading reports.
    pub fn load<R: Read>(mut from: HeaderReader<R>) -> Result<Self> {
        // Room that is not used is never touched, and given back at the end.
        let room = from.page_count().min(ROOM_EXTENTS) as usize;
        let mut starts = Vec::with_capacity(room);
        let mut builds = Vec::with_capacity(room);
        let mut positions = Vec::with_capacity(room);
        loop {
            let extents = from.next_extents()?;
            if extents.is_empty() {
                break;
            }
            // Pages and positions are below 2^32 and builds below 2^16: the reader has checked it.
            starts.extend(extents.iter().map(|extent| extent.page as u32));
            builds.extend(extents.iter().map(|extent| extent.target.build as u16));
            positions.extend(extents.iter().map(|extent| extent.target.position as u32));
        }
        starts.shrink_to_fit();
        builds.shrink_to_fit();
        positions.shrink_to_fit();
        Ok(Self {
            summary: from.finish()?,
            starts,
            builds,
            positions,
        })
    }

    /// The totals.
    pub fn summary(&self) -> &HeaderSummary {
        &self.summary
    }

    /// The build of a target that is not zero.
    pub fn build(&self, number: u32) -> &BuildRef {
        &self.summary.builds[number as usize - 1]
    }

    /// Where a page lies; None beyond the device.
    pub fn lookup(&self, page: u64) -> Option<Target> {
        if page >= self.summary.page_count {
            return None;
        }
        let at = self
            .starts
            .partition_point(|start| u64::from(*start) <= page)
            - 1;
        let first = Target {
            build: self.builds[at].into(),
            position: self.positions[at].into(),
        };
        Some(first.after(page - u64::from(self.starts[at])))
    }

    /// The extents in order, from the one on that has `page`; none beyond the device.
    pub fn extents_from(&self, page: u64) -> impl Iterator<Item = Extent> + '_ {
        let after = self
            .starts
            .partition_point(|start| u64::from(*start) <= page);
        let first = match page < self.summary.page_count {
            true => after - 1,
            false => self.starts.len(),
        };
        (first..self.starts.len()).map(|at| self.extent(at))
    }

    fn extent(&self, at: usize) -> Extent {
        let page = u64::from(self.starts[at]);
        let end = self
            .starts
            .get(at + 1)
            .map_or(self.summary.page_count, |next| u64::from(*next));
        Extent {
            page,
            length: end - page,
            target: Target {
                build: self.builds[at].into(),
                position: self.positions[at].into(),
            },
        }
    }

    /// The extents in order.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        (0..self.starts.len()).map(|at| self.extent(at))
    }
}
