//! Other processes, by handles: a signal goes to that process or to nobody.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

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

    /// Whether it was killed and only threads of this name are left of it, which wait where no
    /// signal reaches them: it does nothing any more but what those are at. Its handle does not say
    /// so (a thread's handle neither, since Linux 6.15). False where `/proc` can't tell.
    pub fn is_left_in(&self, name: &str) -> bool {
        let Ok(pid) = self.pid() else {
            return false;
        };
        let first = fs::read_to_string(format!("/proc/{pid}/stat"));
        if !first.is_ok_and(|stat| has_ended(task_of(&stat).1)) {
            return false;
        }
        let left = fs::read_dir(format!("/proc/{pid}/task")).and_then(|tasks| {
            let stats = tasks.map(|task| fs::read_to_string(task?.path().join("stat")));
            stats.collect::<io::Result<Vec<_>>>()
        });
        // One that ends meanwhile fails the whole look; the next one is soon.
        let harmless = left.is_ok_and(|stats| {
            stats
                .iter()
                .map(|stat| task_of(stat))
                .all(|(comm, state)| has_ended(state) || (comm == name && state == "D"))
        });
        // The number was its own all along: nobody has it before the process is reaped.
        harmless && self.pid().is_ok_and(|now| now == pid)
    }

    /// Its number, as this process sees it.
    ///
    /// # Errors
    /// The handle is none, or the process is gone.
    pub fn pid(&self) -> io::Result<i32> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd()))?;
        let line = info.lines().find_map(|line| line.strip_prefix("Pid:"));
        match line.and_then(|pid| pid.trim().parse().ok()) {
            Some(pid) if pid > 0 => Ok(pid),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Another handle of the same process.
    ///
    /// # Errors
    /// Where there are too many descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}

/// A thread's name and state, of the text of its `stat`.
fn task_of(stat: &str) -> (&str, &str) {
    let (_, rest) = stat.split_once(" (").unwrap_or_default();
    let (name, rest) = rest.rsplit_once(") ").unwrap_or_default();
    (name, rest.split(' ').next().unwrap_or_default())
}

fn has_ended(state: &str) -> bool {
    matches!(state, "Z" | "X")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_is_seen_to_end() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = child.id() as i32;
        let process = Process::open(pid).unwrap();
        assert!(!process.ended(Duration::ZERO));
        assert_eq!(process.try_clone().unwrap().pid().unwrap(), pid);
        assert!(!process.is_left_in("sleep"));
        process.kill();
        assert!(process.ended(Duration::from_secs(60)));
        assert!(process.is_left_in("store")); // nothing of it is
        child.wait().unwrap();
        assert!(process.pid().is_err() && !process.is_left_in("store"));
    }

    #[test]
    fn a_name_of_any_kind_is_read() {
        assert_eq!(task_of("12 (a) (b) D 1 2\n"), ("a) (b", "D"));
        assert_eq!(task_of("nothing"), ("", ""));
    }
}
