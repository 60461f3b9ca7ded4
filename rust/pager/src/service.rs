//! The pager as a process: takes up what is kept, serves the kernel and its clients.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clients::{Cause, Client, ClientText, Clients};
use crate::fuse::Fuse;
use crate::handed::Handed;
use crate::keep::Keep;
use crate::kept::{text_of, Entry, Kept};
use crate::nodes::{NodeText, Nodes};
use crate::passed;
use crate::process::Process;
use crate::server::{Keeps, Server};
use crate::wire::{granted, Init, HAS_RESEND};

/// How far the kernel reads ahead of a fault: what a random fault then brings costs little more
/// than a page, and a sequential reader is not held back much.
const READAHEAD_KIB: u32 = 128;

/// What a pair is started with.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Names this pair, as long as one of the two lives.
    pub instance: String,
    /// How long an access may wait for a blob before its VMM is killed.
    pub stall_ms: u64,
    /// How long the pager may say nothing before the keeper replaces it.
    pub silent_ms: u64,
    /// How large the log may grow before it is set aside.
    pub log_bytes_max: u64,
}

/// What is kept of the connection.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FuseText {
    /// Whether the kernel was greeted: before that nothing was ever opened.
    confirmed: bool,
    minor: u32,
    resend: bool,
}

/// A pager that runs.
pub struct Service {
    /// What answers the kernel.
    pub server: Arc<Server>,
    /// VMMs that hand in their memory.
    pub handed: Arc<Handed>,
    /// What is kept beyond this process.
    pub keep: Arc<Keep>,
    /// What it was started with.
    pub settings: Settings,
    kernel: Arc<Kernel>,
    turn: Mutex<()>,
}

/// What is known of the kernel, and who has to be told of what.
struct Kernel {
    keep: Arc<Keep>,
    greeted: Mutex<FuseText>,
    changed: Condvar,
    server: OnceLock<Arc<Server>>,
}

impl Service {
    /// Takes up what is kept and begins to answer; returns with the socket for clients.
    ///
    /// # Errors
    /// FUSE is missing or forbidden; something that has to be kept is not there.
    pub fn start(kept: Kept, link: OwnedFd, keeper: Process) -> io::Result<(Arc<Self>, OwnedFd)> {
        let settings: Settings = text_of(kept.get("settings"))?;
        let listener = fd_of(kept.get("listener"))?;
        let keep = Keep::new(kept, link, keeper);
        let (fuse, text) = connection(&keep)?;
        let taken_up = text.confirmed;
        let kernel = Arc::new(Kernel {
            keep: keep.clone(),
            greeted: Mutex::new(text),
            changed: Condvar::new(),
            server: OnceLock::new(),
        });
        let (nodes, clients) =
            keep.with(|kept| Ok::<_, io::Error>((nodes(kept)?, clients(kept)?)))?;
        match taken_up {
            true => passed::take_up(&keep, &fuse, &nodes)?,
            false => passed::begin(&keep)?,
        }
        let bound = Duration::from_millis(settings.stall_ms);
        let server = Arc::new(Server::new(fuse, nodes, clients, bound, kernel.clone()));
        // Before the first thread runs that may need it.
        let _ = kernel.server.set(server.clone());
        server.start()?;
        if taken_up {
            server.fuse.ask_again()?;
        }
        let handed = Handed::new(server.clone(), keep.clone())?;
        handed.take_up();
        let (watching, log_bytes_max) = (keep.clone(), settings.log_bytes_max);
        std::thread::Builder::new()
            .name("keeper".to_owned())
            .stack_size(256 << 10)
            .spawn(move || watching.watch(log_bytes_max))?;
        let turn = Mutex::new(());
        let service = Self {
            server,
            handed,
            keep,
            settings,
            kernel,
            turn,
        };
        Ok((Arc::new(service), listener))
    }

    /// One change at a time: what is kept and what is served stay the same.
    pub fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel's protocol version, and whether a dead pager can be replaced under it; waits for
    /// its greeting at most so long.
    pub fn wait_for_kernel(&self, bound: Duration) -> Option<(u32, bool)> {
        let greeted = self
            .kernel
            .greeted
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .kernel
            .changed
            .wait_timeout_while(greeted, bound, |now| !now.confirmed);
        let (greeted, _) = waited.unwrap_or_else(PoisonError::into_inner);
        greeted.confirmed.then_some((greeted.minor, greeted.resend))
    }

    /// Closes the device of a file that nobody runs on any more: its tables take memory.
    pub fn close_unused(&self, file: &str) {
        let all = self.server.clients.all();
        if !all
            .iter()
            .any(|client| client.text().files.iter().any(|one| one == file))
        {
            if let Some(node) = self.server.nodes.find(file) {
                node.close();
            }
        }
    }

    /// Ends this process once its answer is out.
    pub fn end_soon(&self) {
        std::thread::spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            std::process::exit(0);
        });
    }
}

impl Keeps for Kernel {
    fn greeted(&self, init: &Init) {
        let text = FuseText {
            confirmed: true,
            minor: init.minor,
            resend: granted(init.features) & HAS_RESEND != 0,
        };
        if let Err(error) = self.keep.put("fuse", &text, None) {
            eprintln!("the connection is not kept: {error}");
            return;
        }
        if let Some(server) = self.server.get() {
            if let Err(error) = server.fuse.set_readahead(READAHEAD_KIB) {
                eprintln!("the kernel reads ahead as it likes: {error}");
            }
        }
        *self.greeted.lock().unwrap_or_else(PoisonError::into_inner) = text;
        self.changed.notify_all();
    }

    fn killed(&self, sandbox: &str) {
        let Some(client) = self
            .server
            .get()
            .and_then(|server| server.clients.get(sandbox))
        else {
            return;
        };
        let key = format!("client/{sandbox}");
        if let Err(error) = self.keep.put(&key, &client.text(), None) {
            eprintln!("{sandbox}: why it was killed is not kept: {error}");
        }
    }

    fn ended(&self) {
        eprintln!("the connection to the kernel was taken away");
        let cause = Cause {
            blob: "the pager's files".to_owned(),
            cause: "the connection to the kernel was taken away".to_owned(),
            waited_ms: 0,
        };
        for client in self
            .server
            .get()
            .map(|s| s.clients.all())
            .unwrap_or_default()
        {
            if client.text().handed {
                continue; // it has no file open
            }
            if client.kill(&cause) {
                self.killed(&client.sandbox);
            }
        }
        if let Err(error) = self.keep.remove("fuse") {
            eprintln!("{error}");
        }
        std::process::exit(3); // the keeper starts another, with a new connection
    }
}

/// The connection that is kept, if the kernel was greeted over it; else a new one.
fn connection(keep: &Keep) -> io::Result<(Fuse, FuseText)> {
    let found = keep.with(|kept| {
        let entry = kept.get("fuse")?;
        Some((text_of::<FuseText>(Some(entry)), copies(&entry.fds)))
    });
    if let Some((text, fds)) = found {
        let text = text?;
        if text.confirmed {
            let fuse = Fuse::from_descriptors(fds?);
            return fuse
                .map(|fuse| (fuse, text))
                .ok_or(io::ErrorKind::InvalidData.into());
        }
    }
    let fuse = Fuse::mount()?;
    let fds = fuse
        .descriptors()
        .map(OwnedFd::try_clone)
        .collect::<io::Result<Vec<_>>>()?;
    keep.put("fuse", &FuseText::default(), Some(fds))?;
    Ok((fuse, FuseText::default()))
}

fn nodes(kept: &Kept) -> io::Result<Nodes> {
    let last = match kept.get("numbers") {
        Some(entry) => text_of(Some(entry))?,
        None => 0,
    };
    let texts = kept
        .of_kind("node")
        .map(|(name, entry)| Ok((name.to_owned(), text_of::<NodeText>(Some(entry))?)))
        .collect::<io::Result<Vec<_>>>()?;
    Ok(Nodes::take_up(texts.into_iter(), last))
}

fn clients(kept: &Kept) -> io::Result<Clients> {
    let clients = Clients::default();
    for (sandbox, entry) in kept.of_kind("client") {
        let text: ClientText = text_of(Some(entry))?;
        let process = Process::from(fd_of(Some(entry))?);
        clients.add(Client::new(sandbox, text, process));
    }
    Ok(clients)
}

fn fd_of(entry: Option<&Entry>) -> io::Result<OwnedFd> {
    let first = entry.and_then(|entry| entry.fds.first());
    first
        .ok_or(io::ErrorKind::NotFound)?
        .as_fd()
        .try_clone_to_owned()
}

fn copies(fds: &[OwnedFd]) -> io::Result<Vec<OwnedFd>> {
    fds.iter().map(OwnedFd::try_clone).collect()
}
