//! Two streams of extents at once: a capture over its parent's header, and the difference of two
//! headers.

use std::io::{Read, Write};

use crate::error::{exactly, FormatError, Result};
use crate::extent::{Extent, Target};
use crate::header::{BuildRef, BUILDS_MAX};
use crate::header_read::HeaderReader;
use crate::header_write::HeaderWriter;

/// How an [`overwrite`] names the build that it adds: a number that no header uses.
pub const NEW_BUILD: u32 = BUILDS_MAX as u32 + 1;

/// Writes the extents of `parent`, except where `over` has its own, to `writer`.
///
/// `over` yields extents in ascending order, without overlaps, that map to zero or to
/// [`NEW_BUILD`], which is `new_build`. The parent is read to its verified end.
///
/// # Errors
/// Whatever reading, writing or `over` reports; an extent of `over` out of order or beyond the
/// device.
pub fn overwrite<R: Read, W: Write>(
    parent: &mut HeaderReader<R>,
    over: impl IntoIterator<Item = Result<Extent>>,
    new_build: BuildRef,
    writer: &mut HeaderWriter<W>,
) -> Result<()> {
    let mut next_page = 0;
    let mut rest: Option<Extent> = None;
    for extent in over {
        let extent = extent?;
        if extent.page < next_page || extent.length == 0 || extent.end() > parent.page_count() {
            return Err(FormatError::OutOfRange {
                part: "page of a capture",
                found: extent.page,
                limit: parent.page_count(),
            });
        }
        copy_until(parent, &mut rest, extent.page, writer)?;
        writer.push(extent, |_| new_build)?;
        next_page = extent.end();
        skip_until(parent, &mut rest, next_page)?;
    }
    copy_until(parent, &mut rest, parent.page_count(), writer)?;
    match parent.next_extent()? {
        None => Ok(()),
        Some(extent) => exactly("end of the parent", extent.page, parent.page_count()),
    }
}

/// Copies the parent's extents before device page `end`.
fn copy_until<R: Read, W: Write>(
    parent: &mut HeaderReader<R>,
    rest: &mut Option<Extent>,
    end: u64,
    writer: &mut HeaderWriter<W>,
) -> Result<()> {
    loop {
        let Some(mut extent) = take_or_read(parent, rest, end)? else {
            return Ok(());
        };
        if extent.page >= end {
            *rest = Some(extent);
            return Ok(());
        }
        if extent.end() > end {
            let front = extent.split_front(end - extent.page);
            *rest = Some(extent);
            return writer.push(front, |number| *parent.build(number));
        }
        let done = extent.end() == end;
        writer.push(extent, |number| *parent.build(number))?;
        if done {
            return Ok(());
        }
    }
}

/// Drops the parent's extents before device page `end`.
fn skip_until<R: Read>(
    parent: &mut HeaderReader<R>,
    rest: &mut Option<Extent>,
    end: u64,
) -> Result<()> {
    while let Some(extent) = take_or_read(parent, rest, end)? {
        let covered = extent.end();
        *rest = extent.trimmed_to(end);
        if covered >= end {
            break;
        }
    }
    Ok(())
}

/// What is left of the last extent, else the next one; None when there is none or none is wanted.
fn take_or_read<R: Read>(
    parent: &mut HeaderReader<R>,
    rest: &mut Option<Extent>,
    end: u64,
) -> Result<Option<Extent>> {
    match rest.take() {
        Some(extent) => Ok(Some(extent)),
        None if end == 0 => Ok(None),
        None => parent.next_extent(),
    }
}

/// A run of pages and where each of two headers has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// First page of the device.
    pub page: u64,
    /// Pages, at least 1.
    pub length: u64,
    /// Where the old header has the first page, in its numbers.
    pub old: Target,
    /// Where the new header has the first page, in its numbers.
    pub new: Target,
}

/// Which of two headers an error is about.
#[derive(Debug)]
pub enum Side {
    /// The old one.
    Old(FormatError),
    /// The new one.
    New(FormatError),
}

/// Reads two headers of one device side by side.
pub struct Differ<A, B> {
    old: HeaderReader<A>,
    new: HeaderReader<B>,
    old_rest: Option<Extent>,
    new_rest: Option<Extent>,
}

impl<A: Read, B: Read> Differ<A, B> {
    /// Begins with two headers from which nothing was read.
    ///
    /// # Panics
    /// When they are of devices of different size.
    pub fn new(old: HeaderReader<A>, new: HeaderReader<B>) -> Self {
        assert_eq!(
            old.page_count(),
            new.page_count(),
            "two headers of one device"
        );
        Self {
            old,
            new,
            old_rest: None,
            new_rest: None,
        }
    }

    /// The builds of the new header, as far as it was read.
    pub fn new_builds(&self) -> &[BuildRef] {
        self.new.builds()
    }

    /// The next run that the two map differently; None once both ends were verified.
    ///
    /// # Errors
    /// Whatever reading reports, and of which header.
    pub fn next_difference(&mut self) -> std::result::Result<Option<Difference>, Side> {
        while let Some(run) = self.next_run()? {
            if !self.same(&run) {
                return Ok(Some(run));
            }
        }
        Ok(None)
    }

    fn next_run(&mut self) -> std::result::Result<Option<Difference>, Side> {
        let old = match self.old_rest.take() {
            Some(rest) => Some(rest),
            None => self.old.next_extent().map_err(Side::Old)?,
        };
        let new = match self.new_rest.take() {
            Some(rest) => Some(rest),
            None => self.new.next_extent().map_err(Side::New)?,
        };
        let (Some(old), Some(new)) = (old, new) else {
            // Both cover the device, so both end at once.
            assert!(old.is_none() && new.is_none());
            return Ok(None);
        };
        assert_eq!(old.page, new.page);
        let end = old.end().min(new.end());
        self.old_rest = old.trimmed_to(end);
        self.new_rest = new.trimmed_to(end);
        let (page, length) = (old.page, end - old.page);
        Ok(Some(Difference {
            page,
            length,
            old: old.target,
            new: new.target,
        }))
    }

    fn same(&self, run: &Difference) -> bool {
        if run.old.is_zero() || run.new.is_zero() {
            return run.old.is_zero() && run.new.is_zero();
        }
        let ids = (
            self.old.build(run.old.build).id,
            self.new.build(run.new.build).id,
        );
        run.old.position == run.new.position && ids.0 == ids.1
    }
}
