//! A real HTTP server over TCP that serves a directory, and misbehaves as it is told.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

/// What is done with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    Serve,
    /// Without the length, in chunks.
    Chunked,
    Slow(Duration),
    Status(u16),
    /// The connection is closed without a word.
    Close,
    /// Nothing is ever said.
    Hang,
    /// So many bytes of the body, and then nothing.
    HangAfter(usize),
    /// The body in small pieces, never long apart.
    Drip,
    /// So many bytes of the body, and the connection is closed.
    CutAfter(usize),
    /// The whole blob with status 200.
    Whole,
    /// A range that begins elsewhere.
    OtherRange,
    NoRange,
    /// The right range of a blob of another size.
    OtherSize,
    /// Says that there is more than the range.
    LongerSaid,
    /// Sends more than the range, without saying a length.
    LongerSent,
    ShorterSaid,
    Encoded,
    /// Ranges that count from the end are answered so, others as they should be.
    FromStartOnly(u16),
    /// Right in all, but for a bit.
    Lie,
    Garbage,
    /// A head without an end.
    EndlessHead,
}

type Choose = Box<dyn Fn(usize, &str) -> Act + Send + Sync>;

struct Shared {
    directory: PathBuf,
    choose: Mutex<Choose>,
    requests: Mutex<Vec<(String, String)>>,
    connections: AtomicUsize,
    closing: Mutex<bool>,
    closed: Condvar,
    stop: AtomicBool,
}

pub struct Server {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

impl Server {
    pub fn new(directory: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            directory,
            choose: Mutex::new(Box::new(|_, _| Act::Serve)),
            requests: Mutex::default(),
            connections: AtomicUsize::new(0),
            closing: Mutex::new(false),
            closed: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let server = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                if server.stop.load(Ordering::SeqCst) {
                    return;
                }
                server.connections.fetch_add(1, Ordering::SeqCst);
                let server = server.clone();
                thread::spawn(move || {
                    let stream = stream.unwrap();
                    stream.set_nodelay(true).unwrap();
                    server.talk(&stream);
                });
            }
        });
        Self { address, shared }
    }

    pub fn url(&self) -> String {
        format!("http://{}/some/builds", self.address)
    }

    /// From now on requests, counted anew from 0, are dealt with as `choose` says.
    pub fn act(&self, choose: impl Fn(usize, &str) -> Act + Send + Sync + 'static) {
        self.shared.requests.lock().unwrap().clear();
        *self.shared.choose.lock().unwrap() = Box::new(choose);
    }

    pub fn always(&self, act: Act) {
        self.act(move |_, _| act.clone());
    }

    /// Path and range of each request since the last change.
    pub fn requests(&self) -> Vec<(String, String)> {
        self.shared.requests.lock().unwrap().clone()
    }

    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        *self.shared.closing.lock().unwrap() = true;
        self.shared.closed.notify_all();
        // Wakes who accepts.
        drop(TcpStream::connect(self.address));
    }
}

impl Shared {
    fn talk(&self, stream: &TcpStream) {
        let mut reader = BufReader::new(stream);
        while let Some((path, range)) = read_request(&mut reader) {
            let number = {
                let mut requests = self.requests.lock().unwrap();
                requests.push((path.clone(), range.clone()));
                requests.len() - 1
            };
            let act = (self.choose.lock().unwrap())(number, &path);
            if !self.answer(stream, &path, &range, &act).unwrap_or(false) {
                break;
            }
        }
        let _ = stream.shutdown(Shutdown::Both);
    }

    /// Until the server ends.
    fn hang(&self) {
        let closing = self.closing.lock().unwrap();
        drop(
            self.closed
                .wait_while(closing, |closing| !*closing)
                .unwrap(),
        );
    }

    /// Whether the connection goes on.
    fn answer(
        &self,
        mut to: &TcpStream,
        path: &str,
        range: &str,
        act: &Act,
    ) -> std::io::Result<bool> {
        if let Some(goes_on) = self.answer_without_bytes(to, act)? {
            return Ok(goes_on);
        }
        let name = path.strip_prefix("/some/builds/").unwrap_or("?");
        let Ok(blob) = File::open(self.directory.join(name)) else {
            return self.answer(to, path, range, &Act::Status(404));
        };
        let size = blob.metadata()?.len() as usize;
        let (first, last) = match (range_of(range), act) {
            ((None, count), Act::FromStartOnly(other)) => match other {
                // As servers do that take no heed of it, do not know it, or misread it.
                200 => return self.answer(to, path, range, &Act::Whole),
                206 => (0, count),
                status => return self.answer(to, path, range, &Act::Status(*status)),
            },
            ((None, count), _) => (size.saturating_sub(count), size.max(1) - 1),
            ((Some(first), last), _) => (first, last),
        };
        let part = |first: usize, end: usize| {
            let mut bytes = vec![0; end - first];
            blob.read_exact_at(&mut bytes, first as u64).map(|()| bytes)
        };
        if first >= size {
            write!(
                to,
                "HTTP/1.1 416 No\r\ncontent-range: bytes */{size}\r\ncontent-length: 0\r\n\r\n"
            )?;
            return Ok(true);
        }
        if *act == Act::Whole {
            write!(to, "HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n")?;
            to.write_all(&part(0, size)?)?;
            return Ok(true);
        }
        let end = size.min(last + 1);
        let answer = Answer::new(first, part(first, end)?, size, act);
        self.send(to, &answer, act)
    }

    /// What needs no blob; None where the act is of another kind.
    fn answer_without_bytes(&self, mut to: &TcpStream, act: &Act) -> std::io::Result<Option<bool>> {
        match act {
            Act::Close => Ok(Some(false)),
            Act::Hang => {
                self.hang();
                Ok(Some(false))
            }
            Act::Garbage => {
                to.write_all(b"\0\x01\x02 nothing of the kind\r\n\r\n")?;
                Ok(Some(false))
            }
            Act::EndlessHead => {
                to.write_all(b"HTTP/1.1 206 Partial Content\r\n")?;
                while to.write_all(b"x-more: and more\r\n").is_ok() {}
                Ok(Some(false))
            }
            Act::Status(status) => {
                write!(to, "HTTP/1.1 {status} So\r\ncontent-length: 4\r\n\r\nwhy?")?;
                Ok(Some(true))
            }
            Act::Slow(time) => {
                thread::sleep(*time);
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    /// Sends head and body, as far as the act goes.
    fn send(&self, mut to: &TcpStream, answer: &Answer, act: &Act) -> std::io::Result<bool> {
        let Answer { said, length, body } = answer;
        let framing = match length {
            Some(length) => format!("content-length: {length}\r\n"),
            None => "transfer-encoding: chunked\r\n".to_owned(),
        };
        write!(to, "HTTP/1.1 206 Partial Content\r\n{said}{framing}\r\n")?;
        match act {
            Act::HangAfter(count) => {
                to.write_all(&body[..body.len().min(*count)])?;
                self.hang();
                return Ok(false);
            }
            Act::Drip => {
                for piece in body.chunks(8) {
                    to.write_all(piece)?;
                    thread::sleep(Duration::from_millis(10));
                }
                return Ok(false);
            }
            Act::CutAfter(count) if *count < body.len() => {
                to.write_all(&body[..*count])?;
                return Ok(false);
            }
            _ => {}
        }
        if length.is_some() {
            to.write_all(body)?;
            return Ok(true);
        }
        for chunk in body.chunks(1000) {
            write!(to, "{:x}\r\n", chunk.len())?;
            to.write_all(chunk)?;
            to.write_all(b"\r\n")?;
        }
        to.write_all(b"0\r\n\r\n")?;
        Ok(true)
    }
}

/// A partial answer: what its head says, how long it says it is, and the bytes.
struct Answer {
    said: String,
    length: Option<usize>,
    body: Vec<u8>,
}

impl Answer {
    /// The right one, or one that is wrong as the act says.
    fn new(first: usize, mut body: Vec<u8>, size: usize, act: &Act) -> Self {
        let end = first + body.len();
        let range = |first: usize, end: usize, size: usize| {
            format!("content-range: bytes {first}-{}/{size}\r\n", end - 1)
        };
        let mut said = range(first, end, size);
        match act {
            Act::OtherRange => said = range(first + 1, end + 1, size + 2),
            Act::NoRange => said.clear(),
            Act::OtherSize => said = range(first, end, size + 1),
            Act::LongerSaid | Act::LongerSent => body.push(7),
            Act::ShorterSaid => drop(body.pop()),
            Act::Encoded => said.push_str("content-encoding: gzip\r\n"),
            Act::Lie => {
                let middle = body.len() / 2;
                body[middle] ^= 16;
            }
            _ => {}
        }
        let chunked = matches!(act, Act::LongerSent | Act::Chunked);
        let length = (!chunked).then_some(body.len());
        Self { said, length, body }
    }
}

/// First and last byte; of a range that counts from the end, how many bytes.
fn range_of(range: &str) -> (Option<usize>, usize) {
    let (first, last) = range
        .strip_prefix("bytes=")
        .unwrap()
        .split_once('-')
        .unwrap();
    (first.parse().ok(), last.parse().unwrap())
}

/// Path and range.
fn read_request(from: &mut BufReader<&TcpStream>) -> Option<(String, String)> {
    let mut line = String::new();
    if from.take(8192).read_line(&mut line).ok()? == 0 {
        return None;
    }
    let path = line.split(' ').nth(1)?.to_owned();
    assert!(line.starts_with("GET "), "{line}");
    let mut range = String::new();
    loop {
        line.clear();
        if from.take(8192).read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Some((path, range));
        }
        let (name, value) = line.split_once(": ")?;
        if name.eq_ignore_ascii_case("range") {
            range = value.to_owned();
        }
    }
}
