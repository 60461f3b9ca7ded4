//! A directory of its own in which a tree is made before any of it stands where it was asked for.
//!
//! Nobody but its owner can enter it, and everything in it came from one stream. It is removed with
//! all that is in it when it is dropped, however the work ended.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{openat, AtFlags, OFlag};
use nix::sys::stat::{fchmod, fchmodat, fstatat, mkdirat, FchmodatFlags, Mode, SFlag};
use nix::unistd::{unlinkat, UnlinkatFlags};

/// What a staging directory's name begins with; a killed process may leave one.
pub const PREFIX: &str = ".diapause-cp-";
const TRIES: u32 = 100;

/// The directory.
pub struct Staging {
    parent: OwnedFd,
    name: Vec<u8>,
    fd: OwnedFd,
}

impl Staging {
    /// Makes one in `parent`.
    pub fn new(parent: BorrowedFd<'_>) -> Result<Self, Errno> {
        let parent = parent.try_clone_to_owned().map_err(|_| Errno::EMFILE)?;
        for attempt in 0..TRIES {
            let name = unlikely_name(attempt);
            match mkdirat(&parent, name.as_slice(), Mode::S_IRWXU) {
                Err(Errno::EEXIST) => continue,
                made => made?,
            }
            let fd = open_below(parent.as_fd(), &name)?;
            // The mask of the process may have taken our own rights.
            fchmod(&fd, Mode::S_IRWXU)?;
            return Ok(Self { parent, name, fd });
        }
        Err(Errno::EEXIST)
    }

    /// The directory, open.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        remove(self.parent.as_fd(), &self.name);
    }
}

fn unlikely_name(attempt: u32) -> Vec<u8> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let (pid, nanoseconds) = (std::process::id(), now.as_nanos());
    format!("{PREFIX}{pid:x}-{nanoseconds:x}-{attempt}").into_bytes()
}

/// Opens a directory by its name in another one, never through a link.
pub fn open_below(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

/// The names in a directory.
pub fn names_in(directory: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, Errno> {
    // Opened again: a directory's position belongs to whoever reads it.
    let mut opened = Dir::openat(
        directory,
        c".",
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let mut names = Vec::new();
    for item in opened.iter() {
        let item = item?;
        let name = item.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// Removes what stands there, as far as that can be done; links are removed, not followed.
fn remove(parent: BorrowedFd<'_>, name: &[u8]) {
    let Ok(stat) = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) else {
        return;
    };
    if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFDIR.bits() {
        let _ = unlinkat(parent, name, UnlinkatFlags::NoRemoveDir);
        return;
    }
    // Its mode came from the stream and may keep us out.
    let _ = fchmodat(parent, name, Mode::S_IRWXU, FchmodatFlags::FollowSymlink);
    if let Ok(opened) = open_below(parent, name) {
        for child in names_in(opened.as_fd()).unwrap_or_default() {
            remove(opened.as_fd(), &child);
        }
    }
    let _ = unlinkat(parent, name, UnlinkatFlags::RemoveDir);
}
