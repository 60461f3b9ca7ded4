//! Files that are passed through: who opens one reads another file, at that file's speed and
//! without a server.
//!
//! Nothing is verified on the way, so whoever asks for it vouches for the file behind: every byte
//! was verified when it was made, and nobody has written it since. What the kernel calls that file
//! belongs to the connection and is kept with it: the next pager passes the same files through, and
//! takes back what nobody knows any more.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::stat::{fstat, FileStat, SFlag};

use crate::fuse::Fuse;
use crate::keep::Keep;
use crate::kept::text_of;
use crate::nodes::{Node, Nodes, Passed};
use crate::server::Server;
use crate::service::Service;

/// The highest number of a file behind that the kernel ever gave on this connection.
const HIGHEST: &str = "backings";
/// How many more it may have given to pagers that died before they could say so.
const UNSAID: i32 = 16;
/// An open that was answered reaches the file behind a moment later: it is not taken back sooner.
const LATER: Duration = Duration::from_secs(10);

/// Passes a file through to another from now on, or, with None, no more. Who has it open goes on
/// with what they have. Whether it is, or why it can't be: that is no error.
///
/// # Errors
/// There is no such file; what is said can't be kept.
pub fn pass(service: &Service, name: &str, to: Option<OwnedFd>) -> Result<Option<String>, String> {
    let _turn = service.turn();
    let server = &service.server;
    let node = server.nodes.find(name);
    let node = node.ok_or_else(|| format!("there is no file {name}"))?;
    let before = node.passed();
    let Some(file) = to else {
        return no_more(service, &node, "nothing was given").map(Some);
    };
    let found = fstat(&file).map_err(|error| error.to_string())?;
    if let Some(cause) = unfit(&found, &node) {
        return no_more(service, &node, cause).map(Some);
    }
    let (place, modified) = identity(&found);
    if before.is_some_and(|now| now.place == place && now.modified == modified) {
        return Ok(None);
    }
    let backing = match server.fuse.show(file.as_fd()) {
        Ok(backing) => backing,
        Err(error) => return no_more(service, &node, &error.to_string()).map(Some),
    };
    let passed = Passed {
        number: server.nodes.last() + 1,
        backing,
        place,
        modified,
    };
    if let Err(error) = keep(&service.keep, name, &passed) {
        take_back(server, backing);
        return Err(error.to_string());
    }
    server.nodes.pass(name, Some(passed));
    if let Some(before) = before {
        take_back(server, before.backing);
    }
    Ok(None)
}

/// A file goes: it is passed through no more.
///
/// # Errors
/// That can't be kept.
pub fn forget(service: &Service, name: &str) -> Result<(), String> {
    match service.server.nodes.find(name) {
        Some(node) => no_more(service, &node, "").map(drop),
        None => Ok(()),
    }
}

fn no_more(service: &Service, node: &Node, cause: &str) -> Result<String, String> {
    if let Some(before) = node.passed() {
        let removed = service.keep.remove(&format!("passed/{}", node.name));
        removed.map_err(|error| error.to_string())?;
        service.server.nodes.pass(&node.name, None);
        take_back(&service.server, before.backing);
    }
    Ok(cause.to_owned())
}

/// Why a file can't stand for another.
fn unfit(found: &FileStat, node: &Node) -> Option<&'static str> {
    if SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Some("it is no file");
    }
    (found.st_size as u64 != node.size_bytes).then_some("it has another size")
}

fn identity(found: &FileStat) -> ((u64, u64), (u64, u32)) {
    let modified = (found.st_mtime as u64, found.st_mtime_nsec as u32);
    ((found.st_dev, found.st_ino), modified)
}

/// The numbers first: none may ever be given again.
fn keep(keep: &Keep, name: &str, passed: &Passed) -> io::Result<()> {
    let highest = keep.with(highest)?.max(passed.backing);
    keep.put("numbers", &passed.number, Some(Vec::new()))?;
    keep.put(HIGHEST, &highest, Some(Vec::new()))?;
    keep.put(&format!("passed/{name}"), passed, Some(Vec::new()))
}

fn highest(kept: &crate::kept::Kept) -> io::Result<i32> {
    let entry = kept.get(HIGHEST);
    entry.map_or(Ok(0), |entry| text_of(Some(entry)))
}

fn take_back(server: &Arc<Server>, backing: i32) {
    let server = server.clone();
    let thread = std::thread::Builder::new().stack_size(64 << 10);
    let started = thread.spawn(move || {
        std::thread::sleep(LATER);
        if let Err(error) = server.fuse.take_back(backing) {
            eprintln!("file {backing} behind others is not taken back: {error}");
        }
    });
    if let Err(error) = started {
        eprintln!("file {backing} behind others stays: {error}"); // as long as this pager
    }
}

/// Goes on with what an earlier pager passed through on this connection.
///
/// # Errors
/// What is kept can't be read.
pub fn take_up(keep: &Keep, fuse: &Fuse, nodes: &Nodes) -> io::Result<()> {
    let (all, highest) = keep.with(|kept| {
        let texts = kept.of_kind("passed");
        let all = texts.map(|(name, entry)| Ok((name.to_owned(), text_of(Some(entry))?)));
        Ok::<_, io::Error>((
            all.collect::<io::Result<Vec<(_, Passed)>>>()?,
            highest(kept)?,
        ))
    })?;
    for (name, passed) in &all {
        nodes.pass(name, Some(*passed));
    }
    if highest > 0 {
        for number in 1..=highest.saturating_add(UNSAID) {
            if all.iter().all(|(_, passed)| passed.backing != number) {
                let _ = fuse.take_back(number); // most are none
            }
        }
    }
    Ok(())
}

/// A new connection knows none of the files behind.
///
/// # Errors
/// That can't be kept.
pub fn begin(keep: &Keep) -> io::Result<()> {
    let names: Vec<_> = keep.with(|kept| {
        let all = kept.of_kind("passed");
        all.map(|(name, _)| format!("passed/{name}")).collect()
    });
    for name in &names {
        keep.remove(name)?;
    }
    keep.remove(HIGHEST)
}
