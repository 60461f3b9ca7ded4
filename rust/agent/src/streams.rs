//! The two directions of a command's data: a bounded queue into its input, credit for its outputs.
//!
//! Invariants: an [`Input`] holds at most the window that the host was granted; an [`Output`] reads
//! at most what the host granted, and after the command's end at most what was in the pipe at that
//! moment plus what comes within the grace.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::unistd::{read, write};

use crate::message::STREAM_WINDOW;

const GRANT_STEP: u32 = STREAM_WINDOW / 4; // how much is consumed before more is granted
const END_OF_TRANSMISSION: u8 = 4; // what a person types for the end of input on a terminal

mod requests {
    //! The request that says how much a pipe or terminal holds.
    nix::ioctl_read_bad!(bytes_waiting, libc::FIONREAD, libc::c_int);
}

/// What goes into a command's standard input.
pub struct Input {
    fd: Option<OwnedFd>,
    terminal: bool,
    queue: VecDeque<Vec<u8>>,
    offset: usize, // bytes of the first chunk that were written
    queued: u32,
    consumed: u32, // bytes written or dropped, not granted again yet
    ending: bool,
}

impl Input {
    /// `terminal`: the end of input is a character, not a closed pipe.
    pub fn new(fd: Option<OwnedFd>, terminal: bool) -> Self {
        Self {
            fd,
            terminal,
            queue: VecDeque::new(),
            offset: 0,
            queued: 0,
            consumed: 0,
            ending: false,
        }
    }

    /// The descriptor to wait on, while something waits to be written.
    pub fn waiting_fd(&self) -> Option<&OwnedFd> {
        self.fd.as_ref().filter(|_| !self.queue.is_empty())
    }

    /// Whether the command can still read something.
    pub fn is_open(&self) -> bool {
        self.fd.is_some()
    }

    /// Takes bytes from the host; false if it sent more than it was granted.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        let count = bytes.len() as u32;
        if self.queued + self.consumed + count > STREAM_WINDOW {
            return false;
        }
        if self.fd.is_none() || self.ending {
            self.consumed += count;
            return true;
        }
        self.queued += count;
        let written = if self.queue.is_empty() {
            self.write_now(bytes)
        } else {
            0
        };
        if written < bytes.len() && self.fd.is_some() {
            self.queue.push_back(bytes[written..].to_vec());
        }
        true
    }

    /// Closes the input once everything before is written.
    pub fn end(&mut self) {
        if self.ending {
            return;
        }
        self.ending = true;
        if self.terminal && self.fd.is_some() {
            self.queue.push_back(vec![END_OF_TRANSMISSION]);
            self.queued += 1;
        }
        self.write_queued();
    }

    /// As [`Input::end`], but a terminal stays as it is: the host that typed into it is gone.
    pub fn orphan(&mut self) {
        self.ending = true;
        self.write_queued();
    }

    /// Writes what waits, until it would block.
    pub fn write_queued(&mut self) {
        while let Some(chunk) = self.queue.pop_front() {
            let offset = std::mem::take(&mut self.offset);
            let written = offset + self.write_now(&chunk[offset..]);
            if self.fd.is_none() {
                return;
            }
            if written < chunk.len() {
                self.offset = written;
                self.queue.push_front(chunk);
                return;
            }
        }
        if self.ending {
            self.fd = None;
        }
    }

    /// How many bytes the host may be granted now; 0 until it is worth a frame.
    pub fn take_grant(&mut self) -> u32 {
        if self.consumed < GRANT_STEP || self.ending {
            return 0;
        }
        std::mem::take(&mut self.consumed)
    }

    fn write_now(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while let (Some(fd), true) = (&self.fd, written < bytes.len()) {
            match write(fd, &bytes[written..]) {
                Ok(count) => written += count,
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => break,
                Err(_) => {
                    self.drop_rest();
                    return bytes.len();
                }
            }
        }
        self.queued -= written as u32;
        self.consumed += written as u32;
        written
    }

    fn drop_rest(&mut self) {
        // The command closed its input, or is gone: what it did not read it never will.
        self.fd = None;
        self.queue.clear();
        self.offset = 0;
        self.consumed += std::mem::take(&mut self.queued);
    }
}

/// What a read gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// So many bytes.
    Bytes(usize),
    /// Nothing at the moment.
    Nothing,
    /// Nothing any more.
    End,
}

/// What comes from a command's standard output or error, or from its terminal.
pub struct Output {
    fd: Option<OwnedFd>,
    credit: u32,
    owed: usize, // bytes that were in the pipe when the command ended
}

impl Output {
    /// The stream of `fd`, with the whole window granted.
    pub fn new(fd: Option<OwnedFd>) -> Self {
        Self {
            fd,
            credit: STREAM_WINDOW,
            owed: 0,
        }
    }

    /// The descriptor, until its end.
    pub fn fd(&self) -> Option<&OwnedFd> {
        self.fd.as_ref()
    }

    /// How much may be read for the host.
    pub fn credit(&self) -> usize {
        self.credit as usize
    }

    /// The host consumed so much; false if it never was sent.
    pub fn grant(&mut self, bytes: u32) -> bool {
        match self.credit.checked_add(bytes) {
            Some(credit) if credit <= STREAM_WINDOW => self.credit = credit,
            _ => return false,
        }
        true
    }

    /// Reads for the host, within its credit.
    pub fn read(&mut self, buffer: &mut [u8]) -> Read {
        let room = buffer.len().min(self.credit());
        let outcome = self.read_raw(&mut buffer[..room]);
        if let Read::Bytes(count) = outcome {
            self.credit -= count as u32;
            self.owed = self.owed.saturating_sub(count);
        }
        outcome
    }

    /// Reads and throws away.
    pub fn discard(&mut self, buffer: &mut [u8]) -> Read {
        self.read_raw(buffer)
    }

    /// Notes what is in the pipe at the command's end: all of it belongs to the command.
    pub fn command_ended(&mut self) {
        let mut waiting = 0;
        if let Some(fd) = &self.fd {
            // SAFETY: the descriptor is open and the kernel writes one int.
            if unsafe { requests::bytes_waiting(fd.as_raw_fd(), &mut waiting) }.is_ok() {
                self.owed = waiting.max(0) as usize;
            }
        }
    }

    /// Whether everything that the command wrote before its end has been read.
    pub fn is_settled(&self) -> bool {
        self.fd.is_none() || self.owed == 0
    }

    /// The descriptor, to be drained by somebody else.
    pub fn take_fd(&mut self) -> Option<OwnedFd> {
        self.fd.take()
    }

    fn read_raw(&mut self, buffer: &mut [u8]) -> Read {
        let Some(fd) = &self.fd else { return Read::End };
        match read(fd, buffer) {
            Ok(0) if !buffer.is_empty() => {}
            Ok(count) => return Read::Bytes(count),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Read::Nothing,
            Err(_) => {} // a terminal whose last user left reads as an I/O error
        }
        self.fd = None;
        Read::End
    }
}
