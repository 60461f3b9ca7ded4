//! Which granules of a file a VMM has touched, asked of the kernel: the pages that its mapping has.
//!
//! The kernel maps the pages around one that is touched, within 64 KiB, where it has them: a page
//! more or less says nothing, a granule does.

use std::fs::File;
use std::io;

use diapause_capture::scan::{find_ram, present_runs, MemoryFile, RamRange};

use crate::given::{granules, Given};
use crate::nodes::Node;
use crate::trace::GRANULE;

const PAGE: u64 = 4096;

/// What a VMM has of a file that it maps.
#[derive(Debug, Default)]
pub struct Touched {
    /// The granules, ascending.
    pub granules: Vec<u32>,
    /// Pages that are in its mapping.
    pub pages: u64,
    /// Those of them that had been stored ahead.
    pub stored_pages: u64,
    /// Bytes of granules that were stored ahead and that nobody was seen to touch before.
    pub newly_used_bytes: u64,
}

/// Asks for it.
///
/// # Errors
/// The process is gone or does not map the file as one; the kernel has no PAGEMAP_SCAN (Linux 6.7).
pub fn of(pid: i32, node: &Node) -> io::Result<Touched> {
    let (ram, pagemap) = (ram(pid, node)?, pagemap(pid)?);
    let runs = present_runs(&pagemap, ram)?;
    let mut touched = Touched::default();
    node.with_given(|given| {
        for run in runs {
            touched.add(given, run.first * PAGE, run.count * PAGE);
        }
    });
    Ok(touched)
}

/// Asks for that part of it that was stored ahead: it costs what was stored, whatever the VMM has.
///
/// # Errors
/// As [`of`].
pub fn of_stored(pid: i32, node: &Node) -> io::Result<Touched> {
    let stored = node.with_given(|given| given.stored_runs());
    let mut touched = Touched::default();
    if stored.is_empty() {
        return Ok(touched);
    }
    let (ram, pagemap) = (ram(pid, node)?, pagemap(pid)?);
    for (first, count) in stored {
        let (from, bytes) = (u64::from(first) * GRANULE, u64::from(count) * GRANULE);
        let part = RamRange {
            start: ram.start + from,
            end: (ram.start + from + bytes).min(ram.end),
        };
        let runs = present_runs(&pagemap, part)?;
        node.with_given(|given| {
            for run in runs {
                touched.add(given, from + run.first * PAGE, run.count * PAGE);
            }
        });
    }
    Ok(touched)
}

impl Touched {
    /// These bytes are in the mapping; ascending.
    fn add(&mut self, given: &mut Given, start: u64, bytes: u64) {
        self.pages += bytes / PAGE;
        let end = start + bytes;
        for number in granules(start, bytes) {
            if given.was_stored(number) {
                let from = start.max(u64::from(number) * GRANULE);
                let to = end.min((u64::from(number) + 1) * GRANULE);
                self.stored_pages += (to - from) / PAGE;
            }
            if given.use_stored(number) {
                self.newly_used_bytes += GRANULE;
            }
            if self.granules.last() != Some(&number) {
                self.granules.push(number);
            }
        }
    }
}

fn ram(pid: i32, node: &Node) -> io::Result<RamRange> {
    let file = MemoryFile {
        inode: node.number,
        device: 0, // a mount without a place: its path says which file it is
        path: format!("/{}", node.name),
    };
    find_ram(pid, &file, node.size_bytes)
}

fn pagemap(pid: i32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/pagemap"))
}
