//! The capture buffer: where the pages of a frozen guest go, allocated and touched beforehand.
//!
//! Invariants:
//! - Nothing is allocated while the guest stands, as long as the pages fit: the file's blocks and
//!   this
//!   process's page tables are there before (`make`).
//! - The head is written last, sealed. A buffer without a sealed head captured nothing.
//! - What does not fit goes to the spill file, at the place where the finished capture file wants
//!   it.
//! - The file is on tmpfs: it outlives this process, and not the host.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use diapause_format::{CaptureHead, CaptureLayout, CAPTURE_HEAD_LEN};

use crate::copy::{copy_runs, split_runs};
use crate::scan::{count_pages, RamRange, Run, PAGE_SIZE};

/// Pages copied at once on their way to the spill file.
const SPILL_PAGES: u64 = 2048;

/// What a filled buffer holds, and what it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Pages captured.
    pub page_count: u64,
    /// How many of them lie in the spill file.
    pub spilled_pages: u64,
    /// Copying into the buffer.
    pub copy: Duration,
    /// Copying and writing what did not fit.
    pub spill: Duration,
}

/// A buffer of a fixed capacity, mapped into this process.
#[derive(Debug)]
pub struct CaptureBuffer {
    start: NonNull<u8>,
    layout: CaptureLayout,
    device_pages: u64,
}

// SAFETY: the mapping is owned by this value alone and reached through `&mut self` only.
unsafe impl Send for CaptureBuffer {}
// SAFETY: a shared reference reaches the layout only, never the mapping.
unsafe impl Sync for CaptureBuffer {}

impl CaptureBuffer {
    /// Makes the file at `path`, allocates all of it and touches it.
    ///
    /// # Errors
    /// `AlreadyExists`, `StorageFull` when the tmpfs has no room; the file is gone then.
    pub fn make(path: &Path, capacity: u64, device_pages: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        let layout = CaptureLayout::for_pages(capacity.min(device_pages));
        allocate_and_map(&file, layout.size_bytes)
            .map(|start| Self {
                start,
                layout,
                device_pages,
            })
            .inspect_err(|_| {
                let _ = std::fs::remove_file(path);
            })
    }

    /// Pages that it has room for.
    pub fn capacity(&self) -> u64 {
        self.layout.capacity
    }

    /// Copies the pages of `runs` out of the process and seals the buffer. The process must stand.
    ///
    /// # Errors
    /// What reading the process or writing the spill file said; the buffer is not sealed then.
    pub fn fill(
        &mut self,
        pid: i32,
        ram: RamRange,
        runs: &[Run],
        spill: &Path,
    ) -> io::Result<Filled> {
        assert_eq!(ram.page_count(), self.device_pages);
        let page_count = count_pages(runs);
        let (resident, spilled) = split_runs(runs, self.layout.capacity);
        let began = Instant::now();
        let (pages_at, bytes) = (self.layout.pages_offset, count_pages(&resident) * PAGE_SIZE);
        copy_runs(pid, ram, &resident, self.part(pages_at, bytes))?;
        let list = list_bytes(runs);
        let (list_at, in_buffer) = (self.layout.list_offset, 8 * count_pages(&resident));
        self.part(list_at, in_buffer)
            .copy_from_slice(&list[..in_buffer as usize]);
        let copied = Instant::now();
        if !spilled.is_empty() {
            spill_runs(
                pid,
                ram,
                &spilled,
                page_count,
                spill,
                &list[in_buffer as usize..],
            )?;
        }
        let spill_took = copied.elapsed();
        self.seal(page_count, &list);
        Ok(Filled {
            page_count,
            spilled_pages: count_pages(&spilled),
            copy: copied - began,
            spill: spill_took,
        })
    }

    fn seal(&mut self, captured: u64, list: &[u8]) {
        let head = CaptureHead {
            sealed: true,
            device_pages: self.device_pages,
            captured,
            capacity: self.layout.capacity,
            list_digest: *blake3::hash(list).as_bytes(),
            sums_digest: None,
        };
        self.part(0, CAPTURE_HEAD_LEN as u64)
            .copy_from_slice(&head.encode());
    }

    fn part(&mut self, offset: u64, length: u64) -> &mut [u8] {
        assert!(offset + length <= self.layout.size_bytes);
        // SAFETY: the part lies inside the mapping (asserted), which lives as long as `self` and is
        // borrowed mutably through it.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.start.as_ptr().add(offset as usize),
                length as usize,
            )
        }
    }
}

impl Drop for CaptureBuffer {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `make` mapped; the file stays.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.layout.size_bytes as usize) };
    }
}

fn allocate_and_map(file: &File, size_bytes: u64) -> io::Result<NonNull<u8>> {
    // SAFETY: allocates blocks of an open file; no memory is involved.
    let failed = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, size_bytes as libc::off_t) };
    if failed != 0 {
        return Err(io::Error::from_raw_os_error(failed));
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
    // SAFETY: a new mapping of an open file of at least this size, at an address of the kernel's
    // choice; unmapped on drop.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size_bytes as usize,
            protection,
            flags,
            file.as_raw_fd(),
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap returned null"))
}

fn list_bytes(runs: &[Run]) -> Vec<u8> {
    let mut list = Vec::with_capacity((count_pages(runs) * 8) as usize);
    for page in runs.iter().flat_map(|run| run.first..run.first + run.count) {
        list.extend_from_slice(&page.to_le_bytes());
    }
    list
}

/// Writes the pages that did not fit, and their part of the list, where the finished capture file
/// of
/// `page_count` pages has them.
fn spill_runs(
    pid: i32,
    ram: RamRange,
    runs: &[Run],
    page_count: u64,
    spill: &Path,
    list: &[u8],
) -> io::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(spill)?;
    let layout = CaptureLayout::for_pages(page_count);
    let mut position = page_count - count_pages(runs);
    file.write_all_at(list, layout.list_entry(position))?;
    let mut pages = vec![0u8; (SPILL_PAGES.min(count_pages(runs)) * PAGE_SIZE) as usize];
    let mut rest = runs.to_vec();
    while !rest.is_empty() {
        let (batch, left) = split_runs(&rest, SPILL_PAGES);
        let chunk = &mut pages[..(count_pages(&batch) * PAGE_SIZE) as usize];
        copy_runs(pid, ram, &batch, chunk)?;
        file.write_all_at(chunk, layout.page(position))?;
        position += count_pages(&batch);
        rest = left;
    }
    assert_eq!(position, page_count);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::merge_runs;

    #[test]
    fn a_filled_buffer_holds_the_pages_and_spills_the_rest_at_their_final_place() {
        let directory = tempfile::tempdir().expect("directory");
        let memory: Vec<u8> = (0..300u32 * 4096).map(|at| (at / 4096) as u8).collect();
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let ram = RamRange {
            start,
            end: start + 256 * PAGE_SIZE,
        };
        let first_byte = memory[(start - memory.as_ptr() as u64) as usize];
        let singles: Vec<Run> = [3u64, 4, 5, 90, 200, 255]
            .iter()
            .map(|page| Run {
                first: *page,
                count: 1,
            })
            .collect();
        let runs = merge_runs(&singles, &[]);
        let (path, spill) = (
            directory.path().join("buffer"),
            directory.path().join("spill"),
        );
        let mut buffer = CaptureBuffer::make(&path, 4, 256).expect("made");
        let filled = buffer
            .fill(std::process::id() as i32, ram, &runs, &spill)
            .expect("filled");
        assert_eq!((filled.page_count, filled.spilled_pages), (6, 2));
        let bytes = std::fs::read(&path).expect("buffer");
        let head = CaptureHead::decode(&bytes, bytes.len() as u64).expect("head");
        assert!(head.sealed && head.captured == 6 && head.resident() == 4);
        let last_resident = head.layout().page(3) as usize;
        let expected = |page: u64| memory[(start - memory.as_ptr() as u64 + page * 4096) as usize];
        assert_eq!(bytes[last_resident], expected(90));
        let spilled = std::fs::read(&spill).expect("spill");
        let layout = CaptureLayout::for_pages(6);
        assert_eq!(spilled[layout.page(5) as usize], expected(255));
        assert_eq!(spilled[layout.list_entry(4) as usize], 200);
        assert_ne!(expected(255), first_byte);
    }

    #[test]
    fn a_buffer_that_cannot_be_filled_is_not_sealed() {
        let directory = tempfile::tempdir().expect("directory");
        let (path, spill) = (
            directory.path().join("buffer"),
            directory.path().join("spill"),
        );
        let mut buffer = CaptureBuffer::make(&path, 4, 16).expect("made");
        let ram = RamRange {
            start: 4096,
            end: 17 * 4096,
        };
        let unmapped = [Run { first: 0, count: 1 }];
        buffer
            .fill(std::process::id() as i32, ram, &unmapped, &spill)
            .expect_err("unreadable");
        let bytes = std::fs::read(&path).expect("buffer");
        CaptureHead::decode(&bytes, bytes.len() as u64).expect_err("no head");
        CaptureBuffer::make(&path, 4, 16).expect_err("exists");
    }
}
