//! The keeper: holds what is kept and starts the pager again. It touches no file and answers no
//! fault; it has nothing to fail at.
//!
//! The pager dies: it is started again with everything, and guests only waited. Where the kernel
//! can't be asked again for what a dead pager had read (before Linux 6.9), the guests are killed:
//! one of them may wait for a page that nobody knows of. A pager that dies again and again takes
//! its guests along: better an end with a cause than a guest that hangs.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::clients::{Cause, ClientText};
use crate::kept::{reap, start_other, Kept, Word, LINK_WAIT};
use crate::log;
use crate::packet::{self, Packet};
use crate::prefetch::STORES;
use crate::process::Process;

/// Deaths in a row, each soon after its start, that are taken for the last.
const DEATHS_MAX: u32 = 30;
const SOON: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// How long a pager may be silent where nobody says otherwise.
const SILENT_MS: u64 = 30_000;
/// How often a pager that says nothing is thought of. One that was killed in a store is seen by
/// that alone, and whoever touches a page waits meanwhile.
const LOOK: Duration = Duration::from_millis(100);
/// The same of one that was killed here.
const LOOK_AT_END: Duration = Duration::from_millis(10);

/// The pager, as its keeper sees it: the link and a handle of the process.
pub type Other = (OwnedFd, Process);

/// How a pager ended.
enum End {
    /// Nobody needs the two any more.
    Asked,
    /// Otherwise.
    Died,
}

/// Keeps, until nobody needs it; `pager` is the one that runs already.
///
/// # Errors
/// What the kernel says, after all guests were killed.
pub fn keep(mut kept: Kept, mut pager: Option<Other>) -> io::Result<()> {
    let mut deaths = 0;
    loop {
        let began = Instant::now();
        let other = match pager.take() {
            Some(other) => Ok(other),
            None => start_other("pager", &kept), // which may be killed while it is told
        };
        match other {
            Err(error) => eprintln!("the pager could not be started: {error}"),
            Ok((link, process)) => {
                if let End::Asked = listen(&link, &process, &mut kept) {
                    return Ok(());
                }
                // A pager that lives on without its keeper could answer beside the next one.
                process.kill();
                if !can_be_followed(&process) {
                    end_guests(&mut kept, Guests::All);
                    return Err(io::Error::other("the pager can't be ended"));
                }
                eprintln!("the pager has ended; it is started again");
            }
        }
        reap();
        deaths = if began.elapsed() < SOON {
            deaths + 1
        } else {
            0
        };
        if deaths <= DEATHS_MAX && !can_be_replaced(&kept) {
            end_guests(&mut kept, Guests::OfFuse);
        }
        if deaths > DEATHS_MAX {
            end_guests(&mut kept, Guests::All);
            return Err(io::Error::other("the pager ends again and again"));
        }
        std::thread::sleep((Duration::from_millis(2) * deaths).min(PAUSE_MAX));
    }
}

/// Whether a pager that was killed has ended, or will once the next one answers: a thread of it
/// that stores waits for a page that is being read, and can't be ended. What it stores is verified,
/// and it writes nothing else; an answer to what the kernel was asked again for it could not give.
fn can_be_followed(process: &Process) -> bool {
    let until = Instant::now() + LINK_WAIT;
    while !process.ended(LOOK_AT_END) && !process.is_left_in(STORES) {
        if Instant::now() >= until {
            return false;
        }
    }
    true
}

/// Does what the pager says, until it ends or is silent for too long.
fn listen(link: &OwnedFd, process: &Process, kept: &mut Kept) -> End {
    let silent_max = Duration::from_millis(silent_ms(kept));
    let mut silent = Duration::ZERO;
    while silent < silent_max {
        let began = Instant::now();
        match wait(link.as_fd(), process) {
            Ok(Some(packet)) => match obey(link, packet, kept) {
                Some(end) => return end,
                None => silent = Duration::ZERO,
            },
            // Neither its handle nor the link says so, which is still open in it.
            Ok(None) if process.is_left_in(STORES) => return End::Died,
            // What this process slept through as well, in a machine that stood still, says
            // nothing of the other.
            Ok(None) => {
                silent += began.elapsed().min(LOOK);
                reap(); // one before it that ended late
            }
            Err(()) => return End::Died,
        }
    }
    eprintln!("the pager is silent for {silent:?}; it is replaced");
    End::Died
}

/// The next packet; None where there is none for a while, an error where there will be none.
fn wait(link: BorrowedFd<'_>, process: &Process) -> Result<Option<Packet>, ()> {
    let mut fds = [
        PollFd::new(link, PollFlags::POLLIN),
        PollFd::new(process.as_fd(), PollFlags::POLLIN),
    ];
    let timeout = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(0) | Err(nix::Error::EINTR) => return Ok(None),
        Ok(_) => {}
        Err(_) => return Err(()),
    }
    let said = fds[0].any().unwrap_or(false);
    if !said {
        return Err(()); // its process, and nothing is left to be read
    }
    packet::receive(link).ok().flatten().map(Some).ok_or(())
}

/// Does what a packet says; how the pager ended, where it did.
fn obey(link: &OwnedFd, packet: Packet, kept: &mut Kept) -> Option<End> {
    let word: Word = match packet.parse() {
        Ok(word) => word,
        Err(error) => {
            eprintln!("the pager says what is no word: {error}");
            return Some(End::Died);
        }
    };
    let asked = matches!(word, Word::Stop);
    let error = match word {
        Word::Stop | Word::Alive => None,
        Word::Log => packet.fds.first().and_then(|file| log::go_on(file).err()),
        word => kept.take(&word, packet.fds).err(),
    };
    let sent = packet::send(link.as_fd(), &Word::Done { error }, &[]);
    match (sent, asked) {
        (Err(_), _) => Some(End::Died),
        (Ok(()), true) => Some(End::Asked),
        (Ok(()), false) => None,
    }
}

/// How long a pager may be silent.
fn silent_ms(kept: &Kept) -> u64 {
    let settings = kept.get("settings");
    let said = settings.and_then(|entry| entry.value["silent_ms"].as_u64());
    said.unwrap_or(SILENT_MS)
}

/// Whether the kernel can be asked again for what a dead pager had read.
fn can_be_replaced(kept: &Kept) -> bool {
    let fuse = kept.get("fuse").map(|entry| &entry.value);
    fuse.is_none_or(|value| value["confirmed"] != true || value["resend"] == true)
}

/// Whose end it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guests {
    /// Those that have files of a connection open which nobody can answer.
    OfFuse,
    /// All.
    All,
}

/// Kills VMMs, waits until they are dead, and lets go of the connection.
fn end_guests(kept: &mut Kept, whose: Guests) {
    let cause = Cause {
        blob: "the pager".to_owned(),
        cause: "it has ended and can't be replaced".to_owned(),
        waited_ms: 0,
    };
    let mut killed = Vec::new();
    for (sandbox, entry) in kept.of_kind("client") {
        let Ok(mut text) = serde_json::from_value::<ClientText>(entry.value.clone()) else {
            continue;
        };
        if text.handed && whose == Guests::OfFuse {
            continue;
        }
        let process = entry.fds.first().and_then(|fd| fd.try_clone().ok());
        let process = process.map(Process::from);
        process.iter().for_each(Process::kill);
        text.killed.get_or_insert_with(|| cause.clone());
        killed.push((format!("client/{sandbox}"), text, process));
    }
    for (key, text, process) in killed {
        // Before the last descriptor of its memory closes.
        let _ = process.is_none_or(|process| process.ended(LINK_WAIT));
        let value = serde_json::to_value(text).unwrap_or_default();
        let same_fds = true;
        let put = Word::Put {
            key,
            value,
            same_fds,
        };
        // It was there a moment ago, so it can be changed.
        let _ = kept.take(&put, Vec::new());
    }
    let key = "fuse".to_owned();
    let _ = kept.take(&Word::Drop { key }, Vec::new());
}
