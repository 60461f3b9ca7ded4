//! The process whose memory is served, and the one rule about its descriptor: the VMM is dead
//! before we close it.
//!
//! Where the last descriptor of a userfaultfd closes, whoever waits and whoever touches later reads
//! zeros. So a [`Vmm`] that is dropped, on whatever path, kills first, waits until nobody is in the
//! address space any more, and closes then. Where that can't be seen within a bound the descriptor
//! stays open for ever: a leak is the lesser evil.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::ioctl::{Filled, Uffd};
use super::regions::SMALL_BYTES;

/// How long a killed VMM may take to be gone.
const GONE_MAX: Duration = Duration::from_secs(60);
/// How long it takes.
const SOON: Duration = Duration::from_millis(100);

/// How many descriptors may stay open. A peer that hands in the descriptor of a process other than
/// itself gets there; it must not take all that we may have.
const LEAKED_MAX: usize = 64;
static LEAKED: AtomicUsize = AtomicUsize::new(0);

/// Where an address space is asked whether it is still there; the kernel asks that first.
const ANY_PAGE: u64 = 1 << 16;

/// A process, held by a pidfd: its number may become another's, this does not.
#[derive(Debug)]
pub struct Process(OwnedFd);

impl From<OwnedFd> for Process {
    fn from(pidfd: OwnedFd) -> Self {
        Self(pidfd)
    }
}

impl From<Process> for OwnedFd {
    fn from(process: Process) -> Self {
        process.0
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Process {
    /// Who connected to a socket, and its number.
    ///
    /// # Errors
    /// Where it is gone already, or in a namespace that we don't see.
    pub fn peer(stream: &(impl AsFd + AsRawFd)) -> io::Result<(Self, i32)> {
        let pid = getsockopt(stream, PeerCredentials)?.pid();
        if pid <= 0 {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "its process is not seen here",
            ));
        }
        let mut fd: i32 = -1;
        let mut size = size_of::<i32>() as libc::socklen_t;
        // SAFETY: the kernel writes a descriptor's number and its size to variables that live here.
        let result = unsafe {
            let (level, name) = (libc::SOL_SOCKET, libc::SO_PEERPIDFD);
            let (value, size) = ((&raw mut fd).cast(), &raw mut size);
            libc::getsockopt(stream.as_raw_fd(), level, name, value, size)
        };
        match Errno::result(result) {
            Ok(_) => {
                // SAFETY: the kernel has just made this descriptor for us.
                Ok((Self(unsafe { OwnedFd::from_raw_fd(fd) }), pid))
            }
            // Before Linux 6.5.
            Err(Errno::ENOPROTOOPT) => Ok((Self::open_peer(stream, pid)?, pid)),
            Err(error) => Err(error.into()),
        }
    }

    /// By number: right as long as the peer has not left, which is looked at afterwards.
    fn open_peer(stream: &impl AsFd, pid: i32) -> io::Result<Self> {
        let process = Self::open(pid)?;
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLHUP)];
        poll(&mut fds, PollTimeout::ZERO)?;
        if fds[0].revents().is_some_and(|events| !events.is_empty()) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(process)
    }

    /// The process of this number, which must be known to be the right one.
    ///
    /// # Errors
    /// Where there is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: the call takes no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = Errno::result(fd)? as i32;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Ends it, whatever it does. Nothing happens where it has ended.
    pub fn kill(&self) {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the call takes no memory of ours: a null pointer means what `kill` does.
        unsafe {
            let call = libc::SYS_pidfd_send_signal;
            libc::syscall(call, self.0.as_raw_fd(), libc::SIGKILL, none, 0);
        }
    }

    /// Whether it has ended, after waiting for that at most this long.
    pub fn ended(&self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(ready) => return ready > 0,
                Err(Errno::EINTR) => {}
                Err(_) => return false,
            }
        }
    }
}

/// A VMM and the descriptor of its memory.
#[derive(Debug)]
pub struct Vmm {
    /// Its memory.
    uffd: ManuallyDrop<Uffd>,
    /// Itself.
    process: ManuallyDrop<Process>,
}

impl Vmm {
    /// Takes responsibility for it.
    pub fn new(uffd: Uffd, process: Process) -> Self {
        Self {
            uffd: ManuallyDrop::new(uffd),
            process: ManuallyDrop::new(process),
        }
    }

    /// Its memory.
    pub fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Itself.
    pub fn process(&self) -> &Process {
        &self.process
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.process.kill();
        // SAFETY: both are taken here only, once: nobody looks at them after this.
        let corpse = unsafe {
            Corpse {
                uffd: ManuallyDrop::take(&mut self.uffd),
                process: ManuallyDrop::take(&mut self.process),
            }
        };
        if corpse.is_gone(SOON) {
            return;
        }
        // Whoever dropped it has others to serve. A thread that can't be had leaves it open too.
        let corpse = ManuallyDrop::new(corpse);
        let bury = move || {
            if corpse.is_gone(GONE_MAX) || LEAKED.fetch_add(1, Ordering::Relaxed) >= LEAKED_MAX {
                drop(ManuallyDrop::into_inner(corpse));
            }
        };
        let _ = thread::Builder::new().spawn(bury);
    }
}

/// A VMM that was killed and is perhaps not gone yet. Inside of a `ManuallyDrop` it stays open.
#[derive(Debug)]
struct Corpse {
    uffd: Uffd,
    process: Process,
}

impl Corpse {
    /// Whether nobody can touch its memory any more, after waiting at most this long.
    fn is_gone(&self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        if !self.process.ended(wait) {
            return false;
        }
        // Another process may share the address space (vfork), and the last one leaves it a moment
        // after its pidfd says so.
        loop {
            match self.uffd.probe(ANY_PAGE, SMALL_BYTES) {
                Ok(Filled::Gone) => return true,
                // Nothing was ever registered with it.
                Ok(Filled::Failed(Errno::EINVAL)) => return true,
                _ if Instant::now() >= until => return false,
                _ => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}
