//! Clients as processes of their own, a device with a mind of its own, and who counts.
#![allow(dead_code)] // Each test uses a part of it.

pub mod pattern;
pub mod source;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{env, io, thread};

use diapause_pager::build::Unreadable;
use diapause_pager::device::{Origin, Part};
use diapause_pager::uffd::host::Keep;
use diapause_pager::uffd::{Ending, Guest, Host, Options, Pages, Refusal, Served, Server, Witness};
use tempfile::TempDir;

pub use source::Pattern;

/// How long anything may take on a slow machine.
pub const LONG: Duration = Duration::from_secs(120);

/// What the client program is called.
pub fn peer_program() -> PathBuf {
    let mut path = env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.join("examples/uffd_peer")
}

/// A client process; dead at the end of the test.
#[derive(Debug)]
pub struct Client {
    pub child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Client {
    pub fn start(socket: &Path, orders: &serde_json::Value) -> Self {
        let mut orders = orders.clone();
        orders["socket"] = socket.to_str().unwrap().into();
        let mut child = Command::new(peer_program())
            .args(["client", &orders.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the example uffd_peer; before a single test, `cargo build --examples`");
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let input = child.stdin.take();
        Self {
            child,
            input,
            lines,
        }
    }

    pub fn say(&mut self, line: &str) {
        let input = self.input.as_mut().unwrap();
        writeln!(input, "{line}").unwrap();
    }

    /// The same to one that may be dead.
    pub fn try_say(&mut self, line: &str) {
        let input = self.input.as_mut().unwrap();
        let _ = writeln!(input, "{line}");
    }

    /// The next line it says.
    pub fn line(&self) -> String {
        self.lines.recv_timeout(LONG).expect("a line of the client")
    }

    /// What it said in this time.
    pub fn line_within(&self, wait: Duration) -> Option<String> {
        self.lines.recv_timeout(wait).ok()
    }

    pub fn end(&mut self) -> ExitStatus {
        let until = Instant::now() + LONG;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "the client does not end");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// It was ended by this signal.
    pub fn dies_of(&mut self, signal: i32) {
        let status = self.end();
        assert_eq!(status.signal(), Some(signal), "{status}");
    }

    /// It found nothing wrong.
    pub fn is_right(&mut self) {
        let mut last = String::new();
        while let Ok(line) = self.lines.recv_timeout(LONG) {
            last = line;
        }
        let status = self.end();
        assert!(
            status.success() && last.starts_with("right"),
            "{status}: {last}"
        );
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

type Rule = Box<dyn Fn(u64, usize) -> Result<(), Unreadable> + Send + Sync>;

/// The pattern, with a rule that is asked before each read.
pub struct Ruled {
    pattern: Pattern,
    pub rule: Mutex<Arc<Rule>>,
    pub reads: AtomicU64,
}

impl std::fmt::Debug for Ruled {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(to, "{:?}", self.pattern)
    }
}

impl Ruled {
    pub fn new(seed: u64, size_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            pattern: Pattern { seed, size_bytes },
            rule: Mutex::new(Arc::new(Box::new(|_, _| Ok(())))),
            reads: AtomicU64::new(0),
        })
    }

    pub fn set(&self, rule: impl Fn(u64, usize) -> Result<(), Unreadable> + Send + Sync + 'static) {
        *self.rule.lock().unwrap() = Arc::new(Box::new(rule));
    }
}

impl Pages for Ruled {
    fn size_bytes(&self) -> u64 {
        self.pattern.size_bytes
    }

    fn read(&self, offset: u64, size: usize, parts: &mut Vec<Part>) -> Result<Origin, Unreadable> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let rule = self.rule.lock().unwrap().clone();
        rule(offset, size)?;
        self.pattern.read(offset, size, parts)
    }
}

/// What happened, for tests to wait for.
#[derive(Debug, Default)]
pub struct Notes {
    notes: Mutex<HashMap<String, u64>>,
    changed: Condvar,
    pub bytes: AtomicU64,
    /// Who holds it delays whoever tells what was read.
    pub gate: Mutex<()>,
}

impl Notes {
    pub fn note(&self, what: String) {
        // Also while a test that failed is ended.
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        *notes.entry(what).or_default() += 1;
        self.changed.notify_all();
    }

    pub fn count(&self, what: &str) -> u64 {
        self.notes.lock().unwrap().get(what).copied().unwrap_or(0)
    }

    /// Waits until it happened so often.
    pub fn wait(&self, what: &str, count: u64) {
        let until = Instant::now() + LONG;
        let mut notes = self.notes.lock().unwrap();
        while notes.get(what).copied().unwrap_or(0) < count {
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} {count} times; there is {notes:?}");
            notes = self.changed.wait_timeout(notes, left).unwrap().0;
        }
    }
}

impl Witness for Notes {
    fn read(&self, offset: u64, _bytes: u64) {
        drop(self.gate.lock().unwrap_or_else(PoisonError::into_inner));
        self.note(format!("read {offset}"));
    }
    fn served(&self, served: &Served) {
        self.bytes.fetch_add(served.bytes, Ordering::Relaxed);
        self.note(
            if served.stalled {
                "served late"
            } else {
                "served"
            }
            .into(),
        );
    }
    fn stalled(&self, why: &Unreadable) {
        self.note(format!("stalled {}", why.blob));
    }
    fn poisoned(&self, why: &Unreadable) {
        self.note(format!("poisoned {}", why.blob));
    }
    fn removed(&self, pages: u64) {
        self.note(format!("removed {pages}"));
    }
    fn ended(&self, ending: &Ending) {
        // Seen where the test fails.
        println!("{ending:?}");
        self.note(match ending {
            Ending::Exited => "exited".into(),
            Ending::Killed(why) => format!("killed {why}"),
        });
    }
}

/// A device behind a socket.
pub struct House {
    pub pages: Arc<Ruled>,
    pub notes: Arc<Notes>,
    pub options: Options,
    /// What a keeper would hold.
    pub kept: Option<Sender<diapause_pager::uffd::Kept>>,
}

impl std::fmt::Debug for House {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(to, "{:?}", self.pages)
    }
}

impl Host for House {
    fn size_bytes(&self) -> u64 {
        self.pages.size_bytes()
    }

    fn admitted(&self, id: u64, keep: &Keep<'_>) -> io::Result<Guest> {
        if let Some(kept) = &self.kept {
            kept.send(keep.duplicate()?).unwrap();
        }
        self.notes.note(format!("admitted {id}"));
        self.notes.note("admitted".into());
        Ok(Guest {
            pages: self.pages.clone(),
            witness: self.notes.clone(),
            options: self.options,
        })
    }

    fn refused(&self, _pid: i32, why: &Refusal) {
        // Seen where the test fails.
        println!("refused: {why}");
        self.notes.note(format!("refused {}", why.code()));
    }
}

/// A socket in a directory of its own, with a house behind it.
pub struct Street {
    pub house: Arc<House>,
    pub socket: PathBuf,
    _directory: TempDir,
}

impl Street {
    pub fn new(server: &Server, seed: u64, size_bytes: u64, options: Options) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("uffd.sock");
        let house = Arc::new(House {
            pages: Ruled::new(seed, size_bytes),
            notes: Arc::default(),
            options,
            kept: None,
        });
        let listener = UnixListener::bind(&socket).unwrap();
        server.listen(listener, house.clone()).unwrap();
        Self {
            house,
            socket,
            _directory: directory,
        }
    }
}
