//! Commands that run for the host, and what they leave behind.
//!
//! Invariants: EXIT comes after all that the command's own pipes held when it ended; a process that
//! still holds such a pipe is never hung up on or blocked, since what it writes is read and
//! discarded; a session without a listener goes on the same way. At most [`ATTACHED_MAX`] sessions
//! have a listener, at most [`TOTAL_MAX`] sessions and leftover streams exist.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::unistd::read;

use crate::frame::{kind, HEADER_LEN};
use crate::message::{encode_credit, to_json, Exec, ExecFailed, Exit, Started};
use crate::outbox::Outbox;
use crate::spawn::{resize, spawn, Child, FileLimit};
use crate::streams::{Input, Output, Read};

/// How many sessions may have a listener.
pub const ATTACHED_MAX: usize = 256;
/// How many sessions and leftover streams may exist.
pub const TOTAL_MAX: usize = 1024;
/// How long a command's streams may stay open after its end before they count as somebody else's.
pub const GRACE: Duration = Duration::from_millis(100);

const SIGNAL_MAX: i32 = 64;
const READS_AT_ONCE: usize = 4;
const OUTPUT_KINDS: [u8; 2] = [kind::STDOUT, kind::STDERR];

struct End {
    exit: Exit,
    deadline: Instant,
    // The deadline has passed: what is missing waits for the host's credit, not for time.
    over: bool,
}

/// One command.
pub struct Session {
    /// Its id on the link; none once nobody listens.
    pub id: Option<u32>,
    pid: i32,
    pidfd: OwnedFd,
    /// Its standard input.
    pub input: Input,
    /// Its standard output and error.
    pub outputs: [Output; 2],
    terminal: Option<OwnedFd>,
    end: Option<End>,
    input_reported: bool,
}

impl Session {
    fn new(id: u32, child: Child) -> Self {
        let Child {
            pid,
            pidfd,
            input,
            outputs: [output, error],
            terminal,
        } = child;
        let input_reported = input.is_none(); // there is nothing to close
        Self {
            id: Some(id),
            pid,
            pidfd,
            input: Input::new(input, terminal.is_some()),
            outputs: [Output::new(output), Output::new(error)],
            terminal,
            end: None,
            input_reported,
        }
    }

    /// The descriptor that tells its end, until then.
    pub fn pidfd(&self) -> Option<&OwnedFd> {
        self.end.is_none().then_some(&self.pidfd)
    }

    /// Whether an output should be waited on now.
    pub fn wants_output(&self, index: usize, room: bool) -> bool {
        self.id.is_none() || (room && self.outputs[index].credit() > 0)
    }

    /// When its streams count as somebody else's.
    pub fn deadline(&self) -> Option<Instant> {
        self.end
            .as_ref()
            .filter(|end| !end.over)
            .map(|end| end.deadline)
    }

    /// Sends its process group a signal, unless it is over.
    pub fn signal(&self, number: i32) {
        if self.end.is_none() && (1..=SIGNAL_MAX).contains(&number) {
            // SAFETY: the call takes two integers, and our unreaped child keeps its group's number
            // ours.
            unsafe { libc::killpg(self.pid, number) };
        }
    }

    /// Gives its terminal a new size.
    pub fn resize(&self, rows: u16, cols: u16) {
        if let Some(terminal) = &self.terminal {
            let _ = resize(terminal, rows, cols);
        }
    }

    /// Nobody listens any more: input ends, output is discarded, the process goes on.
    pub fn detach(&mut self) {
        self.id = None;
        self.input.orphan();
    }

    /// Moves what an output has into the outbox, or discards it.
    pub fn read_output(&mut self, index: usize, outbox: &mut Outbox) {
        for _ in 0..READS_AT_ONCE {
            if !self.wants_output(index, outbox.has_room()) {
                return;
            }
            let mut buffer = outbox.buffer();
            let output = &mut self.outputs[index];
            let outcome = match self.id {
                Some(_) => output.read(&mut buffer[HEADER_LEN..]),
                None => output.discard(&mut buffer[HEADER_LEN..]),
            };
            match (outcome, self.id) {
                (Read::Bytes(count), Some(id)) => {
                    outbox.push_buffer(OUTPUT_KINDS[index], id, buffer, count)
                }
                _ => outbox.give_back(buffer),
            }
            if !matches!(outcome, Read::Bytes(_)) {
                return;
            }
        }
    }

    /// Tells the host what it may send, and that the command stopped reading.
    pub fn report_input(&mut self, outbox: &mut Outbox) {
        let Some(id) = self.id else { return };
        let grant = self.input.take_grant();
        if grant > 0 {
            outbox.push(kind::CREDIT, id, &encode_credit(0, grant));
        }
        if !self.input_reported && !self.input.is_open() {
            self.input_reported = true;
            outbox.push(kind::STDIN_CLOSED, id, &[]);
        }
    }

    /// Collects the command's exit status.
    pub fn reap(&mut self, now: Instant) {
        let mut status = 0;
        // SAFETY: the kernel writes one int. (Real-time signals are no `Signal`, so not by `nix`.)
        let exit = match unsafe { libc::waitpid(self.pid, &mut status, libc::WNOHANG) } {
            0 => return,
            pid if pid == self.pid => decode_status(status),
            _ => Exit {
                code: 255,
                signal: None,
            }, // nobody else waits for it: it can't happen
        };
        self.end = Some(End {
            exit,
            deadline: now + GRACE,
            over: false,
        });
        for output in &mut self.outputs {
            output.command_ended();
        }
    }

    /// The exit status, once everything that belongs before it has been read.
    fn finished(&mut self, now: Instant) -> Option<Exit> {
        let end = self.end.as_mut()?;
        end.over |= now >= end.deadline;
        let closed = self.outputs.iter().all(|output| output.fd().is_none());
        let settled = self.outputs.iter().all(Output::is_settled) && end.over;
        (closed || settled || self.id.is_none()).then_some(end.exit)
    }
}

fn decode_status(status: i32) -> Exit {
    if libc::WIFSIGNALED(status) {
        let number = libc::WTERMSIG(status) as u8;
        return Exit {
            code: 128 + number,
            signal: Some(number),
        };
    }
    Exit {
        code: libc::WEXITSTATUS(status) as u8,
        signal: None,
    }
}

/// All commands, and the streams that ended ones left open.
pub struct Sessions {
    /// The commands.
    pub list: Vec<Session>,
    /// Streams that are read and discarded until their end.
    pub drains: Vec<OwnedFd>,
    limit: FileLimit,
}

impl Sessions {
    /// No sessions yet; commands get `limit` back.
    pub fn new(limit: FileLimit) -> Self {
        Self {
            list: Vec::new(),
            drains: Vec::new(),
            limit,
        }
    }

    /// The session that the host calls `id`.
    pub fn find(&mut self, id: u32) -> Option<&mut Session> {
        self.list.iter_mut().find(|session| session.id == Some(id))
    }

    /// Starts a command and tells the host how that went.
    pub fn start(&mut self, id: u32, exec: &Exec, outbox: &mut Outbox) {
        let attached = self
            .list
            .iter()
            .filter(|session| session.id.is_some())
            .count();
        let outcome =
            if attached >= ATTACHED_MAX || self.list.len() + self.drains.len() >= TOTAL_MAX {
                let error = io::Error::from_raw_os_error(libc::EAGAIN);
                Err(ExecFailed {
                    what: "limit",
                    errno: libc::EAGAIN,
                    message: error.to_string(),
                })
            } else {
                spawn(exec, self.limit)
            };
        match outcome {
            Ok(child) => {
                outbox.push(kind::STARTED, id, &to_json(&Started { pid: child.pid }));
                self.list.push(Session::new(id, child));
            }
            Err(failed) => outbox.push(kind::EXEC_FAILED, id, &to_json(&failed)),
        }
    }

    /// Leaves every session without a listener.
    pub fn detach_all(&mut self) {
        for session in &mut self.list {
            session.detach();
        }
    }

    /// Reports and removes the sessions that are over; their open streams stay, to be drained.
    pub fn settle(&mut self, now: Instant, outbox: &mut Outbox) {
        let mut index = 0;
        while index < self.list.len() {
            let Some(exit) = self.list[index].finished(now) else {
                index += 1;
                continue;
            };
            let mut session = self.list.swap_remove(index);
            if let Some(id) = session.id {
                outbox.push(kind::EXIT, id, &to_json(&exit));
            }
            self.drains
                .extend(session.outputs.iter_mut().filter_map(Output::take_fd));
        }
    }

    /// Reads a leftover stream; true at its end.
    pub fn drain(&self, index: usize, buffer: &mut [u8]) -> bool {
        match read(&self.drains[index], buffer) {
            Ok(count) => count == 0,
            Err(error) => !matches!(error, nix::Error::EAGAIN | nix::Error::EINTR),
        }
    }
}
