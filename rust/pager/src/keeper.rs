//! The keeper: holds what is kept and starts the pager again. It touches no file and answers no
//! fault; it has nothing to fail at.
//!
//! The pager dies: it is started again with everything, and guests only waited. Where the kernel
//! can't be asked again for what a dead pager had read (before Linux 6.9), the guests are killed:
//! one of them may wait for a page that nobody knows of. A pager that dies again and again takes
//! its guests along: better an end with a cause than a guest that hangs.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::clients::{Cause, ClientText};
use crate::kept::{has_ended, kill, reap, start_other, Kept, Word, LINK_WAIT};
use crate::packet;

/// Deaths in a row, each soon after its start, that are taken for the last.
const DEATHS_MAX: u32 = 30;
const SOON: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// The pager, as its keeper sees it: the link and a handle of the process.
pub type Other = (OwnedFd, OwnedFd);

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
                kill(process.as_fd());
                if !has_ended(process.as_fd(), LINK_WAIT) {
                    end_guests(&mut kept);
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
        if !can_be_replaced(&kept) || deaths > DEATHS_MAX {
            end_guests(&mut kept);
        }
        if deaths > DEATHS_MAX {
            return Err(io::Error::other("the pager ends again and again"));
        }
        std::thread::sleep((Duration::from_millis(2) * deaths).min(PAUSE_MAX));
    }
}

/// Does what the pager says, until it ends.
fn listen(link: &OwnedFd, process: &OwnedFd, kept: &mut Kept) -> End {
    loop {
        let mut fds = [
            PollFd::new(link.as_fd(), PollFlags::POLLIN),
            PollFd::new(process.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::Error::EINTR) => continue,
            Err(_) => return End::Died,
        }
        let said = fds[0].any().unwrap_or(false);
        if !said {
            return End::Died; // its process, and nothing is left to be read
        }
        let Ok(Some(packet)) = packet::receive(link.as_fd()) else {
            return End::Died;
        };
        let word: Word = match packet.parse() {
            Ok(word) => word,
            Err(error) => {
                eprintln!("the pager says what is no word: {error}");
                return End::Died;
            }
        };
        let asked = matches!(word, Word::Stop);
        let error = if asked {
            None
        } else {
            kept.take(&word, packet.fds).err()
        };
        if packet::send(link.as_fd(), &Word::Done { error }, &[]).is_err() {
            return End::Died;
        }
        if asked {
            return End::Asked;
        }
    }
}

/// Whether the kernel can be asked again for what a dead pager had read.
fn can_be_replaced(kept: &Kept) -> bool {
    let fuse = kept.get("fuse").map(|entry| &entry.value);
    fuse.is_none_or(|value| value["confirmed"] != true || value["resend"] == true)
}

/// Kills every VMM and lets go of the connection.
fn end_guests(kept: &mut Kept) {
    let cause = Cause {
        blob: "the pager".to_owned(),
        cause: "it has ended and can't be replaced".to_owned(),
        waited_ms: 0,
    };
    let mut killed = Vec::new();
    for (sandbox, entry) in kept.of_kind("client") {
        if let Some(process) = entry.fds.first() {
            kill(process.as_fd());
        }
        if let Ok(mut text) = serde_json::from_value::<ClientText>(entry.value.clone()) {
            text.killed.get_or_insert_with(|| cause.clone());
            killed.push((format!("client/{sandbox}"), text));
        }
    }
    for (key, text) in killed {
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
