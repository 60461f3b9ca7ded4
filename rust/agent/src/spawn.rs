//! Starts a command: its environment, its terminal or pipes, its own session and process group.
//!
//! Invariants: a command inherits three descriptors and nothing else, default signal handling, an
//! empty signal mask and the limits that the agent was started with; our ends of its pipes do not
//! block.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::fcntl::{fcntl, FcntlArg, FdFlag, OFlag};
use nix::pty::{openpty, Winsize};
use nix::sys::resource::{getrlimit, setrlimit, Resource};

use crate::message::{Exec, ExecFailed};
use crate::system::open_pidfd;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const OWN_NAME: &str = "diapause-agent";
const OPEN_FILES: u64 = 8192;
const SIGNALS: std::ops::Range<i32> = 1..65;

mod requests {
    //! The request that tells a terminal its size.
    nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, nix::pty::Winsize);
}

/// A command that runs.
pub struct Child {
    /// Its process and process group.
    pub pid: i32,
    /// Readable once it has ended.
    pub pidfd: OwnedFd,
    /// Where its input goes.
    pub input: Option<OwnedFd>,
    /// Where its output and its errors come from.
    pub outputs: [Option<OwnedFd>; 2],
    /// Its terminal, if it has one.
    pub terminal: Option<OwnedFd>,
}

/// The limit of open files that commands get back, after the agent has raised its own.
#[derive(Clone, Copy)]
pub struct FileLimit {
    soft: u64,
    hard: u64,
}

impl FileLimit {
    /// Lets the agent open enough files for all its sessions.
    pub fn raise() -> Self {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 4096));
        let more = hard.max(OPEN_FILES);
        if setrlimit(Resource::RLIMIT_NOFILE, more, more).is_err() {
            // Without the privilege to raise the hard limit, that limit is what there is.
            let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        }
        Self { soft, hard }
    }
}

/// Starts what `exec` asks for.
pub fn spawn(exec: &Exec, limit: FileLimit) -> Result<Child, ExecFailed> {
    let Some((program, arguments)) = exec.argv.split_first() else {
        return Err(failed(
            "request",
            &io::Error::from_raw_os_error(libc::EINVAL),
        ));
    };
    let directory = exec.cwd.as_deref().unwrap_or("/");
    check_directory(directory).map_err(|error| failed("directory", &error))?;
    let mut command = Command::new(found(program));
    command
        .arg0(program)
        .args(arguments)
        .current_dir(directory)
        .env_clear()
        .envs(environment(exec));
    let (mut child, terminal) = if exec.tty {
        let pair = open_terminal(exec).map_err(|error| failed("system", &error))?;
        attach_terminal(&mut command, &pair.1).map_err(|error| failed("system", &error))?;
        prepare(&mut command, true, limit);
        let child = command.spawn().map_err(|error| failed("command", &error))?;
        (child, Some(pair.0))
    } else {
        let input = if exec.stdin {
            Stdio::piped()
        } else {
            Stdio::null()
        };
        command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        prepare(&mut command, false, limit);
        (
            command.spawn().map_err(|error| failed("command", &error))?,
            None,
        )
    };
    // `command` holds the terminal's other end: our master would never come to its end.
    drop(command);
    adopt(&mut child, terminal).map_err(|error| {
        let _ = child.kill();
        let _ = child.wait();
        failed("system", &error)
    })
}

/// The agent's own name is this very program, wherever an image keeps it: what the host asks of
/// it is then of this protocol's version.
fn found(program: &str) -> &str {
    if program == OWN_NAME {
        return "/proc/self/exe";
    }
    program
}

fn failed(what: &'static str, error: &io::Error) -> ExecFailed {
    let errno = error.raw_os_error().unwrap_or(libc::EINVAL); // a NUL byte in an argument has none
    ExecFailed {
        what,
        errno,
        message: error.to_string(),
    }
}

fn check_directory(path: &str) -> io::Result<()> {
    if fs::metadata(path)?.is_dir() {
        return Ok(());
    }
    Err(io::Error::from_raw_os_error(libc::ENOTDIR))
}

fn environment(exec: &Exec) -> BTreeMap<String, String> {
    let mut environment = BTreeMap::from([
        ("PATH".to_owned(), PATH.to_owned()),
        ("HOME".to_owned(), "/root".to_owned()),
    ]);
    if exec.tty {
        environment.insert("TERM".to_owned(), "xterm".to_owned());
    }
    // A name that is empty or holds '=' or NUL can't be set, and would make the spawn panic.
    let sound = |name: &str, value: &str| {
        !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
    };
    let wanted = exec.env.iter().filter(|(name, value)| sound(name, value));
    environment.extend(wanted.map(|(name, value)| (name.clone(), value.clone())));
    environment
}

fn open_terminal(exec: &Exec) -> io::Result<(OwnedFd, OwnedFd)> {
    let size = Winsize {
        ws_row: exec.rows,
        ws_col: exec.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pair = openpty(Some(&size), None)?;
    fcntl(&pair.master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    fcntl(&pair.slave, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok((pair.master, pair.slave))
}

fn attach_terminal(command: &mut Command, slave: &OwnedFd) -> io::Result<()> {
    command
        .stdin(slave.try_clone()?)
        .stdout(slave.try_clone()?)
        .stderr(slave.try_clone()?);
    Ok(())
}

fn prepare(command: &mut Command, tty: bool, limit: FileLimit) {
    let begin = move || {
        nix::unistd::setsid()?;
        if tty {
            // SAFETY: descriptor 0 is the terminal, and the request takes an integer.
            if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for number in SIGNALS {
            // SAFETY: it restores a default; for the numbers that can't be changed it fails and
            // changes nothing.
            unsafe { libc::signal(number, libc::SIG_DFL) };
        }
        let _ = setrlimit(Resource::RLIMIT_NOFILE, limit.soft, limit.hard);
        Ok(())
    };
    // SAFETY: the agent has one thread, and `begin` makes system calls only; it does not allocate.
    unsafe { command.pre_exec(begin) };
}

fn adopt(child: &mut std::process::Child, terminal: Option<OwnedFd>) -> io::Result<Child> {
    let pid = child.id() as i32;
    let pidfd = open_pidfd(pid)?;
    let (input, outputs) = match &terminal {
        Some(master) => (Some(master.try_clone()?), [Some(master.try_clone()?), None]),
        None => (
            child.stdin.take().map(OwnedFd::from),
            [
                child.stdout.take().map(OwnedFd::from),
                child.stderr.take().map(OwnedFd::from),
            ],
        ),
    };
    for fd in input.iter().chain(outputs.iter().flatten()) {
        set_nonblocking(fd)?;
    }
    Ok(Child {
        pid,
        pidfd,
        input,
        outputs,
        terminal,
    })
}

/// Makes reads and writes return instead of waiting.
pub fn set_nonblocking(fd: &impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Tells a terminal its new size.
pub fn resize(terminal: &OwnedFd, rows: u16, cols: u16) -> io::Result<()> {
    let size = Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the descriptor is an open terminal and the kernel only reads `size`.
    unsafe { requests::set_window_size(terminal.as_raw_fd(), &size) }?;
    Ok(())
}
