//! Freezes and thaws the guest's real file systems.
//!
//! Invariants: what was frozen is thawed after [`FROZEN_MAX`] whatever the host does, by a new
//! HELLO, and when the agent begins; the loop never waits for a disk, since a process of its own
//! syncs and freezes; a file system on top of another is frozen before it.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag};
use nix::unistd::{fork, pipe2, ForkResult, Pid};

use crate::message::Filesystems;
use crate::spawn::set_nonblocking;

/// How long file systems stay frozen at most.
pub const FROZEN_MAX: Duration = Duration::from_secs(10);

const MOUNTS_MAX: usize = 64;
const REAL: [&str; 7] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "vfat"];

mod requests {
    //! The two requests of every freezable file system.
    nix::ioctl_readwrite!(freeze, b'X', 119, libc::c_int);
    nix::ioctl_readwrite!(thaw, b'X', 120, libc::c_int);
}

struct Mount {
    path: String,
    directory: File,
    frozen: bool,
}

struct Worker {
    pid: Pid,
    results: File,
    request: u64,
    failed: Vec<String>,
    cancelled: bool,
}

/// The file systems that are frozen or being frozen.
#[derive(Default)]
pub struct Freezer {
    mounts: Vec<Mount>,
    worker: Option<Worker>,
    deadline: Option<Instant>,
}

impl Freezer {
    /// The descriptor to wait on while file systems are being frozen.
    pub fn waiting_fd(&self) -> Option<&File> {
        self.worker.as_ref().map(|worker| &worker.results)
    }

    /// When to call [`Freezer::expire`].
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Begins; the answer comes at once or from [`Freezer::progress`].
    pub fn freeze(&mut self, request: u64, enabled: bool, now: Instant) -> Option<Filesystems> {
        if self.worker.is_some() {
            let failed = vec!["another freeze is under way".to_owned()];
            return Some(Filesystems {
                id: request,
                mounts: Vec::new(),
                failed,
            });
        }
        if self.mounts.is_empty() {
            self.mounts = real_mounts();
        }
        if !enabled || self.mounts.is_empty() {
            let mounts = self.mounts.drain(..).map(|mount| mount.path).collect();
            return Some(Filesystems {
                id: request,
                mounts,
                failed: Vec::new(),
            });
        }
        match self.start_worker(request) {
            Ok(worker) => {
                self.worker = Some(worker);
                self.deadline = Some(now + FROZEN_MAX);
                None
            }
            Err(error) => {
                self.mounts.clear();
                let failed = vec![format!("freeze: {error}")];
                Some(Filesystems {
                    id: request,
                    mounts: Vec::new(),
                    failed,
                })
            }
        }
    }

    /// Reads what the worker has done; the answer to FREEZE once it is through.
    pub fn progress(&mut self) -> Option<Filesystems> {
        let worker = self.worker.as_mut()?;
        let mut records = [0; 4 * MOUNTS_MAX];
        match worker.results.read(&mut records) {
            Ok(0) => return self.finish(),
            Ok(count) => {
                for record in records[..count].chunks_exact(2) {
                    note_result(&mut self.mounts, &mut worker.failed, record[0], record[1]);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return self.finish(),
        }
        None
    }

    /// Thaws everything that may be frozen; returns the answer to THAW.
    pub fn thaw(&mut self, request: u64) -> Filesystems {
        self.deadline = None;
        let mut answer = Filesystems {
            id: request,
            mounts: Vec::new(),
            failed: Vec::new(),
        };
        for mount in &mut self.mounts {
            match thaw_one(&mount.directory) {
                Ok(()) => answer.mounts.push(mount.path.clone()),
                Err(nix::Error::EINVAL) => {} // it was not frozen
                Err(error) => answer.failed.push(format!("{}: {error}", mount.path)),
            }
            mount.frozen = false;
        }
        match &mut self.worker {
            // It may be inside the kernel's freeze: its file systems are thawed again when it is
            // through.
            Some(worker) => {
                let _ = kill(worker.pid, Signal::SIGKILL);
                worker.cancelled = true;
            }
            None => self.mounts.clear(),
        }
        answer
    }

    /// Thaws if the time is over.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.thaw(0);
        }
    }

    fn finish(&mut self) -> Option<Filesystems> {
        let worker = self.worker.take()?;
        // Its end of the pipe closes when it exits, so this does not wait.
        let _ = waitpid(worker.pid, None::<WaitPidFlag>);
        if worker.cancelled {
            self.thaw(0);
            let failed = vec!["thawed before everything was frozen".to_owned()];
            return Some(Filesystems {
                id: worker.request,
                mounts: Vec::new(),
                failed,
            });
        }
        let frozen = self.mounts.iter().filter(|mount| mount.frozen);
        let mounts = frozen.map(|mount| mount.path.clone()).collect();
        Some(Filesystems {
            id: worker.request,
            mounts,
            failed: worker.failed,
        })
    }

    fn start_worker(&self, request: u64) -> io::Result<Worker> {
        let (reader, writer) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        set_nonblocking(&reader)?;
        // SAFETY: the agent has one thread, so the child may do whatever the parent may.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Worker {
                pid: child,
                results: File::from(reader),
                request,
                failed: Vec::new(),
                cancelled: false,
            }),
            ForkResult::Child => {
                freeze_all(&self.mounts, writer);
                // SAFETY: it ends this process at once, without the parent's exit handlers.
                unsafe { libc::_exit(0) }
            }
        }
    }
}

fn note_result(mounts: &mut [Mount], failed: &mut Vec<String>, index: u8, errno: u8) {
    let Some(mount) = mounts.get_mut(usize::from(index)) else {
        return;
    };
    if errno == 0 {
        mount.frozen = true;
    } else {
        let error = io::Error::from_raw_os_error(i32::from(errno));
        failed.push(format!("{}: {error}", mount.path));
    }
}

/// Runs in the worker: two bytes per file system, its index and the error number.
fn freeze_all(mounts: &[Mount], writer: OwnedFd) {
    let mut writer = File::from(writer);
    for mount in mounts {
        // What is dirty is written before the first one is frozen, not while all wait.
        // SAFETY: the descriptor is an open directory.
        unsafe { libc::syncfs(mount.directory.as_raw_fd()) };
    }
    for (index, mount) in mounts.iter().enumerate() {
        let mut argument = 0;
        // SAFETY: the descriptor is an open directory and the kernel reads one int at most.
        let done = unsafe { requests::freeze(mount.directory.as_raw_fd(), &mut argument) };
        let errno = done.err().map_or(0, |error| error as i32);
        let _ = writer.write_all(&[index as u8, errno.min(255) as u8]);
    }
}

fn thaw_one(directory: &File) -> nix::Result<()> {
    let mut argument = 0;
    // SAFETY: the descriptor is an open directory and the kernel reads one int at most.
    unsafe { requests::thaw(directory.as_raw_fd(), &mut argument) }.map(drop)
}

/// Thaws what an agent before this one may have left frozen.
pub fn thaw_leftovers() {
    for mount in real_mounts() {
        let _ = thaw_one(&mount.directory);
    }
}

/// The real block file systems that are mounted, those on top first.
fn real_mounts() -> Vec<Mount> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mut mounts: Vec<Mount> = parse_mounts(&table)
        .into_iter()
        .filter_map(open_mount)
        .collect();
    mounts.reverse();
    mounts
}

fn open_mount(path: String) -> Option<Mount> {
    let flags = libc::O_DIRECTORY | libc::O_NONBLOCK;
    let directory = File::options()
        .read(true)
        .custom_flags(flags)
        .open(&path)
        .ok()?;
    Some(Mount {
        path,
        directory,
        frozen: false,
    })
}

/// The mount points of real file systems in the text of `/proc/self/mountinfo`, each system once.
fn parse_mounts(table: &[u8]) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut paths = Vec::new();
    for line in String::from_utf8_lossy(table).lines() {
        let Some((fields, source)) = line.split_once(" - ") else {
            continue;
        };
        let fields: Vec<&str> = fields.split(' ').collect();
        let kind = source.split(' ').next().unwrap_or_default();
        if fields.len() >= 6
            && REAL.contains(&kind)
            && paths.len() < MOUNTS_MAX
            && seen.insert(fields[2].to_owned())
        {
            paths.push(unescape(fields[4]));
        }
    }
    paths
}

/// The kernel writes blanks in mount points as three octal digits.
fn unescape(field: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = field.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = std::str::from_utf8(tail.get(..3).unwrap_or_default());
        let byte = code
            .ok()
            .filter(|_| *first == b'\\')
            .and_then(|code| u8::from_str_radix(code, 8).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[3..] } else { tail };
    }
    std::ffi::OsString::from_vec(bytes)
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw - proc proc rw
24 22 254:16 / /data\\040one rw,noatime - xfs /dev/vdb rw
25 22 254:0 /srv /srv rw - ext4 /dev/vda rw
26 22 0:30 / /pool rw - btrfs /dev/vdc rw
a line that is not one
";

    #[test]
    fn only_real_file_systems_count_and_each_once() {
        assert_eq!(parse_mounts(TABLE), ["/", "/data one", "/pool"]);
    }

    #[test]
    fn escapes_that_are_none_stay() {
        assert_eq!(unescape("a\\b\\01"), "a\\b\\01");
        assert_eq!(unescape("a\\134b"), "a\\b");
    }

    #[test]
    fn a_freeze_that_may_change_nothing_answers_at_once() {
        let mut freezer = Freezer::default();
        let answer = freezer.freeze(7, false, Instant::now()).unwrap();
        assert_eq!((answer.id, answer.failed.len()), (7, 0));
        assert!(freezer.deadline().is_none());
        assert!(freezer.thaw(8).mounts.is_empty());
    }
}
