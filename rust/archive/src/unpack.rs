//! Makes the tree that a stream describes; the stream may be anybody's.
//!
//! Every component of a path is opened by itself and never through a link; files are made, never
//! opened; a name that stands already is refused. So nothing that was there before the stream is
//! read or written, whatever the stream says.

use std::collections::VecDeque;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{openat, AtFlags, OFlag};
use nix::sys::stat::{fstatat, mkdirat, Mode, SFlag};
use nix::unistd::{ftruncate, linkat, symlinkat};

use crate::entry::{Entry, Kind};
use crate::error::{Error, Result};
use crate::meta::{Applier, Meta, Trust};
use crate::name::components;
use crate::place::Place;
use crate::read::Reader;
use crate::sparse::Map;
use crate::staging::{open_below, Staging};
use crate::tally::Tally;
use crate::{Progress, Summary};

const TREE: &[u8] = b"tree";

/// Puts what `input` holds at `destination`: under `name` where that is a directory, or as its
/// contents where there is no name.
pub fn unpack(
    input: impl Read,
    destination: &Path,
    name: Option<&[u8]>,
    trust: Trust,
    progress: Progress<'_>,
) -> Result<Summary> {
    let place = Place::find(destination, name)?;
    let mut reader = Reader::new(input);
    let Some(first) = reader.next_entry()? else {
        return Err(Error::refused(b"", "the stream is empty"));
    };
    place.check(first.kind == Kind::Directory)?;
    let staging = Staging::new(place.directory())
        .map_err(|errno| Error::file(destination.as_os_str().as_encoded_bytes(), errno))?;
    let mut unpacker = Unpacker {
        staging: &staging,
        applier: Applier::new(trust),
        open: Vec::new(),
        top: None,
        tally: Tally::new(progress),
    };
    unpacker.take_first(&first, &mut reader)?;
    while let Some(entry) = reader.next_entry()? {
        unpacker.take(&entry, &mut reader)?;
    }
    let meta = unpacker.finish()?;
    let Unpacker { applier, tally, .. } = unpacker;
    place.take(staging.fd(), TREE, meta.as_ref(), &applier)?;
    Ok(tally.summary)
}

/// A directory that is being filled; its times are set when it is left.
struct Level {
    name: Vec<u8>,
    fd: OwnedFd,
    meta: Option<Meta>,
    path: Vec<u8>,
}

struct Unpacker<'a> {
    staging: &'a Staging,
    applier: Applier,
    open: Vec<Level>,
    /// The first component of every path; none where they begin with `./`.
    top: Option<Vec<u8>>,
    tally: Tally<'a>,
}

impl Unpacker<'_> {
    fn take_first(&mut self, entry: &Entry, reader: &mut Reader<impl Read>) -> Result<()> {
        let mut parts = components(&entry.path)?;
        if parts.len() > 1 {
            return Err(Error::refused(
                &entry.path,
                "the first entry is not the top",
            ));
        }
        self.top = parts.pop();
        self.make(entry, &[TREE.to_vec()], reader)
    }

    fn take(&mut self, entry: &Entry, reader: &mut Reader<impl Read>) -> Result<()> {
        let parts = self.parts(&entry.path, &entry.path)?;
        self.make(entry, &parts, reader)
    }

    /// The path of an entry in the staging directory.
    fn parts(&self, path: &[u8], entry: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut parts = components(path)?;
        match (&self.top, parts.first_mut()) {
            (None, _) => parts.insert(0, TREE.to_vec()),
            (Some(top), Some(first)) if first == top => *first = TREE.to_vec(),
            _ => return Err(Error::refused(entry, "it is not below the first entry")),
        }
        Ok(parts)
    }

    fn make(
        &mut self,
        entry: &Entry,
        parts: &[Vec<u8>],
        reader: &mut Reader<impl Read>,
    ) -> Result<()> {
        let Some((name, above)) = parts.split_last() else {
            return Err(Error::refused(&entry.path, "it has no name"));
        };
        self.enter(above, &entry.path)?;
        match &entry.kind {
            Kind::Directory => self.make_directory(entry, name)?,
            Kind::File { size, map } => self.make_file(entry, name, *size, map.as_ref(), reader)?,
            Kind::Symlink(target) => {
                let directory = self.here();
                symlinkat(target.as_slice(), directory, name.as_slice())
                    .and_then(|()| self.applier.apply_to_link(directory, name, &entry.meta))
                    .map_err(|errno| made(&entry.path, errno))?;
            }
            Kind::Hardlink(target) => self.make_hardlink(entry, name, target)?,
            Kind::Special(_) => return Err(Error::refused(&entry.path, "it is no file")),
        }
        self.tally.summary.entries += 1;
        self.tally.tell(reader.total())
    }

    // Directories.

    fn here(&self) -> BorrowedFd<'_> {
        self.open
            .last()
            .map_or(self.staging.fd(), |level| level.fd.as_fd())
    }

    /// Makes `above` the open directories, leaving those that are not in it.
    fn enter(&mut self, above: &[Vec<u8>], entry: &[u8]) -> Result<()> {
        let same = self
            .open
            .iter()
            .zip(above)
            .take_while(|(level, name)| level.name == **name);
        let common = same.count();
        self.leave(common)?;
        for name in &above[common..] {
            let fd = open_below(self.here(), name).map_err(|errno| match errno {
                Errno::ENOENT => Error::refused(entry, "its directory is not in the stream"),
                Errno::ENOTDIR | Errno::ELOOP => {
                    Error::refused(entry, "its path leads through what is no directory")
                }
                other => Error::file(entry, other),
            })?;
            self.push(name.clone(), fd, None, entry);
        }
        Ok(())
    }

    fn leave(&mut self, keep: usize) -> Result<()> {
        while self.open.len() > keep {
            let Some(level) = self.open.pop() else { break };
            if let Some(meta) = &level.meta {
                let applied = self.applier.apply(&level.fd, meta);
                applied.map_err(|errno| Error::file(&level.path, errno))?;
            }
        }
        Ok(())
    }

    fn push(&mut self, name: Vec<u8>, fd: OwnedFd, meta: Option<Meta>, path: &[u8]) {
        let path = path.to_vec();
        self.open.push(Level {
            name,
            fd,
            meta,
            path,
        });
    }

    fn make_directory(&mut self, entry: &Entry, name: &[u8]) -> Result<()> {
        let directory = self.here();
        let opened = mkdirat(directory, name, Mode::S_IRWXU)
            .and_then(|()| open_below(directory, name))
            .map_err(|errno| made(&entry.path, errno))?;
        self.note_mode(entry);
        self.push(name.to_vec(), opened, Some(entry.meta), &entry.path);
        Ok(())
    }

    /// Leaves all directories; what the top is to get, if it is one.
    fn finish(&mut self) -> Result<Option<Meta>> {
        self.leave(1)?;
        Ok(self.open.pop().and_then(|level| level.meta))
    }

    // Files.

    fn make_file(
        &mut self,
        entry: &Entry,
        name: &[u8],
        size: u64,
        map: Option<&Map>,
        reader: &mut Reader<impl Read>,
    ) -> Result<()> {
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let file = openat(self.here(), name, flags, mode).map_err(|e| made(&entry.path, e))?;
        let whole = [(0, size)];
        for (offset, length) in map.map_or(&whole[..], Map::pieces) {
            self.tally
                .fill(&file, &entry.path, *offset, *length, reader)?;
        }
        let fail = |errno| Error::file(&entry.path, errno);
        if map.is_some() {
            ftruncate(&file, size as i64).map_err(fail)?;
        }
        self.note_mode(entry);
        self.applier.apply(&file, &entry.meta).map_err(fail)
    }

    fn make_hardlink(&mut self, entry: &Entry, name: &[u8], target: &[u8]) -> Result<()> {
        let parts = self.parts(target, &entry.path)?;
        let mut walk: VecDeque<Vec<u8>> = parts.into();
        let Some(last) = walk.pop_back() else {
            return Err(Error::refused(&entry.path, "it links to no file"));
        };
        let lost = |_| Error::refused(&entry.path, "it links to no file of the stream");
        let mut directory: Option<OwnedFd> = None;
        for part in walk {
            let from = directory
                .as_ref()
                .map_or(self.staging.fd(), |fd| fd.as_fd());
            directory = Some(open_below(from, &part).map_err(lost)?);
        }
        let from = directory
            .as_ref()
            .map_or(self.staging.fd(), |fd| fd.as_fd());
        let stat = fstatat(from, last.as_slice(), AtFlags::AT_SYMLINK_NOFOLLOW).map_err(lost)?;
        if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
            return Err(Error::refused(&entry.path, "it links to what is no file"));
        }
        linkat(from, last.as_slice(), self.here(), name, AtFlags::empty())
            .map_err(|errno| made(&entry.path, errno))
    }

    fn note_mode(&mut self, entry: &Entry) {
        if self.applier.drops(entry.meta.mode) {
            let what = "its set-user-id and set-group-id bits were dropped";
            self.tally.summary.note(&entry.path, what);
        }
    }
}

/// A name that stands there already came earlier in the same stream.
fn made(path: &[u8], errno: Errno) -> Error {
    match errno {
        Errno::EEXIST => Error::refused(path, "it is in the stream twice"),
        Errno::ENAMETOOLONG => Error::refused(path, "its name is too long for the file system"),
        other => Error::file(path, other),
    }
}
