//! Where a copy goes, by the rules of `cp -a`, and how a tree that is whole gets there.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{openat, renameat, AtFlags, OFlag, AT_FDCWD};
use nix::sys::stat::{fchmod, fchmodat, fstatat, FchmodatFlags, FileStat, Mode, SFlag};

use crate::error::{Error, Result};
use crate::meta::{Applier, Meta};
use crate::staging::{names_in, open_below};

/// A directory and the name in it that the copy gets.
pub struct Place {
    directory: OwnedFd,
    /// None: the tree's contents go into the directory itself.
    name: Option<Vec<u8>>,
    /// A trailing slash was written: only a directory may come to stand there.
    needs_directory: bool,
    shown: Vec<u8>,
}

impl Place {
    /// Where a copy of something named `name` goes; None for a directory's contents.
    pub fn find(destination: &Path, name: Option<&[u8]>) -> Result<Self> {
        let shown = destination.as_os_str().as_bytes().to_vec();
        let fail = |errno| Error::file(&shown, errno);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        match openat(AT_FDCWD, destination, flags, Mode::empty()) {
            Ok(directory) => Ok(Self {
                directory,
                name: name.map(<[u8]>::to_vec),
                needs_directory: false,
                shown,
            }),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Self::new_name(&shown).map_err(fail),
            Err(errno) => Err(fail(errno)),
        }
    }

    fn new_name(shown: &[u8]) -> std::result::Result<Self, Errno> {
        let end = shown
            .iter()
            .rposition(|byte| *byte != b'/')
            .map_or(0, |last| last + 1);
        let plain = &shown[..end];
        let (parent, name) = match plain.iter().rposition(|byte| *byte == b'/') {
            Some(0) => (&b"/"[..], &plain[1..]),
            Some(slash) => (&plain[..slash], &plain[slash + 1..]),
            None => (&b"."[..], plain),
        };
        if name.is_empty() || name == b"." || name == b".." {
            return Err(Errno::ENOENT);
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self {
            directory: openat(AT_FDCWD, parent, flags, Mode::empty())?,
            name: Some(name.to_vec()),
            needs_directory: end < shown.len(),
            shown: shown.to_vec(),
        })
    }

    /// The directory that the copy, or its contents, will stand in.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Refuses what can't stand here, before anything is read for it.
    pub fn check(&self, is_directory: bool) -> Result<()> {
        let Some(name) = &self.name else {
            return if is_directory {
                Ok(())
            } else {
                self.unfit("a directory was expected")
            };
        };
        if self.needs_directory && !is_directory {
            return self.unfit("there is no such directory");
        }
        match self.look(name)? {
            Some(stat) if is_directory && !is_dir(&stat) => {
                self.unfit("a directory can't replace what is not one")
            }
            Some(stat) if !is_directory && is_dir(&stat) => {
                self.unfit("a directory of that name stands there")
            }
            _ => Ok(()),
        }
    }

    /// Moves the tree `staged`, a name in `from`, here; `meta` is for a top that is a directory.
    pub fn take(
        &self,
        from: BorrowedFd<'_>,
        staged: &[u8],
        meta: Option<&Meta>,
        applier: &Applier,
    ) -> Result<()> {
        let fail = |errno| Error::file(&self.shown, errno);
        let Some(meta) = meta else {
            self.check(false)?; // it may have changed since
            let name = self.name.as_deref().unwrap_or_default();
            return renameat(from, staged, self.directory(), name).map_err(fail);
        };
        let source = open_below(from, staged).map_err(fail)?;
        let exists = match &self.name {
            None => Some(self.directory.try_clone().map_err(Error::Stream)?),
            Some(name) => match open_below(self.directory(), name) {
                Ok(found) => Some(found),
                Err(Errno::ENOENT) => None,
                Err(errno) => return Err(fail(errno)),
            },
        };
        let Some(target) = exists else {
            let name = self.name.as_deref().unwrap_or_default();
            renameat(from, staged, self.directory(), name).map_err(fail)?;
            // Last: a directory that may not be written can't be moved either.
            return applier.apply(&source, meta).map_err(fail);
        };
        // Looked through first, so that a tree that does not fit is not merged in part.
        self.merge(source.as_fd(), target.as_fd(), applier, true)?;
        self.merge(source.as_fd(), target.as_fd(), applier, false)?;
        applier.apply(&target, meta).map_err(fail)
    }

    fn merge(
        &self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        applier: &Applier,
        only_look: bool,
    ) -> Result<()> {
        for name in names_in(from).map_err(|errno| Error::file(&self.shown, errno))? {
            let fail = |errno| Error::file(&name, errno);
            let unfit = |cause| Error::Unfit {
                path: name.clone(),
                cause,
            };
            let ours =
                fstatat(from, name.as_slice(), AtFlags::AT_SYMLINK_NOFOLLOW).map_err(fail)?;
            let theirs = match fstatat(to, name.as_slice(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) => Some(stat),
                Err(Errno::ENOENT) => None,
                Err(errno) => return Err(fail(errno)),
            };
            match theirs {
                Some(theirs) if is_dir(&ours) && is_dir(&theirs) => {
                    let below = open_any(from, &name, &ours).map_err(fail)?;
                    let target = open_below(to, &name).map_err(fail)?;
                    self.merge(below.as_fd(), target.as_fd(), applier, only_look)?;
                    if !only_look {
                        applier.apply(&target, &Meta::of(&ours)).map_err(fail)?;
                    }
                }
                Some(theirs) if is_dir(&theirs) => {
                    return Err(unfit("a directory of that name stands there"));
                }
                Some(_) if is_dir(&ours) => {
                    return Err(unfit("a directory can't replace what is not one"));
                }
                _ if only_look => {}
                _ => move_one(from, to, &name, &ours).map_err(fail)?,
            }
        }
        Ok(())
    }

    fn look(&self, name: &[u8]) -> Result<Option<FileStat>> {
        match fstatat(&self.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(Error::file(&self.shown, errno)),
        }
    }

    fn unfit(&self, cause: &'static str) -> Result<()> {
        Err(Error::Unfit {
            path: self.shown.clone(),
            cause,
        })
    }
}

fn is_dir(stat: &FileStat) -> bool {
    stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits()
}

/// A directory of ours whose mode may keep even its owner out.
fn open_any(
    parent: BorrowedFd<'_>,
    name: &[u8],
    stat: &FileStat,
) -> std::result::Result<OwnedFd, Errno> {
    if stat.st_mode & 0o700 != 0o700 {
        fchmodat(parent, name, Mode::S_IRWXU, FchmodatFlags::FollowSymlink)?;
    }
    open_below(parent, name)
}

/// Moves one file, link or directory. A directory changes where its `..` leads, which takes the
/// right to write it.
fn move_one(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &[u8],
    stat: &FileStat,
) -> std::result::Result<(), Errno> {
    match renameat(from, name, to, name) {
        Err(Errno::EACCES) if is_dir(stat) => {
            let opened = open_any(from, name, stat)?;
            renameat(from, name, to, name)?;
            fchmod(&opened, Mode::from_bits_truncate(stat.st_mode & 0o7777))
        }
        moved => moved,
    }
}
