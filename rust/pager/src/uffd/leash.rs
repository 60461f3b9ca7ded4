//! What ends a VMM when nobody is left to serve it, also where everybody was killed at once.
//!
//! Where the last descriptor of a userfaultfd closes, its memory reads as zeros. So the VMM is sent
//! two descriptors over its own connection, which it never reads and which its kernel therefore
//! keeps until it has ended:
//! - its userfaultfd: while the VMM lives the last descriptor can't close, and whoever touches a
//!   page that nobody fills waits;
//! - the reading end of a pipe that signals SIGKILL to it when the writing end is gone. Pager and
//!   keeper hold that end: it closes with the last of them, and the kernel kills the VMM.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags, UnixAddr};
use nix::unistd::pipe2;

/// Who gets the signal, as the kernel reads it.
#[repr(C)]
struct Owner {
    kind: i32,
    pid: i32,
}

/// Ties a VMM to the descriptor that is returned: where its last duplicate closes, the VMM is
/// killed. Its number must be known to be the right one.
///
/// # Errors
/// What the kernel says; also where the VMM has left.
pub fn fasten(stream: BorrowedFd<'_>, uffd: BorrowedFd<'_>, pid: i32) -> io::Result<OwnedFd> {
    const F_OWNER_PID: i32 = 1;
    const F_SETOWN_EX: i32 = 15;
    const F_SETSIG: i32 = 10;
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let fd = reader.as_raw_fd();
    let owner = Owner {
        kind: F_OWNER_PID,
        pid,
    };
    // SAFETY: the descriptor is ours, and the kernel reads a structure that lives here.
    Errno::result(unsafe { libc::fcntl(fd, F_SETOWN_EX, &raw const owner) })?;
    // SAFETY: only numbers are passed.
    Errno::result(unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGKILL) })?;
    let flags = libc::O_ASYNC | libc::O_NONBLOCK;
    // SAFETY: as above.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFL, flags) })?;
    let numbers: [RawFd; 2] = [uffd.as_raw_fd(), fd];
    let (data, rights) = (
        [io::IoSlice::new(b"\n")],
        [ControlMessage::ScmRights(&numbers)],
    );
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<UnixAddr>(stream.as_raw_fd(), &data, &rights, flags, None)?;
    Ok(writer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Process;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    #[test]
    fn who_is_tied_ends_with_the_last_that_holds_it() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut child = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        let file = tempfile::tempfile().unwrap();
        let one = fasten(ours.as_fd(), file.as_fd(), child.id() as i32).unwrap();
        let other = one.try_clone().unwrap();
        drop(ours);
        drop(one);
        assert!(!process.ended(Duration::from_millis(50)));
        drop(other);
        assert!(process.ended(Duration::from_secs(60)));
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn who_has_left_is_not_tied() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let file = tempfile::tempfile().unwrap();
        assert!(fasten(ours.as_fd(), file.as_fd(), 1).is_err());
    }
}
