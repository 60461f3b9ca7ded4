//! Writes a tree as a stream. Links are never followed, nor is a path but the one given resolved.

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{openat, readlinkat, AtFlags, OFlag, AT_FDCWD};
use nix::sys::stat::{fstat, fstatat, FileStat, Mode, SFlag};
use nix::sys::statfs::{
    fstatfs, FsType, CGROUP2_SUPER_MAGIC, CGROUP_SUPER_MAGIC, PROC_SUPER_MAGIC, SYSFS_MAGIC,
};
use nix::sys::uio::pread;

use crate::entry::{Entry, Kind};
use crate::error::{Error, Result};
use crate::limits::{BUFFER_BYTES, DEPTH_MAX, ENTRIES_MAX, LINKED_FILES_MAX, PATH_MAX};
use crate::meta::Meta;
use crate::sparse::Map;
use crate::write::Writer;
use crate::{Progress, Summary};

/// File systems that the kernel makes up: to read them is to ask it, and some have no end.
const MADE_UP: [FsType; 4] = [
    PROC_SUPER_MAGIC,
    SYSFS_MAGIC,
    CGROUP_SUPER_MAGIC,
    CGROUP2_SUPER_MAGIC,
];

/// Writes what stands at `source` to `out`, under the name `top` (`.` for a directory's contents).
pub fn pack(source: &Path, top: &[u8], out: impl Write, progress: Progress<'_>) -> Result<Summary> {
    let path = source.as_os_str().as_bytes();
    let stat = fstatat(AT_FDCWD, path, AtFlags::AT_SYMLINK_NOFOLLOW)
        .map_err(|errno| Error::file(path, errno))?;
    if top == b"." && kind_of(&stat) != SFlag::S_IFDIR {
        return Err(Error::Unfit {
            path: path.to_vec(),
            cause: "it is not a directory",
        });
    }
    let total = measure(AT_FDCWD, path, &stat, 0, stat.st_dev);
    let mut packer = Packer {
        writer: Writer::new(out, total)?,
        linked: HashMap::new(),
        summary: Summary::default(),
        total,
        progress,
        buffer: vec![0; BUFFER_BYTES],
    };
    packer.add(AT_FDCWD, path, top, &stat, 0, stat.st_dev)?;
    if packer.summary.entries == 0 {
        return Err(Error::Unfit {
            path: path.to_vec(),
            cause: "it is a device, a named pipe or a socket, which are not copied",
        });
    }
    packer.tell()?;
    let Packer {
        writer, summary, ..
    } = packer;
    writer.finish()?;
    Ok(summary)
}

struct Packer<'a, W: Write> {
    writer: Writer<W>,
    linked: HashMap<(u64, u64), Vec<u8>>,
    summary: Summary,
    total: u64,
    progress: Progress<'a>,
    buffer: Vec<u8>,
}

impl<W: Write> Packer<'_, W> {
    fn add(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        stat: &FileStat,
        depth: usize,
        device: u64,
    ) -> Result<()> {
        if path.len() > PATH_MAX || depth >= DEPTH_MAX {
            return Err(Error::Unfit {
                path: path.to_vec(),
                cause: "it is too deep to be copied",
            });
        }
        if self.summary.entries >= ENTRIES_MAX {
            return Err(Error::Unfit {
                path: path.to_vec(),
                cause: "there are too many files to copy at once",
            });
        }
        let done = match kind_of(stat) {
            SFlag::S_IFDIR => self.add_directory(directory, name, path, depth, device),
            SFlag::S_IFREG => self.add_file(directory, name, path),
            SFlag::S_IFLNK => self.add_link(directory, name, path, stat),
            _ => {
                let what = "left out: a device, a named pipe or a socket";
                self.summary.note(path, what);
                return Ok(());
            }
        };
        match done {
            // It went while we looked; a tree that somebody writes is copied as it is met.
            Err(Error::File { cause, .. }) if depth > 0 && is_gone(&cause) => {
                self.summary
                    .note(path, "left out: it was removed meanwhile");
                Ok(())
            }
            other => other,
        }
    }

    fn add_directory(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        depth: usize,
        device: u64,
    ) -> Result<()> {
        let fail = |errno| Error::file(path, errno);
        let opened = open_directory(parent, name).map_err(fail)?;
        let stat = fstat(&opened).map_err(fail)?;
        self.put(path, Kind::Directory, &stat)?;
        if is_made_up(&opened, stat.st_dev, device) {
            self.summary
                .note(path, "left empty: the kernel makes up what is in it");
            return Ok(());
        }
        let mut names = Dir::from_fd(opened.try_clone().map_err(Error::Stream)?).map_err(fail)?;
        for item in names.iter() {
            let item = item.map_err(fail)?;
            let child = item.file_name().to_bytes();
            if child == b"." || child == b".." {
                continue;
            }
            let below = [path, b"/", child].concat();
            match fstatat(&opened, child, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(found) => {
                    self.add(
                        opened.as_fd(),
                        child,
                        &below,
                        &found,
                        depth + 1,
                        stat.st_dev,
                    )?;
                }
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(Error::file(&below, errno)),
            }
        }
        Ok(())
    }

    fn add_file(&mut self, directory: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<()> {
        let fail = |errno| Error::file(path, errno);
        // Not blocking: a named pipe may have taken its place.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = openat(directory, name, flags, Mode::empty()).map_err(fail)?;
        let stat = fstat(&file).map_err(fail)?;
        if kind_of(&stat) != SFlag::S_IFREG {
            self.summary
                .note(path, "left out: it was replaced meanwhile");
            return Ok(());
        }
        if stat.st_nlink > 1 {
            let key = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.linked.get(&key) {
                let kind = Kind::Hardlink(first.clone());
                return self.put(path, kind, &stat);
            }
            if self.linked.len() < LINKED_FILES_MAX {
                self.linked.insert(key, path.to_vec());
            }
        }
        let size = stat.st_size as u64;
        // Asked only where blocks are missing: most files have no holes.
        let holed = (stat.st_blocks as u64).saturating_mul(512) < size;
        let map = if holed { Map::of(&file, size) } else { None };
        let pieces = map
            .as_ref()
            .map_or(vec![(0, size)], |map| map.pieces().to_vec());
        self.put(path, Kind::File { size, map }, &stat)?;
        for (offset, length) in pieces {
            self.add_data(&file, path, offset, length)?;
        }
        Ok(())
    }

    fn add_data(&mut self, file: &OwnedFd, path: &[u8], mut at: u64, length: u64) -> Result<()> {
        let end = at + length;
        while at < end {
            let want = self
                .buffer
                .len()
                .min(usize::try_from(end - at).unwrap_or(usize::MAX));
            let got = match pread(file, &mut self.buffer[..want], at as i64) {
                Ok(0) => {
                    // The stream said how much would come: what is missing is zeros.
                    self.summary
                        .note(path, "it got shorter while it was copied");
                    return self.add_zeros(end - at);
                }
                Ok(got) => got,
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    // Not as for a file that is gone: part of it is in the stream already.
                    return Err(Error::Stream(errno.into()));
                }
            };
            self.writer.data(&self.buffer[..got])?;
            at += got as u64;
            self.summary.bytes += got as u64;
            self.tell()?;
        }
        Ok(())
    }

    fn add_zeros(&mut self, mut left: u64) -> Result<()> {
        self.buffer.fill(0);
        while left > 0 {
            let count = left.min(BUFFER_BYTES as u64);
            self.writer.data(&self.buffer[..count as usize])?;
            left -= count;
            self.summary.bytes += count;
            self.tell()?;
        }
        Ok(())
    }

    fn add_link(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        stat: &FileStat,
    ) -> Result<()> {
        let target = readlinkat(directory, name).map_err(|errno| Error::file(path, errno))?;
        self.put(path, Kind::Symlink(target.into_vec()), stat)
    }

    fn put(&mut self, path: &[u8], kind: Kind, stat: &FileStat) -> Result<()> {
        self.summary.entries += 1;
        self.writer.entry(&Entry {
            path: path.to_vec(),
            kind,
            meta: Meta::of(stat),
        })
    }

    fn tell(&mut self) -> Result<()> {
        if (self.progress)(self.summary.bytes, self.total) {
            Ok(())
        } else {
            Err(Error::Cancelled)
        }
    }
}

fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

fn is_gone(cause: &std::io::Error) -> bool {
    cause.kind() == std::io::ErrorKind::NotFound
}

fn open_directory(parent: BorrowedFd<'_>, name: &[u8]) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

fn is_made_up(directory: impl AsFd, device: u64, parent_device: u64) -> bool {
    // What a person names is copied; what lies mounted in it is looked at.
    device != parent_device
        && fstatfs(directory).is_ok_and(|found| MADE_UP.contains(&found.filesystem_type()))
}

/// Bytes of data in the tree, near enough for progress; what can't be read counts nothing here.
fn measure(
    directory: BorrowedFd<'_>,
    name: &[u8],
    stat: &FileStat,
    depth: usize,
    device: u64,
) -> u64 {
    match kind_of(stat) {
        SFlag::S_IFREG => (stat.st_size as u64).min((stat.st_blocks as u64).saturating_mul(512)),
        SFlag::S_IFDIR if depth < DEPTH_MAX => {
            let Ok(opened) = open_directory(directory, name) else {
                return 0;
            };
            if is_made_up(&opened, stat.st_dev, device) {
                return 0;
            }
            let Ok(mut names) = opened
                .try_clone()
                .map_err(|_| ())
                .and_then(|fd| Dir::from_fd(fd).map_err(|_| ()))
            else {
                return 0;
            };
            let mut sum = 0u64;
            for item in names.iter().flatten() {
                let child = item.file_name().to_bytes();
                if child == b"." || child == b".." {
                    continue;
                }
                if let Ok(found) = fstatat(&opened, child, AtFlags::AT_SYMLINK_NOFOLLOW) {
                    let below = measure(opened.as_fd(), child, &found, depth + 1, stat.st_dev);
                    sum = sum.saturating_add(below);
                }
            }
            sum
        }
        _ => 0,
    }
}
