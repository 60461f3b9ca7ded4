//! The byte stream to the host: a virtio-serial port, or a unix socket that carries the same bytes.
//!
//! Invariants: reads and writes never wait. The descriptor is watched edge-triggered, because a
//! port without a host reports a hang-up for as long as nobody is there, which would keep the
//! loop awake; so `readable` and `writable` stay set until a call says that it would block.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::options::Endpoint;

const LISTENER: u64 = 0;
const STREAM: u64 = 1;
const EDGES: EpollFlags = EpollFlags::EPOLLET
    .union(EpollFlags::EPOLLIN)
    .union(EpollFlags::EPOLLOUT)
    .union(EpollFlags::EPOLLRDHUP);

enum Stream {
    Port(File),
    Socket(UnixStream),
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Port(port) => port.as_fd(),
            Stream::Socket(socket) => socket.as_fd(),
        }
    }
}

/// What reading gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing at the moment.
    Nothing,
    /// There is no host at the other end.
    Absent,
}

/// The connection to the host, or the wait for one.
pub struct Channel {
    epoll: Epoll,
    listener: Option<UnixListener>,
    stream: Option<Stream>,
    readable: bool,
    writable: bool,
}

impl Channel {
    /// Opens the port, or begins to listen.
    pub fn open(endpoint: &Endpoint) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut channel = Self {
            epoll,
            listener: None,
            stream: None,
            readable: false,
            writable: false,
        };
        match endpoint {
            Endpoint::Port(path) => {
                let mut options = File::options();
                let port = options
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path)?;
                channel.watch(Stream::Port(port))?;
            }
            Endpoint::Socket(path) => channel.listen(path)?,
        }
        Ok(channel)
    }

    fn listen(&mut self, path: &Path) -> io::Result<()> {
        let _ = fs::remove_file(path); // left by an agent before this one
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        self.epoll
            .add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        self.listener = Some(listener);
        Ok(())
    }

    fn watch(&mut self, stream: Stream) -> io::Result<()> {
        self.epoll.add(&stream, EpollEvent::new(EDGES, STREAM))?;
        self.stream = Some(stream);
        self.readable = true;
        self.writable = true;
        Ok(())
    }

    /// The descriptor to wait on for reading.
    pub fn waiting_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// Whether a read may give something.
    pub fn is_readable(&self) -> bool {
        self.readable
    }

    /// Whether a write may take something.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Tries to write although nothing said that it would work.
    pub fn assume_writable(&mut self) {
        self.writable = self.stream.is_some();
    }

    /// Notes what happened; true if a new connection took the place of the one before.
    pub fn notice(&mut self) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); 2];
        let count = match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
            Ok(count) => count,
            Err(nix::Error::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let mut connected = false;
        for event in &events[..count] {
            if event.data() == LISTENER {
                connected |= self.accept()?;
            } else {
                self.readable = self.stream.is_some();
                self.writable = self.stream.is_some();
            }
        }
        Ok(connected)
    }

    fn accept(&mut self) -> io::Result<bool> {
        let Some(listener) = &self.listener else {
            return Ok(false);
        };
        let socket = match listener.accept() {
            Ok((socket, _)) => socket,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        socket.set_nonblocking(true)?;
        self.stream = None;
        self.watch(Stream::Socket(socket))?;
        Ok(true)
    }

    /// Reads what is there.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<Received> {
        let outcome = match &mut self.stream {
            Some(Stream::Port(port)) => port.read(buffer),
            Some(Stream::Socket(socket)) => socket.read(buffer),
            None => return Ok(Received::Nothing),
        };
        match outcome {
            Ok(0) => self.readable = false,
            Ok(count) => return Ok(Received::Bytes(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return Ok(Received::Nothing);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                return Ok(Received::Nothing)
            }
            Err(error) => return self.drop_socket(error).map(|()| Received::Absent),
        }
        if self.listener.is_some() {
            self.stream = None;
            self.writable = false;
        }
        Ok(Received::Absent)
    }

    /// Writes what fits.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.writable {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let outcome = match &mut self.stream {
            Some(Stream::Port(port)) => port.write(bytes),
            Some(Stream::Socket(socket)) => socket.write(bytes),
            None => Err(io::ErrorKind::WouldBlock.into()),
        };
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.writable = false;
                Err(error)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(error) => self.drop_socket(error).map(|()| 0),
            written => written,
        }
    }

    /// A broken socket means that its host is gone; a broken port ends the agent, and init starts
    /// another.
    fn drop_socket(&mut self, error: io::Error) -> io::Result<()> {
        if self.listener.is_none() {
            return Err(error);
        }
        self.stream = None;
        self.readable = false;
        self.writable = false;
        Ok(())
    }
}
