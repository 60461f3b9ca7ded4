//! How long it takes to read a file, and to touch pages of it that are mapped.
//!
//! A file that a server answers for may fail under a mapping, which is SIGBUS: who measures one
//! does so in a process of its own.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use nix::fcntl::{posix_fadvise, PosixFadviseAdvice};
use nix::sys::mman::{madvise, mmap, munmap, MapFlags, MmapAdvise, ProtFlags};

use crate::scan::PAGE_SIZE;

const CALL_BYTES: usize = 1 << 20;

/// What the page cache is to have of a file when the clock starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// All of it: it was read once.
    Warm,
    /// Nothing that can be dropped: pages that somebody maps or that are dirty stay.
    Dropped,
}

/// Reads a file from first to last in calls of 1 MiB; how long that took.
///
/// # Errors
/// What the kernel says of the file.
pub fn read_through(path: &Path, cache: Cache) -> io::Result<Duration> {
    let file = prepared(path, cache)?;
    let began = Instant::now();
    read_all(&file)?;
    Ok(began.elapsed())
}

/// Maps a file and touches each page of `length` bytes at each offset, in this order; how long
/// each offset took. `random` asks the kernel to bring no more than what is touched.
///
/// # Errors
/// `InvalidInput` where an offset is no page of the file; else what the kernel says.
pub fn touch(
    path: &Path,
    offsets: &[u64],
    length: u64,
    random: bool,
    cache: Cache,
) -> io::Result<Vec<Duration>> {
    let file = prepared(path, cache)?;
    let mapping = Mapping::of(&file, random)?;
    let fits = |at: &u64| {
        at % PAGE_SIZE == 0
            && at
                .checked_add(length)
                .is_some_and(|end| end <= mapping.len as u64)
    };
    if length == 0 || !offsets.iter().all(fits) {
        let cause = format!("{length} bytes at some offset are no pages of the file");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, cause));
    }
    Ok(offsets
        .iter()
        .map(|&at| {
            let began = Instant::now();
            for page in (at..at + length).step_by(PAGE_SIZE as usize) {
                mapping.touch(page as usize);
            }
            began.elapsed()
        })
        .collect())
}

fn prepared(path: &Path, cache: Cache) -> io::Result<File> {
    let file = File::open(path)?;
    match cache {
        Cache::Warm => read_all(&file)?,
        Cache::Dropped => {
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
    }
    Ok(file)
}

fn read_all(file: &File) -> io::Result<()> {
    let mut bytes = vec![0; CALL_BYTES];
    let mut at = 0;
    loop {
        match file.read_at(&mut bytes, at)? {
            0 => return Ok(()),
            read => at += read as u64,
        }
    }
}

/// A file in memory, to be read.
struct Mapping {
    start: NonNull<libc::c_void>,
    len: usize,
}

impl Mapping {
    fn of(file: &File, random: bool) -> io::Result<Self> {
        let len = file.metadata()?.len() as usize;
        let empty = || io::Error::new(io::ErrorKind::InvalidInput, "the file is empty");
        let size = NonZeroUsize::new(len).ok_or_else(empty)?;
        // SAFETY: a new mapping at an address of the kernel's choice; unmapped on drop.
        let start = unsafe {
            mmap(
                None,
                size,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED,
                file,
                0,
            )
        }?;
        let mapping = Self { start, len };
        if random {
            // SAFETY: advice about exactly what was mapped; it changes no byte.
            unsafe { madvise(start, len, MmapAdvise::MADV_RANDOM) }?;
        }
        Ok(mapping)
    }

    fn touch(&self, at: usize) {
        debug_assert!(at < self.len);
        // SAFETY: the callers looked that the byte lies inside the mapping. One that the file can't
        // give is SIGBUS, which ends this process: see the module.
        unsafe { self.start.cast::<u8>().add(at).read_volatile() };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what was mapped; nothing refers to it. That it was a mapping is
        // all that could fail.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file_of(pages: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![7; pages * 4096]).unwrap();
        file.as_file().sync_all().unwrap();
        file
    }

    #[test]
    fn each_offset_has_a_time() {
        let file = file_of(64);
        for cache in [Cache::Warm, Cache::Dropped] {
            for random in [false, true] {
                let took = touch(file.path(), &[0, 48 * 4096], 65536, random, cache).unwrap();
                assert_eq!(took.len(), 2);
                assert!(took.iter().all(|one| *one > Duration::ZERO), "{took:?}");
            }
            assert!(read_through(file.path(), cache).unwrap() > Duration::ZERO);
        }
    }

    #[test]
    fn what_is_no_page_of_the_file_is_refused() {
        let file = file_of(4);
        for (offset, length) in [
            (4 * 4096, 4096),
            (0, 5 * 4096),
            (1, 1),
            (0, 0),
            (4096, u64::MAX),
        ] {
            let error = touch(file.path(), &[0, offset], length, false, Cache::Warm).unwrap_err();
            assert_eq!(
                error.kind(),
                io::ErrorKind::InvalidInput,
                "{offset} {length}"
            );
        }
        assert!(touch(file_of(0).path(), &[0], 1, false, Cache::Warm).is_err());
        assert!(read_through(Path::new("/nonexistent"), Cache::Warm).is_err());
    }
}
