//! A userfaultfd as the kernel has it: its messages and its ioctls.
//!
//! What the code rests on (`fs/userfaultfd.c`, `mm/userfaultfd.c`):
//! - COPY, ZEROPAGE and POISON answer EAGAIN from the moment an event such as REMOVE is queued
//!   until its thread runs again, which is after somebody has read the event. So a COPY that did
//!   not get EAGAIN began before the event was queued.
//! - COPY writes how many bytes it copied only where it began; on success for a part it answers
//!   EAGAIN too, with that number.
//! - A range has to lie in one mapping, else ENOENT: who splits a mapping (`mprotect` on a part of
//!   it) is answered page by page there.
//! - ESRCH: the address space is gone, its last thread has left it.
//! - WAKE looks at no mapping. Whoever wakes without need faults again.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::libc;

use super::memory::{Mapping, Protection};

/// The version that everybody speaks.
const API: u8 = 0xaa;
/// The features that change what a message means, or that this server rests on.
pub mod features {
    /// A child of a fork gets a descriptor of its own.
    pub const FORK: u64 = 1 << 1;
    /// Memory that moves is announced.
    pub const REMAP: u64 = 1 << 2;
    /// Memory that is given back is announced.
    pub const REMOVE: u64 = 1 << 3;
    /// A touch gets SIGBUS, no message.
    pub const SIGBUS: u64 = 1 << 7;
}
/// Kinds of messages.
pub mod event {
    /// A thread waits for a page.
    pub const PAGEFAULT: u8 = 0x12;
    /// A range is about to be given back.
    pub const REMOVE: u8 = 0x15;
    /// A range is about to be unmapped.
    pub const UNMAP: u8 = 0x16;
}
/// Flags of a fault that is none for a missing page: write-protected, or minor.
pub const FAULT_NOT_MISSING: u64 = 0b110;

/// One message.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Message {
    /// Its kind.
    pub event: u8,
    reserved: [u8; 7],
    /// For a fault: flags, address. For a range: first byte, end.
    pub args: [u64; 3],
}

/// Bytes of a message.
pub const MESSAGE_BYTES: usize = size_of::<Message>();

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// Both ZEROPAGE and POISON.
#[repr(C)]
struct Fill {
    range: Range,
    mode: u64,
    filled: i64,
}

/// The calls, by their numbers in `linux/userfaultfd.h`.
#[allow(missing_docs)] // The macros take no documentation that the lint would see.
mod call {
    use super::{Api, Copy, Fill, Range, Register, API};

    nix::ioctl_readwrite!(api, API, 0x3f, Api);
    nix::ioctl_readwrite!(register, API, 0x00, Register);
    nix::ioctl_read!(wake, API, 0x02, Range);
    nix::ioctl_readwrite!(copy, API, 0x03, Copy);
    nix::ioctl_readwrite!(zeropage, API, 0x04, Fill);
    nix::ioctl_readwrite!(poison, API, 0x08, Fill);
}

/// What came of filling a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// So many bytes from its beginning on, at least a page.
    Bytes(u64),
    /// Its first page is there already.
    Present,
    /// An event is under way: it has to be read first.
    Changing,
    /// It is not, or not as a whole, in a mapping of this descriptor.
    Unmapped,
    /// The address space is gone.
    Gone,
    /// Something else.
    Failed(Errno),
}

/// A descriptor that is a userfaultfd.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> Self {
        uffd.0
    }
}

impl Uffd {
    /// A new one for the memory of this process, with these features: what a VMM does.
    ///
    /// # Errors
    /// Where the kernel has none, or forbids it.
    pub fn open(features: u64) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = Errno::result(fd)? as i32;
        // SAFETY: the kernel has just made this descriptor for us.
        let uffd = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut api = Api {
            api: u64::from(API),
            features,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes `api`, which lives here and is laid out as it wants.
        unsafe { call::api(uffd.raw(), &mut api) }?;
        Ok(uffd)
    }

    /// Has missing pages of a range announced: what a VMM does.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        const MISSING: u64 = 1;
        let mut register = Register {
            range: Range { start, len },
            mode: MISSING,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes `register`, which lives here. Faults in the range
        // wait from now on: nothing that is done to memory, only to who touches it.
        unsafe { call::register(self.raw(), &mut register) }?;
        Ok(())
    }

    /// Takes a descriptor that somebody says is one.
    ///
    /// # Errors
    /// The descriptor, where the kernel calls it something else.
    pub fn recognize(fd: OwnedFd) -> Result<Self, OwnedFd> {
        // No other file has this name: a path begins with a slash, and other anonymous files have
        // names of their own.
        let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
        match std::fs::read_link(name) {
            Ok(name) if name.as_os_str() == "anon_inode:[userfaultfd]" => Ok(Self(fd)),
            _ => Err(fd),
        }
    }

    /// The features its owner asked for; an error where its owner has not asked yet.
    ///
    /// # Errors
    /// Where the kernel does not say.
    pub fn features(&self) -> io::Result<u64> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.raw()))?;
        let unknown = || io::Error::new(io::ErrorKind::InvalidData, "its features are unknown");
        // "API:\taa:FEATURES:IOCTLS", in hexadecimal digits.
        let api = info.lines().find_map(|line| line.strip_prefix("API:"));
        let digits = api.and_then(|api| api.split(':').nth(1));
        let asked = digits.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
        asked.ok_or_else(unknown)
    }

    /// Makes reads return where nothing is queued; poll answers only then.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        let flags = OFlag::from_bits_retain(fcntl(&self.0, FcntlArg::F_GETFL)?);
        fcntl(&self.0, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(())
    }

    /// Fills a range with the pages of `from`.
    pub fn copy(&self, at: u64, from: &[u8]) -> Filled {
        self.copy_from(at, from.as_ptr() as u64, from.len() as u64)
    }

    /// Asks what would come of a COPY of `len` bytes, and changes nothing: its source can't be
    /// read. `Failed(EFAULT)` means that the range is one that could be filled, if it is missing.
    ///
    /// # Errors
    /// Where there is no memory.
    pub fn probe(&self, at: u64, len: u64) -> io::Result<Filled> {
        static NOTHING: OnceLock<Mapping> = OnceLock::new();
        const BYTES: usize = 2 << 20;
        let nothing = match NOTHING.get() {
            Some(nothing) => nothing,
            None => {
                let made = Mapping::anonymous(BYTES, Protection::None)?;
                NOTHING.get_or_init(|| made)
            }
        };
        Ok(self.copy_from(at, nothing.address(), len))
    }

    fn copy_from(&self, dst: u64, src: u64, len: u64) -> Filled {
        let mut copy = Copy {
            dst,
            src,
            len,
            mode: 0,
            copied: 0,
        };
        // SAFETY: `copy` lives here. The kernel reads `src` as any system call reads a buffer, with
        // EFAULT where it is not ours to read, and writes to the VMM's memory only.
        let result = unsafe { call::copy(self.raw(), &mut copy) };
        filled(result.map(drop), copy.copied)
    }

    /// Fills a range with zeros that take no memory. Not for huge pages.
    pub fn zero(&self, start: u64, len: u64) -> Filled {
        let mut zero = Fill {
            range: Range { start, len },
            mode: 0,
            filled: 0,
        };
        // SAFETY: `zero` lives here; only the VMM's memory is changed.
        let result = unsafe { call::zeropage(self.raw(), &mut zero) };
        filled(result.map(drop), zero.filled)
    }

    /// Makes every touch of a range that has no pages fail with SIGBUS (Linux 6.6).
    pub fn poison(&self, start: u64, len: u64) -> Filled {
        let mut poison = Fill {
            range: Range { start, len },
            mode: 0,
            filled: 0,
        };
        // SAFETY: `poison` lives here; only the VMM's memory is changed.
        let result = unsafe { call::poison(self.raw(), &mut poison) };
        filled(result.map(drop), poison.filled)
    }

    /// Wakes who waits for a range: they look again, and fault again where there is still nothing.
    ///
    /// # Errors
    /// Where the range is none of an address space, or the descriptor is not set up.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = Range { start, len };
        // SAFETY: the kernel reads `range`, which lives here, and changes no memory.
        unsafe { call::wake(self.raw(), &mut range) }?;
        Ok(())
    }

    fn raw(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

fn filled(result: nix::Result<()>, bytes: i64) -> Filled {
    match (result, bytes) {
        // A part that was filled counts, whatever stopped it: the rest is asked for again.
        (_, 1..) => Filled::Bytes(bytes.unsigned_abs()),
        (Err(Errno::EEXIST), _) => Filled::Present,
        (Err(Errno::EAGAIN), _) => Filled::Changing,
        (Err(Errno::ENOENT), _) => Filled::Unmapped,
        (Err(Errno::ESRCH), _) => Filled::Gone,
        (Err(error), _) => Filled::Failed(error),
        (Ok(()), _) => Filled::Failed(Errno::EIO),
    }
}
