//! The pager's side of what is kept: told first, and the keeper started again when it dies.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::kept::{has_ended, kill, next, reap, start_other, Kept, Word, LINK_WAIT};
use crate::packet::{self, borrowed};

/// How often the keeper is looked at, and started again where that failed.
const LOOK: Duration = Duration::from_millis(200);

/// What is kept, and by whom.
pub struct Keep(Mutex<State>);

struct State {
    kept: Kept,
    link: OwnedFd,
    process: OwnedFd,
}

impl Keep {
    /// Begins with what the keeper gave.
    pub fn new(kept: Kept, link: OwnedFd, process: OwnedFd) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State {
            kept,
            link,
            process,
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
        if let Ok(pid) = crate::clients::pid_of(&state.process) {
            return Ok(pid);
        }
        revive(&mut state)?;
        crate::clients::pid_of(&state.process)
    }

    /// Asks the keeper to end, which has nothing to keep any more.
    ///
    /// # Errors
    /// It does not answer.
    pub fn stop(&self) -> io::Result<()> {
        tell(&self.lock(), &Word::Stop, &[])
    }

    /// Starts another keeper whenever one has ended; for a thread of its own.
    pub fn watch(&self) {
        loop {
            std::thread::sleep(LOOK);
            let mut state = self.lock();
            reap();
            if has_ended(state.process.as_fd(), Duration::ZERO) {
                if let Err(error) = revive(&mut state) {
                    eprintln!("no keeper could be started: {error}");
                }
            }
        }
    }

    fn change(&self, word: &Word, fds: Vec<OwnedFd>) -> io::Result<()> {
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
    kill(state.process.as_fd());
    let (link, process) = start_other("keeper", &state.kept)?;
    (state.link, state.process) = (link, process);
    eprintln!("the keeper had ended; it was started again");
    Ok(())
}
