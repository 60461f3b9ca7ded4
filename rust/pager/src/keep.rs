//! The pager's side of what is kept: told first, and the keeper started again when it dies.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::kept::{next, reap, start_other, Kept, Word, LINK_WAIT};
use crate::log;
use crate::packet::{self, borrowed};
use crate::process::Process;

/// How often the keeper is looked at, and started again where that failed.
const LOOK: Duration = Duration::from_millis(200);
/// Looks between two words to a keeper that has nothing to be told.
const LOOKS: u32 = 10;

/// What is kept, and by whom.
pub struct Keep(Mutex<State>);

struct State {
    kept: Kept,
    link: OwnedFd,
    process: Process,
    /// Both end: nobody is started again.
    stopped: bool,
}

impl Keep {
    /// Begins with what the keeper gave.
    pub fn new(kept: Kept, link: OwnedFd, process: Process) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State {
            kept,
            link,
            process,
            stopped: false,
        })))
    }

    /// Keeps an entry; with None for its descriptors, those that it had. When this returns, it
    /// survives this process.
    ///
    /// # Errors
    /// It is refused; no keeper could be started.
    pub fn put(
        &self,
        key: &str,
        value: &impl Serialize,
        fds: Option<Vec<OwnedFd>>,
    ) -> io::Result<()> {
        let word = Word::Put {
            key: key.to_owned(),
            value: serde_json::to_value(value)?,
            same_fds: fds.is_none(),
        };
        self.change(&word, fds.unwrap_or_default())
    }

    /// Lets go of an entry.
    ///
    /// # Errors
    /// No keeper could be started.
    pub fn remove(&self, key: &str) -> io::Result<()> {
        let key = key.to_owned();
        self.change(&Word::Drop { key }, Vec::new())
    }

    /// Looks at what is kept.
    pub fn with<T>(&self, look: impl FnOnce(&Kept) -> T) -> T {
        look(&self.lock().kept)
    }

    /// The keeper's process; one that has ended is started again before this answers.
    ///
    /// # Errors
    /// No keeper could be started.
    pub fn keeper_pid(&self) -> io::Result<i32> {
        let mut state = self.lock();
        if state.process.ended(Duration::ZERO) {
            revive(&mut state)?;
        }
        state.process.pid()
    }

    /// Asks the keeper to end, which has nothing to keep any more.
    ///
    /// # Errors
    /// It does not answer.
    pub fn stop(&self) -> io::Result<()> {
        let mut state = self.lock();
        tell(&state, &Word::Stop, &[])?;
        state.stopped = true;
        Ok(())
    }

    /// Starts another keeper whenever one has ended or does not answer, and sets a log aside that
    /// has so many bytes; for a thread of its own.
    pub fn watch(&self, log_bytes_max: u64) {
        for look in 1_u32.. {
            std::thread::sleep(LOOK);
            let mut state = self.lock();
            if state.stopped {
                return;
            }
            reap();
            let ended = state.process.ended(Duration::ZERO);
            let mut revived = if ended { revive(&mut state) } else { Ok(()) };
            if look % LOOKS == 0 && revived.is_ok() && !say(&state, log_bytes_max) {
                revived = revive(&mut state);
            }
            if let Err(error) = revived {
                eprintln!("no keeper could be started: {error}");
            }
        }
    }

    fn change(&self, word: &Word, fds: Vec<OwnedFd>) -> io::Result<()> {
        packet::check(word, fds.len())?; // what can't be sent could never be given to a successor
        let mut state = self.lock();
        let sent = fds
            .iter()
            .map(OwnedFd::try_clone)
            .collect::<io::Result<Vec<_>>>()?;
        state.kept.take(word, fds).map_err(io::Error::other)?;
        match tell(&state, word, &sent) {
            Ok(()) => Ok(()),
            Err(error) => {
                eprintln!("the keeper does not answer: {error}");
                revive(&mut state) // which is given everything, this as well
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the keeper that we run, or of a new log; whether it answers.
fn say(state: &State, log_bytes_max: u64) -> bool {
    let said = match log::turn(log_bytes_max) {
        Ok(Some(file)) => tell(state, &Word::Log, &[file]),
        Ok(None) => tell(state, &Word::Alive, &[]),
        Err(error) => {
            eprintln!("the log can't be set aside: {error}");
            tell(state, &Word::Alive, &[])
        }
    };
    if let Err(error) = &said {
        eprintln!("the keeper does not answer: {error}");
    }
    said.is_ok()
}

fn tell(state: &State, word: &Word, fds: &[OwnedFd]) -> io::Result<()> {
    packet::send(state.link.as_fd(), word, &borrowed(fds))?;
    let answer = next(state.link.as_fd(), LINK_WAIT)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    match answer.parse()? {
        Word::Done { error: None } => Ok(()),
        Word::Done { error: Some(error) } => Err(io::Error::other(error)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn revive(state: &mut State) -> io::Result<()> {
    if state.stopped {
        return Err(io::Error::other("the two are about to end"));
    }
    state.process.kill();
    let (link, process) = start_other("keeper", &state.kept)?;
    (state.link, state.process) = (link, process);
    eprintln!("the keeper had ended; it was started again");
    Ok(())
}
