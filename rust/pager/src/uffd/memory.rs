//! Mappings of our own, which unmap themselves.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::OnceLock;

use nix::libc::c_void;
use nix::sys::mman::{mlock, mmap, mmap_anonymous, munmap, MapFlags, ProtFlags};

/// What may be done to a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// Nothing at all.
    None,
    /// Reading: anonymous memory that nobody writes is zeros, and takes no memory.
    Read,
    /// Reading and writing.
    Write,
}

/// Memory that was mapped here.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<c_void>,
    size: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; what is done through its address is
// the caller's to order.
unsafe impl Send for Mapping {}
// SAFETY: as above; by itself it gives out its address only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// New memory of zeros.
    ///
    /// # Errors
    /// Where there is none.
    pub fn anonymous(size: usize, protection: Protection) -> io::Result<Self> {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel chooses the place, so nothing that is mapped already is touched.
        let start = unsafe { mmap_anonymous(None, length(size)?, protection.into(), flags) }?;
        Ok(Self { start, size })
    }

    /// A file's first bytes, shared with whoever else maps it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn shared(file: impl AsFd, size: usize) -> io::Result<Self> {
        let (protection, flags) = (Protection::Write.into(), MapFlags::MAP_SHARED);
        // SAFETY: the kernel chooses the place, so nothing that is mapped already is touched.
        let start = unsafe { mmap(None, length(size)?, protection, flags, file, 0) }?;
        Ok(Self { start, size })
    }

    /// Its first byte's address.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// The same as a pointer.
    pub fn start(&self) -> NonNull<u8> {
        self.start.cast()
    }

    /// Its size.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Keeps its first bytes resident, where the limits of the process allow it.
    pub fn keep_resident(&self, bytes: usize) -> bool {
        // SAFETY: the range is ours; locking changes nothing of what is in it.
        unsafe { mlock(self.start, bytes.min(self.size)) }.is_ok()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped by us with this size, and nobody can reach it any more.
        let unmapped = unsafe { munmap(self.start, self.size) };
        debug_assert!(unmapped.is_ok());
    }
}

impl From<Protection> for ProtFlags {
    fn from(protection: Protection) -> Self {
        match protection {
            Protection::None => Self::PROT_NONE,
            Protection::Read => Self::PROT_READ,
            Protection::Write => Self::PROT_READ | Self::PROT_WRITE,
        }
    }
}

fn length(size: usize) -> io::Result<NonZeroUsize> {
    NonZeroUsize::new(size).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Zeros that take no memory, as many as a huge page.
///
/// # Errors
/// Where there are no addresses for them.
pub fn zeros(size: usize) -> io::Result<&'static [u8]> {
    static ZEROS: OnceLock<Mapping> = OnceLock::new();
    const BYTES: usize = 2 << 20;
    let map = match ZEROS.get() {
        Some(map) => map,
        None => {
            let made = Mapping::anonymous(BYTES, Protection::Read)?;
            ZEROS.get_or_init(|| made)
        }
    };
    // SAFETY: the mapping lives for ever, nobody can write to it, and the size is within it.
    Ok(unsafe { std::slice::from_raw_parts(map.start().as_ptr(), size.min(BYTES)) })
}
