//! Makes the tree of a root file system from a tar that anybody may have written.
//!
//! Files, directories and links are made as `unpack` makes them: every component of a path is
//! opened by itself and never through a link, nothing that stands is opened or replaced. Owners,
//! set-id bits, devices and attributes are never put on a file of the host: they are handed back,
//! for whoever writes the file system.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{openat, AtFlags, OFlag, AT_FDCWD};
use nix::sys::stat::{fchmod, fstatat, futimens, mkdirat, utimensat, Mode, SFlag, UtimensatFlags};
use nix::unistd::{ftruncate, linkat, symlinkat};

use crate::entry::{Entry, Kind, Special};
use crate::error::{Error, Result};
use crate::limits::REMEMBERED_BYTES_MAX;
use crate::meta::{spec, Instant, Meta};
use crate::name::components;
use crate::read::{Attribute, Reader};
use crate::sparse::Map;
use crate::staging::open_below;
use crate::tally::Tally;
use crate::{Progress, Summary};

const DIRECTORY_MODE: u32 = 0o755;
const KEPT_ATTRIBUTE: &[u8] = b"security.capability";
const KEPT_ATTRIBUTES: &[u8] = b"user.";
const ATTRIBUTE_NAME_MAX: usize = 200;

/// What a root file system may come to.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes of its files, holes counted.
    pub bytes: u64,
    /// Files, directories, links and devices.
    pub entries: u64,
}

/// An entry of which a file of ours does not say everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its path below the root, without a slash in front; empty for the root itself.
    pub path: Vec<u8>,
    /// Kind and permission bits, as the kernel has them.
    pub mode: u32,
    /// The owner's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
    /// A device or a pipe: no file was made for it.
    pub special: Option<Special>,
    /// Extended attributes.
    pub attributes: Vec<Attribute>,
}

type Parts = Vec<Vec<u8>>;

/// Fills the empty `directory`; what its files do not say comes back. A tree that was refused is
/// left as it is: the directory is the caller's to remove.
pub fn unpack_rootfs(
    input: impl Read,
    directory: &Path,
    bounds: Bounds,
    progress: Progress<'_>,
) -> Result<(Summary, Vec<Placed>)> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = openat(AT_FDCWD, directory, flags, Mode::empty())
        .map_err(|errno| Error::file(directory.as_os_str().as_encoded_bytes(), errno))?;
    let mut tree = Tree {
        root,
        bounds,
        tally: Tally::new(progress),
        placed: Vec::new(),
        times: Vec::new(),
        bytes: 0,
        remembered: 0,
    };
    let mut reader = Reader::of_image(input);
    while let Some(entry) = reader.next_entry()? {
        let attributes = reader.attributes();
        tree.take(&entry, attributes, &mut reader)?;
    }
    if tree.tally.summary.entries == 0 {
        return Err(Error::refused(b"", "the archive is empty"));
    }
    tree.set_times()?;
    Ok((tree.tally.summary, tree.placed))
}

struct Tree<'a> {
    root: OwnedFd,
    bounds: Bounds,
    tally: Tally<'a>,
    placed: Vec<Placed>,
    /// Directories and when they were last changed, which every entry in them changes.
    times: Vec<(Parts, Instant)>,
    bytes: u64,
    remembered: usize,
}

impl Tree<'_> {
    fn take(
        &mut self,
        entry: &Entry,
        attributes: Vec<Attribute>,
        reader: &mut Reader<impl Read>,
    ) -> Result<()> {
        self.tally.summary.entries += 1;
        if self.tally.summary.entries > self.bounds.entries {
            let most = self.bounds.entries;
            return Err(Error::TooLarge(format!("more than {most} entries")));
        }
        let parts = components(&entry.path)?;
        let Some((name, above)) = parts.split_last() else {
            if entry.kind != Kind::Directory {
                return Err(Error::refused(&entry.path, "the root is no directory"));
            }
            self.note_time(Vec::new(), &entry.meta)?;
            return self.place(entry, Vec::new(), attributes);
        };
        let directory = self.enter(above, &entry.path)?;
        let made = |errno| made(&entry.path, errno);
        match &entry.kind {
            Kind::Directory => {
                self.make_directory(&directory, name).map_err(made)?;
                self.note_time(parts.clone(), &entry.meta)?;
            }
            Kind::File { size, map } => {
                self.make_file(entry, &directory, name, *size, map.as_ref(), reader)?;
            }
            Kind::Symlink(target) => {
                symlinkat(target.as_slice(), &directory, name.as_slice()).map_err(made)?;
                let time = spec(entry.meta.modified);
                let flag = UtimensatFlags::NoFollowSymlink;
                utimensat(&directory, name.as_slice(), &time, &time, flag).map_err(made)?;
            }
            Kind::Hardlink(target) => self.make_hardlink(entry, &directory, name, target)?,
            Kind::Special(_) => {}
        }
        self.place(entry, parts, attributes)?;
        self.tally.tell(reader.total())
    }

    /// Opens the directory an entry stands in, and makes what is missing of it.
    fn enter(&self, above: &[Vec<u8>], entry: &[u8]) -> Result<OwnedFd> {
        let mut found = self.root.try_clone().map_err(Error::Stream)?;
        for part in above {
            let opened = match open_below(found.as_fd(), part) {
                Err(Errno::ENOENT) => self.make_directory(&found, part),
                opened => opened,
            };
            found = opened.map_err(|errno| match errno {
                Errno::ENOTDIR | Errno::ELOOP => {
                    Error::refused(entry, "its path leads through what is no directory")
                }
                other => Error::file(entry, other),
            })?;
        }
        Ok(found)
    }

    /// A directory; one that stands there is as good, since archives name them twice.
    fn make_directory(&self, above: &OwnedFd, name: &[u8]) -> std::result::Result<OwnedFd, Errno> {
        match mkdirat(above, name, Mode::S_IRWXU) {
            Ok(()) => {}
            Err(Errno::EEXIST) => {
                return open_below(above.as_fd(), name).map_err(|_| Errno::EEXIST)
            }
            Err(errno) => return Err(errno),
        }
        let opened = open_below(above.as_fd(), name)?;
        fchmod(&opened, Mode::from_bits_truncate(DIRECTORY_MODE))?;
        Ok(opened)
    }

    fn make_file(
        &mut self,
        entry: &Entry,
        directory: &OwnedFd,
        name: &[u8],
        size: u64,
        map: Option<&Map>,
        reader: &mut Reader<impl Read>,
    ) -> Result<()> {
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > self.bounds.bytes {
            let most = self.bounds.bytes;
            return Err(Error::TooLarge(format!("more than {most} bytes of files")));
        }
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let file = openat(directory, name, flags, mode).map_err(|e| made(&entry.path, e))?;
        let whole = [(0, size)];
        for (offset, length) in map.map_or(&whole[..], Map::pieces) {
            self.tally
                .fill(&file, &entry.path, *offset, *length, reader)?;
        }
        let fail = |errno| Error::file(&entry.path, errno);
        ftruncate(&file, size as i64).map_err(fail)?;
        fchmod(&file, Mode::from_bits_truncate(own_mode(&entry.meta))).map_err(fail)?;
        let time = spec(entry.meta.modified);
        futimens(&file, &time, &time).map_err(fail)
    }

    fn make_hardlink(
        &self,
        entry: &Entry,
        directory: &OwnedFd,
        name: &[u8],
        target: &[u8],
    ) -> Result<()> {
        let lost = || Error::refused(&entry.path, "it links to no file of the archive");
        let parts = components(target).map_err(|_| lost())?;
        let (last, above) = parts.split_last().ok_or_else(lost)?;
        let mut from = self.root.try_clone().map_err(Error::Stream)?;
        for part in above {
            from = open_below(from.as_fd(), part).map_err(|_| lost())?;
        }
        let stat = fstatat(&from, last.as_slice(), AtFlags::AT_SYMLINK_NOFOLLOW);
        if stat.map_err(|_| lost())?.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
            return Err(Error::refused(&entry.path, "it links to what is no file"));
        }
        linkat(&from, last.as_slice(), directory, name, AtFlags::empty())
            .map_err(|errno| made(&entry.path, errno))
    }

    /// Remembers what the file that was made does not say.
    fn place(&mut self, entry: &Entry, parts: Parts, attributes: Vec<Attribute>) -> Result<()> {
        let meta = &entry.meta;
        let (kind, said) = match &entry.kind {
            Kind::Directory => (SFlag::S_IFDIR.bits(), DIRECTORY_MODE),
            Kind::File { .. } => (SFlag::S_IFREG.bits(), own_mode(meta)),
            Kind::Symlink(_) => (SFlag::S_IFLNK.bits(), meta.mode),
            Kind::Hardlink(_) => return Ok(()),
            Kind::Special(Special::Character(..)) => (SFlag::S_IFCHR.bits(), !0),
            Kind::Special(Special::Block(..)) => (SFlag::S_IFBLK.bits(), !0),
            Kind::Special(Special::Pipe) => (SFlag::S_IFIFO.bits(), !0),
        };
        let attributes = self.kept(&entry.path, attributes);
        if meta.mode == said && meta.uid == 0 && meta.gid == 0 && attributes.is_empty() {
            return Ok(());
        }
        let bytes = attributes
            .iter()
            .map(|(name, value)| name.len() + value.len());
        self.remember(bytes.sum::<usize>() + entry.path.len())?;
        self.placed.push(Placed {
            path: parts.join(&b'/'),
            mode: kind | meta.mode,
            uid: meta.uid as u32, // below 2^32: the reader refuses others
            gid: meta.gid as u32,
            special: match entry.kind {
                Kind::Special(special) => Some(special),
                _ => None,
            },
            attributes,
        });
        Ok(())
    }

    /// The attributes that mean the same to every guest.
    fn kept(&mut self, path: &[u8], attributes: Vec<Attribute>) -> Vec<Attribute> {
        let mut kept = Vec::new();
        for (name, value) in attributes {
            let plain = name.len() <= ATTRIBUTE_NAME_MAX
                && name
                    .iter()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte));
            if plain && (name == KEPT_ATTRIBUTE || name.starts_with(KEPT_ATTRIBUTES)) {
                kept.push((name, value));
            } else {
                self.tally
                    .summary
                    .note(path, "an extended attribute was left out");
            }
        }
        kept
    }

    fn note_time(&mut self, parts: Parts, meta: &Meta) -> Result<()> {
        self.remember(parts.iter().map(Vec::len).sum())?;
        self.times.push((parts, meta.modified));
        Ok(())
    }

    fn remember(&mut self, bytes: usize) -> Result<()> {
        const EACH: usize = 128; // what keeping one costs beside its bytes
        self.remembered += bytes + EACH;
        if self.remembered > REMEMBERED_BYTES_MAX {
            let cause = "its owners, modes and attributes take more memory than can be";
            return Err(Error::TooLarge(cause.into()));
        }
        Ok(())
    }

    fn set_times(&mut self) -> Result<()> {
        for (parts, modified) in std::mem::take(&mut self.times) {
            let path = parts.join(&b'/');
            let found = self.enter(&parts, &path)?;
            let time = spec(modified);
            futimens(&found, &time, &time).map_err(|errno| Error::file(&path, errno))?;
        }
        Ok(())
    }
}

/// The mode a file of ours gets: its owner can read it, and it gives nobody another's rights.
fn own_mode(meta: &Meta) -> u32 {
    meta.mode & 0o777 | 0o600
}

/// A name that stands there already came earlier in the same archive.
fn made(path: &[u8], errno: Errno) -> Error {
    match errno {
        Errno::EEXIST => Error::refused(path, "it is in the archive twice"),
        Errno::ENAMETOOLONG => Error::refused(path, "its name is too long for the file system"),
        other => Error::file(path, other),
    }
}
