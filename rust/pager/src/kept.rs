//! What a pager must not lose with its life: entries of a text and descriptors, held twice, by the
//! pager and by the keeper.
//!
//! The side that dies is started again by the other and is given everything, then `Ready`. A pager
//! tells the keeper of a change before it tells anybody else: what was answered is kept.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
use nix::sys::wait::{waitpid, WaitPidFlag};
use serde::{Deserialize, Serialize};

use crate::packet::{self, borrowed, Packet};
use crate::process::Process;

/// Entries that are kept; each is a file, a VMM, or one of a handful.
pub const ENTRIES_MAX: usize = 32 << 10;
/// How long one side waits for the other's word.
pub const LINK_WAIT: Duration = Duration::from_secs(10);

/// What one side says to the other.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Word {
    /// An entry, new or changed; its descriptors come with it.
    Put {
        /// Its name: a kind, and behind a slash which one.
        key: String,
        /// Its text.
        value: serde_json::Value,
        /// Whether it keeps the descriptors that it had; else those that came.
        same_fds: bool,
    },
    /// An entry goes.
    Drop {
        /// Its name.
        key: String,
    },
    /// That was all.
    Ready,
    /// It was done, or why not.
    Done {
        /// What was wrong.
        error: Option<String>,
    },
    /// The pager runs.
    Alive,
    /// The log goes on in the file that comes with this.
    Log,
    /// Both are to end: nobody needs them.
    Stop,
}

/// One entry.
#[derive(Debug)]
pub struct Entry {
    /// Its text.
    pub value: serde_json::Value,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
}

/// The text of an entry.
///
/// # Errors
/// There is none, or it is none of this kind.
pub fn text_of<T: serde::de::DeserializeOwned>(entry: Option<&Entry>) -> io::Result<T> {
    let entry = entry.ok_or(io::ErrorKind::NotFound)?;
    Ok(serde_json::from_value(entry.value.clone())?)
}

/// All entries, by name.
#[derive(Debug, Default)]
pub struct Kept(BTreeMap<String, Entry>);

impl Kept {
    /// Takes up a change.
    ///
    /// # Errors
    /// Too many entries; descriptors of an entry that is not there.
    pub fn take(&mut self, word: &Word, fds: Vec<OwnedFd>) -> Result<(), String> {
        match word {
            Word::Put {
                key,
                value,
                same_fds,
            } => {
                let before = self.0.remove(key);
                if before.is_none() && self.0.len() >= ENTRIES_MAX {
                    return Err(format!("{ENTRIES_MAX} entries are kept already"));
                }
                let fds = match (same_fds, before) {
                    (false, _) => fds,
                    (true, Some(before)) => before.fds,
                    (true, None) => return Err(format!("{key} is not there")),
                };
                let value = value.clone();
                self.0.insert(key.clone(), Entry { value, fds });
            }
            Word::Drop { key } => drop(self.0.remove(key)),
            _ => return Err("this is no change".to_owned()),
        }
        Ok(())
    }

    /// An entry.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.0.get(key)
    }

    /// The entries of a kind: what their names have behind `kind/`, and they.
    pub fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = (&'a str, &'a Entry)> {
        self.0.iter().filter_map(move |(key, entry)| {
            let name = key.strip_prefix(kind)?.strip_prefix('/')?;
            Some((name, entry))
        })
    }

    /// Sends all of it, and that it was all.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn send(&self, to: BorrowedFd<'_>) -> io::Result<()> {
        for (key, entry) in &self.0 {
            let word = Word::Put {
                key: key.clone(),
                value: entry.value.clone(),
                same_fds: false,
            };
            packet::send(to, &word, &borrowed(&entry.fds))?;
        }
        packet::send(to, &Word::Ready, &[])
    }

    /// Receives all of it, up to `Ready`.
    ///
    /// # Errors
    /// What the kernel says; a word that is none; the end before `Ready`.
    pub fn receive(from: BorrowedFd<'_>) -> io::Result<Self> {
        let mut kept = Self::default();
        loop {
            let packet = next(from, LINK_WAIT)?.ok_or(io::ErrorKind::UnexpectedEof)?;
            match packet.parse()? {
                Word::Ready => return Ok(kept),
                word => kept.take(&word, packet.fds).map_err(io::Error::other)?,
            }
        }
    }
}

/// The next packet, within a bound; None at the end.
///
/// # Errors
/// What the kernel says; that nothing came.
pub fn next(from: BorrowedFd<'_>, bound: Duration) -> io::Result<Option<Packet>> {
    let timeout = PollTimeout::try_from(bound).unwrap_or(PollTimeout::MAX);
    loop {
        match poll(&mut [PollFd::new(from, PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return packet::receive(from),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Lets go of children that have ended. Until then their numbers are nobody else's, so that a
/// handle which was opened by number is one of the right process.
pub fn reap() {
    let any = None::<nix::unistd::Pid>;
    while matches!(waitpid(any, Some(WaitPidFlag::WNOHANG)), Ok(status) if status.pid().is_some()) {
    }
}

/// Starts the other of the pair; returns our end of the link and a handle of the process.
///
/// # Errors
/// What the kernel says.
pub fn start_other(role: &str, kept: &Kept) -> io::Result<(OwnedFd, Process)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    // The program that runs, also where its file was replaced meanwhile.
    let program = File::open("/proc/self/exe")?;
    let path = format!("/proc/self/fd/{}", program.as_raw_fd());
    // The child has the link as its standard input: nothing else is inherited.
    let name = std::env::args().nth(2).unwrap_or_default();
    let child = Command::new(path)
        .args([role, &name])
        .stdin(Stdio::from(theirs))
        .spawn()?;
    let process = Process::open(child.id() as i32)?;
    kept.send(ours.as_fd())?;
    Ok((ours, process))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: u32, same_fds: bool) -> Word {
        Word::Put {
            key: key.to_owned(),
            value: value.into(),
            same_fds,
        }
    }

    #[test]
    fn all_of_it_arrives() {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (one, other) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let mut kept = Kept::default();
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        kept.take(&put("node/1", 7, false), vec![file]).unwrap();
        kept.take(&put("node/2", 8, false), vec![]).unwrap();
        kept.take(&put("node/1", 9, true), vec![]).unwrap();
        kept.take(
            &Word::Drop {
                key: "node/2".into(),
            },
            vec![],
        )
        .unwrap();
        kept.send(one.as_fd()).unwrap();
        let got = Kept::receive(other.as_fd()).unwrap();
        let all: Vec<_> = got
            .of_kind("node")
            .map(|(name, e)| (name, &e.value, e.fds.len()))
            .collect();
        assert_eq!(all, [("1", &serde_json::json!(9), 1)]);
        drop(one);
        assert!(Kept::receive(other.as_fd()).is_err());
    }

    #[test]
    fn descriptors_of_nothing_are_refused() {
        assert!(Kept::default()
            .take(&put("node/1", 1, true), vec![])
            .is_err());
        assert!(Kept::default().take(&Word::Ready, vec![]).is_err());
    }
}
