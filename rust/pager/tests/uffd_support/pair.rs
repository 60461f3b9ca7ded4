//! The real pair of processes, and what a daemon asks of it.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use diapause_pager::kept::Word;
use diapause_pager::packet;
use diapause_pager::process::Process;
use diapause_pager::spec::DeviceSpec;
use nix::libc::SIGKILL;
use nix::sys::signal::{kill, Signal};
use nix::sys::socket::{
    bind, connect, listen, socket, socketpair, AddressFamily, Backlog, SockFlag, SockType, UnixAddr,
};
use nix::unistd::Pid;
use serde_json::{json, Value};
use tempfile::TempDir;

use super::uffd_support::{Client, LONG};

/// Pager and keeper, which are nobody's children; dead at the end of the test.
pub struct Pair {
    pub directory: TempDir,
    name: String,
}

fn seqpacket() -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap()
}

impl Pair {
    pub fn start(silent_ms: u64, stall_ms: u64, log_bytes_max: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let name = format!("pair-of-{}", directory.path().display());
        let pair = Self { directory, name };
        let flags = SockFlag::SOCK_CLOEXEC;
        let kind = SockType::SeqPacket;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        let mut options = OpenOptions::new();
        let log = options.append(true).create(true).open(pair.log()).unwrap();
        let started = Command::new(env!("CARGO_BIN_EXE_diapause-pager"))
            .args(["start", &pair.name])
            .stdin(theirs)
            .stdout(Stdio::null())
            .stderr(log)
            .status();
        assert!(started.unwrap().success());
        let listener = seqpacket();
        let address = UnixAddr::new(&pair.socket()).unwrap();
        bind(listener.as_raw_fd(), &address).unwrap();
        listen(&listener, Backlog::new(64).unwrap()).unwrap();
        let settings = json!({"instance": "test", "stall_ms": stall_ms, "silent_ms": silent_ms,
            "log_bytes_max": log_bytes_max});
        for (key, value, fds) in [
            ("settings", settings, vec![]),
            ("listener", Value::Null, vec![listener.as_fd()]),
        ] {
            let word = Word::Put {
                key: key.to_owned(),
                value,
                same_fds: false,
            };
            packet::send(ours.as_fd(), &word, &fds).unwrap();
        }
        packet::send(ours.as_fd(), &Word::Ready, &[]).unwrap();
        pair.pids();
        pair
    }

    /// Where its files are opened, for ever.
    #[allow(dead_code)]
    pub fn mount(&self) -> PathBuf {
        let connection = seqpacket();
        let address = UnixAddr::new(&self.socket()).unwrap();
        connect(connection.as_raw_fd(), &address).unwrap();
        packet::send(connection.as_fd(), &json!({"hello": {}}), &[]).unwrap();
        let mut answer = packet::receive(connection.as_fd()).unwrap().unwrap();
        let mount = answer.fds.remove(0).into_raw_fd();
        PathBuf::from(format!("/proc/{}/fd/{mount}", std::process::id()))
    }

    pub fn log(&self) -> PathBuf {
        self.directory.path().join("pager.log")
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("pager.sock")
    }

    fn ask_once(&self, what: &Value, fds: &[BorrowedFd<'_>]) -> io::Result<Value> {
        let connection = seqpacket();
        connect(connection.as_raw_fd(), &UnixAddr::new(&self.socket())?)?;
        packet::send(connection.as_fd(), what, fds)?;
        let answer = packet::receive(connection.as_fd())?;
        answer.ok_or(io::ErrorKind::UnexpectedEof)?.parse()
    }

    /// Asks as a client does: again where the pager died in between.
    pub fn ask(&self, what: &Value, fds: &[BorrowedFd<'_>]) -> Result<Value, String> {
        let until = Instant::now() + LONG;
        loop {
            match self.ask_once(what, fds) {
                Ok(answer) if answer.get("ok").is_some() => return Ok(answer["ok"].clone()),
                Ok(answer) => return Err(answer["error"].to_string()),
                Err(error) => assert!(Instant::now() < until, "{error}"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Pager and keeper.
    pub fn pids(&self) -> (i32, i32) {
        let hello = self.ask(&json!({"hello": {}}), &[]).unwrap();
        let pid = |key: &str| hello[key].as_i64().unwrap() as i32;
        (pid("pid"), pid("keeper_pid"))
    }

    pub fn put(&self, name: &str, spec: &DeviceSpec) {
        let put = json!({"put": {"name": name, "spec": spec}});
        self.ask(&put, &[]).unwrap();
    }

    /// A socket that VMMs can connect to, behind which nobody is so far.
    pub fn bind(&self, sandbox: &str) -> (PathBuf, UnixListener) {
        let path = self.directory.path().join(format!("{sandbox}.sock"));
        let listener = UnixListener::bind(&path).unwrap();
        (path, listener)
    }

    pub fn listen(
        &self,
        sandbox: &str,
        file: &str,
        pid: u32,
        listener: &UnixListener,
    ) -> Result<Value, String> {
        let process = Process::open(pid as i32).unwrap();
        let listen = json!({"listen": {"sandbox": sandbox, "file": file}});
        self.ask(&listen, &[process.as_fd(), listener.as_fd()])
    }

    /// A client of this sandbox, which is served.
    pub fn client(&self, sandbox: &str, file: &str, orders: &Value) -> Client {
        let (path, listener) = self.bind(sandbox);
        let client = Client::start(&path, orders);
        self.listen(sandbox, file, client.child.id(), &listener)
            .unwrap();
        assert_eq!(client.line(), "ready");
        self.wait("it has come", || self.seen(sandbox)["uffd"]["came"] == true);
        client
    }

    pub fn seen(&self, sandbox: &str) -> Value {
        let seen = json!({"seen": {"sandbox": sandbox}});
        self.ask(&seen, &[]).unwrap()
    }

    #[allow(dead_code)]
    pub fn detach(&self, sandbox: &str) -> Value {
        let detach = json!({"detach": {"sandbox": sandbox}});
        self.ask(&detach, &[]).unwrap()["killed"].clone()
    }

    pub fn wait(&self, what: &str, is_so: impl Fn() -> bool) {
        let until = Instant::now() + LONG;
        while !is_so() {
            let log = fs::read_to_string(self.log()).unwrap_or_default();
            assert!(Instant::now() < until, "{what}: {log}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The processes of this pair.
    pub fn found(&self) -> Vec<i32> {
        let all = fs::read_dir("/proc").unwrap().flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| is_named(*pid, &self.name)).collect()
    }
}

fn is_named(pid: i32, name: &str) -> bool {
    let line = fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline"));
    let line = line.unwrap_or_default();
    line.split(|byte| *byte == 0).nth(2) == Some(name.as_bytes())
}

/// Ends a process that is known to be there.
pub fn end(pid: i32) {
    let process = Process::open(pid).unwrap();
    kill(Pid::from_raw(pid), Signal::try_from(SIGKILL).unwrap()).unwrap();
    assert!(process.ended(LONG));
}

impl Drop for Pair {
    fn drop(&mut self) {
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            for pid in self.found() {
                let _ = kill(Pid::from_raw(pid), signal);
            }
        }
    }
}
