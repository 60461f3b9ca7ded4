//! The VMMs that run on files of the pager: who they are, and how they are ended.
//!
//! A VMM is known by the name of its sandbox and by a handle of its process: a signal goes to that
//! process or to nobody. One that had to be killed stays here with the cause until the daemon has
//! asked for it.

use std::collections::HashMap;
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::process::Process;

/// Why a VMM was killed: part of what `inspect` says of its sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// The blob that could not be served.
    pub blob: String,
    /// What was wrong with it.
    pub cause: String,
    /// How long its access waited.
    pub waited_ms: u64,
}

/// What is kept of a VMM.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientText {
    /// Its process, as the pager sees it.
    pub pid: i32,
    /// The files that it runs on.
    pub files: Vec<String>,
    /// Why it was killed.
    pub killed: Option<Cause>,
    /// Whether it hands in its memory, and has no file of ours open.
    #[serde(default)]
    pub handed: bool,
}

/// One VMM.
#[derive(Debug)]
pub struct Client {
    /// Its sandbox.
    pub sandbox: String,
    text: Mutex<ClientText>,
    process: Process,
}

impl Client {
    /// A VMM by the handle of its process.
    pub fn new(sandbox: &str, text: ClientText, process: Process) -> Self {
        Self {
            sandbox: sandbox.to_owned(),
            text: Mutex::new(text),
            process,
        }
    }

    /// What is kept of it.
    pub fn text(&self) -> ClientText {
        self.lock().clone()
    }

    /// The handle of its process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.process.ended(Duration::ZERO)
    }

    /// Says why it is being killed; the first cause stays.
    pub fn note(&self, cause: &Cause) {
        self.lock().killed.get_or_insert_with(|| cause.clone());
    }

    /// Kills it; the first cause stays. Whether it was the first.
    pub fn kill(&self, cause: &Cause) -> bool {
        let first = {
            let mut text = self.lock();
            let first = text.killed.is_none() && !self.has_ended();
            if first {
                text.killed = Some(cause.clone());
            }
            first
        };
        self.process.kill();
        first
    }

    fn lock(&self) -> MutexGuard<'_, ClientText> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Clients(Mutex<HashMap<String, Arc<Client>>>);

impl Clients {
    /// Takes one up, in the place of an earlier one of its sandbox.
    pub fn add(&self, client: Client) -> Arc<Client> {
        let client = Arc::new(client);
        self.lock().insert(client.sandbox.clone(), client.clone());
        client
    }

    /// Lets go of one.
    pub fn remove(&self, sandbox: &str) -> Option<Arc<Client>> {
        self.lock().remove(sandbox)
    }

    /// One of them.
    pub fn get(&self, sandbox: &str) -> Option<Arc<Client>> {
        self.lock().get(sandbox).cloned()
    }

    /// All of them, as they are now.
    pub fn all(&self) -> Vec<Arc<Client>> {
        self.lock().values().cloned().collect()
    }

    /// Whose access it is that thread `pid` waits for on a file: the VMM's that has the thread;
    /// where the kernel could not say which thread it is, that of every VMM which runs on the file.
    ///
    /// Nobody's where the thread is gone, or is another process's, who gets an error and no page. A
    /// VMM that waits for a page which another's read was to bring asks for itself after that.
    pub fn waiting(&self, pid: u32, file: &str) -> Vec<Arc<Client>> {
        let all = self.all();
        if pid == 0 {
            let runs_on = |client: &Arc<Client>| client.text().files.iter().any(|one| one == file);
            return all.into_iter().filter(runs_on).collect();
        }
        let process = process_of(pid);
        let own = |client: &Arc<Client>| Some(client.text().pid) == process;
        all.into_iter().find(own).into_iter().collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Client>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A field of a task's status.
fn status(pid: u32, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim_start_matches(':').trim().to_owned())
}

/// The process that a thread belongs to; none where it is gone.
fn process_of(pid: u32) -> Option<i32> {
    status(pid, "Tgid")?.parse().ok()
}

/// Whether a thread is about to be killed: it only waits for an answer.
pub fn is_dying(pid: u32) -> bool {
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    let pending = |field| {
        let digits = status(pid, field)?;
        u64::from_str_radix(&digits, 16).ok()
    };
    pid != 0
        && match (pending("SigPnd"), pending("ShdPnd")) {
            (Some(own), Some(shared)) => (own | shared) & KILL != 0,
            _ => true, // it is gone
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn sleeper(clients: &Clients, sandbox: &str, file: &str) -> (Child, Arc<Client>) {
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        let text = ClientText {
            pid: child.id() as i32,
            files: vec![file.to_owned()],
            killed: None,
            handed: false,
        };
        let handle = Process::open(text.pid).unwrap();
        (child, clients.add(Client::new(sandbox, text, handle)))
    }

    #[test]
    fn the_one_that_waits_is_found_and_killed_alone() {
        let clients = Clients::default();
        let (mut one, client) = sleeper(&clients, "one", "a");
        let (mut other, _) = sleeper(&clients, "other", "a");
        let found = clients.waiting(one.id(), "a");
        assert_eq!(
            found.iter().map(|c| &c.sandbox).collect::<Vec<_>>(),
            ["one"]
        );
        assert!(clients.waiting(std::process::id(), "a").is_empty());
        assert_eq!(clients.waiting(0, "a").len(), 2);
        assert!(clients.waiting(0, "b").is_empty());
        let cause = Cause {
            blob: "b".into(),
            cause: "c".into(),
            waited_ms: 1,
        };
        assert!(client.kill(&cause) && !client.kill(&cause));
        assert!(!one.wait().unwrap().success());
        assert!(client.has_ended() && is_dying(one.id()));
        assert_eq!(client.text().killed, Some(cause));
        assert!(other.try_wait().unwrap().is_none() && !is_dying(other.id()));
        assert!(clients.waiting(one.id(), "a").is_empty()); // not the other's
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
