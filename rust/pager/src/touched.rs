//! Which granules of a file a VMM has touched, asked of the kernel: the pages that its mapping has.
//!
//! The kernel maps the pages around one that is touched, within 64 KiB, where it has them: a page
//! more or less says nothing, a granule does.

use std::fs::File;
use std::io;

use diapause_capture::scan::{find_ram, present_runs, MemoryFile};

use crate::given::granules;
use crate::nodes::Node;

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
}

/// Asks for it.
///
/// # Errors
/// The process is gone or does not map the file as one; the kernel has no PAGEMAP_SCAN (Linux 6.7).
pub fn of(pid: i32, node: &Node) -> io::Result<Touched> {
    let file = MemoryFile {
        inode: node.number,
        device: 0, // a mount without a place: its path says which file it is
        path: format!("/{}", node.name),
    };
    let ram = find_ram(pid, &file, node.size_bytes)?;
    let runs = present_runs(&File::open(format!("/proc/{pid}/pagemap"))?, ram)?;
    let mut touched = Touched::default();
    node.with_given(|given| {
        for run in runs {
            touched.pages += run.count;
            let (start, end) = (run.first * PAGE, (run.first + run.count) * PAGE);
            for number in granules(start, end - start) {
                if given.was_stored(number) {
                    let from = start.max(u64::from(number) * crate::trace::GRANULE);
                    let to = end.min((u64::from(number) + 1) * crate::trace::GRANULE);
                    touched.stored_pages += (to - from) / PAGE;
                }
                if touched.granules.last() != Some(&number) {
                    touched.granules.push(number);
                }
            }
        }
    });
    Ok(touched)
}
