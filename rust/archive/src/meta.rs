//! Mode, owner and times of a file, and how they are put on one.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{fchmod, futimens, utimensat, FileStat, Mode, UtimensatFlags};
use nix::sys::time::TimeSpec;
use nix::unistd::{fchown, fchownat, geteuid, Gid, Uid};

const SET_ID: u32 = 0o6000;
const NO_ID: u64 = u32::MAX as u64;

/// An instant: seconds since 1970 and nanoseconds.
pub type Instant = (i64, u32);

/// What a file has beside its name and its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with set-user-id, set-group-id and sticky.
    pub mode: u32,
    /// The owner's number.
    pub uid: u64,
    /// The group's number.
    pub gid: u64,
    /// When the data last changed.
    pub modified: Instant,
    /// When the data was last read; `modified` where the stream does not say.
    pub accessed: Instant,
}

impl Meta {
    pub(crate) fn of(stat: &FileStat) -> Self {
        Self {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid.into(),
            gid: stat.st_gid.into(),
            modified: (stat.st_mtime, stat.st_mtime_nsec as u32),
            accessed: (stat.st_atime, stat.st_atime_nsec as u32),
        }
    }
}

/// How much of what a stream says about owners and rights is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// All of it: the host's files on their way into a guest.
    Full,
    /// Not the set-user-id and set-group-id bits: a guest's files on their way to the host.
    NoSetId,
}

/// Puts metadata on files as far as this process may.
#[derive(Clone, Copy, Debug)]
pub struct Applier {
    trust: Trust,
    owners: bool,
}

impl Applier {
    /// Owners are kept by root only.
    pub fn new(trust: Trust) -> Self {
        Self {
            trust,
            owners: geteuid().is_root(),
        }
    }

    /// Whether a mode loses bits.
    pub fn drops(&self, mode: u32) -> bool {
        self.mode(mode) != mode & 0o7777
    }

    fn mode(&self, mode: u32) -> u32 {
        // A set-id bit means something for its owner only: without that it would be another right.
        if self.trust == Trust::Full && self.owners {
            mode & 0o7777
        } else {
            mode & 0o7777 & !SET_ID
        }
    }

    /// On an open file or directory.
    pub fn apply(&self, fd: impl AsFd, meta: &Meta) -> Result<(), Errno> {
        if self.owners {
            fchown(&fd, owner(meta.uid)?, group(meta.gid)?)?;
        }
        // After the owner, which takes set-id bits away.
        fchmod(&fd, Mode::from_bits_truncate(self.mode(meta.mode)))?;
        futimens(&fd, &spec(meta.accessed), &spec(meta.modified))
    }

    /// On a symbolic link itself.
    pub fn apply_to_link(
        &self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        meta: &Meta,
    ) -> Result<(), Errno> {
        if self.owners {
            let flag = AtFlags::AT_SYMLINK_NOFOLLOW;
            fchownat(directory, name, owner(meta.uid)?, group(meta.gid)?, flag)?;
        }
        let (accessed, modified) = (spec(meta.accessed), spec(meta.modified));
        let flag = UtimensatFlags::NoFollowSymlink;
        utimensat(directory, name, &accessed, &modified, flag)
    }
}

pub(crate) fn spec(instant: Instant) -> TimeSpec {
    TimeSpec::new(instant.0, i64::from(instant.1))
}

/// The number that means "leave it" to the kernel belongs to nobody.
fn id(number: u64) -> Result<u32, Errno> {
    if number >= NO_ID {
        return Err(Errno::EINVAL);
    }
    Ok(number as u32)
}

fn owner(number: u64) -> Result<Option<Uid>, Errno> {
    Ok(Some(Uid::from_raw(id(number)?)))
}

fn group(number: u64) -> Result<Option<Gid>, Errno> {
    Ok(Some(Gid::from_raw(id(number)?)))
}
