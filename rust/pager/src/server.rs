//! Answers the kernel: a thread for each end of the connection, one for reads that are held.

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::build::Unreadable;
use crate::clients::{is_dying, Cause, Client, Clients};
use crate::device::{Device, Part};
use crate::fuse::{Buffer, Fuse};
use crate::held::{Held, HeldRead, AGAIN};
use crate::nodes::{Node, Nodes, Open, Passed};
use crate::runs::share;
use crate::seen::Seen;
use crate::wire::{self, Attributes, Call, Init, Request, ROOT};

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What the server has to say to whoever keeps things beyond its life.
pub trait Keeps: Send + Sync {
    /// The kernel was greeted: from here on files can be opened.
    fn greeted(&self, init: &Init);
    /// A VMM was killed.
    fn killed(&self, sandbox: &str);
    /// The connection was taken away: nothing can be served any more.
    fn ended(&self);
}

/// The server of one connection.
pub struct Server {
    /// The connection.
    pub fuse: Fuse,
    /// Its files.
    pub nodes: Nodes,
    /// What their devices share.
    pub open: Open,
    /// Who runs on them.
    pub clients: Clients,
    /// What waits.
    pub held: Held,
    /// What was counted.
    pub seen: Seen,
    /// How long an access may wait before its VMM is killed.
    pub bound: Duration,
    keeps: Arc<dyn Keeps>,
    ended: AtomicBool,
    reading: AtomicUsize,
}

impl Server {
    /// A server of what there is.
    pub fn new(
        fuse: Fuse,
        nodes: Nodes,
        clients: Clients,
        bound: Duration,
        keeps: Arc<dyn Keeps>,
    ) -> Self {
        Self {
            fuse,
            nodes,
            open: Open::default(),
            clients,
            held: Held::default(),
            seen: Seen::default(),
            bound,
            keeps,
            ended: AtomicBool::new(false),
            reading: AtomicUsize::new(0),
        }
    }

    /// Begins to answer.
    ///
    /// # Errors
    /// A thread can't be started.
    pub fn start(self: &Arc<Self>) -> io::Result<()> {
        for end in 0..self.fuse.ends() {
            let server = self.clone();
            let thread = std::thread::Builder::new().name(format!("fuse-{end}"));
            thread
                .stack_size(256 << 10)
                .spawn(move || server.serve(end))?;
        }
        let server = self.clone();
        let thread = std::thread::Builder::new().name("held".to_owned());
        thread.stack_size(256 << 10).spawn(move || loop {
            for read in server.held.take() {
                let again = |server: &Self, read, _: &mut Vec<Part>| server.again(read);
                server.answer_read(read, &mut Vec::new(), again);
            }
        })?;
        let server = self.clone();
        let thread = std::thread::Builder::new().name("bound".to_owned());
        thread
            .stack_size(256 << 10)
            .spawn(move || server.watch_bound())?;
        Ok(())
    }

    /// Kills at the bound, also while a try is under way that takes its time; the read itself
    /// fails when that has ended.
    fn watch_bound(&self) {
        loop {
            self.held.wait_for_some();
            std::thread::sleep(AGAIN);
            for read in self.held.since(self.bound) {
                self.end_waiting(&read);
            }
        }
    }

    /// The sandboxes that wait for a blob right now: each one's first access that does.
    pub fn stalled(&self) -> Vec<(String, Cause)> {
        let mut found: Vec<(String, Cause)> = Vec::new();
        for read in self.held.since(Duration::ZERO) {
            for client in self.waiting(&read) {
                if found.iter().all(|(sandbox, _)| *sandbox != client.sandbox) {
                    found.push((client.sandbox.clone(), cause_of(&read)));
                }
            }
        }
        found
    }

    fn serve(self: &Arc<Self>, end: usize) {
        let (mut buffer, mut parts) = (Buffer::new(), Vec::new());
        loop {
            match self.fuse.receive(end, &mut buffer) {
                Ok(Some(bytes)) => self.answer(end, bytes, &mut parts),
                Ok(None) => break,
                Err(error) => {
                    eprintln!("the FUSE device can't be read: {error}");
                    break;
                }
            }
        }
        if !self.ended.swap(true, Ordering::SeqCst) {
            self.keeps.ended();
        }
    }

    fn answer(self: &Arc<Self>, end: usize, bytes: &[u8], parts: &mut Vec<Part>) {
        let request = match Request::parse(bytes) {
            Ok(request) => request,
            Err(error) => {
                eprintln!("a request that can't be read: {error:?}");
                if let Some(unique) = Request::unique_of(bytes) {
                    self.refuse(end, unique, libc::EINVAL);
                }
                return;
            }
        };
        let Request {
            unique, node, pid, ..
        } = request;
        let data = match request.call {
            Call::Read { offset, size } => {
                let read = HeldRead {
                    end,
                    unique,
                    node,
                    offset,
                    size: size as usize,
                    pid,
                    since: Instant::now(),
                    why: Unreadable::away("", ""),
                };
                return self.answer_read(read, parts, Self::read);
            }
            Call::Silent | Call::Interrupt(_) => return, // a held read looks at its reader itself
            Call::Init(init) => return self.greet(end, unique, &init),
            Call::Lookup(name) => self.lookup(name),
            Call::Attributes => self.attributes(node).map(|of| wire::attributes_reply(&of)),
            Call::Open => self.open(node),
            Call::OpenDirectory => Ok(wire::open_reply()),
            Call::Statistics => Ok(wire::statistics_reply()),
            Call::Nothing => Ok(Vec::new()),
            Call::Unknown => Err(libc::ENOSYS),
        };
        match data {
            Ok(data) => self.reply(end, unique, &[IoSlice::new(&data)]),
            Err(error) => self.refuse(end, unique, error),
        }
    }

    fn greet(&self, end: usize, unique: u64, init: &Init) {
        match wire::init_reply(init) {
            Some(reply) => {
                self.reply(end, unique, &[IoSlice::new(&reply)]);
                self.keeps.greeted(init);
            }
            None => self.refuse(end, unique, libc::EPROTO),
        }
    }

    fn lookup(&self, name: &[u8]) -> Result<Vec<u8>, i32> {
        let name = std::str::from_utf8(name).map_err(|_| libc::ENOENT)?;
        let node = self.nodes.find(name).ok_or(libc::ENOENT)?;
        Ok(wire::entry_reply(&attributes_of(&node, node.passed())))
    }

    /// One that is passed through is opened under the number for that and no other.
    fn open(&self, number: u64) -> Result<Vec<u8>, i32> {
        let node = self.nodes.get(number).ok_or(libc::ESTALE)?;
        if number == node.number {
            return Ok(wire::open_reply());
        }
        let passed = node.passed().filter(|passed| passed.number == number);
        passed
            .map(|passed| wire::passed_reply(passed.backing))
            .ok_or(libc::ESTALE) // no more: the kernel asks for the name again
    }

    fn attributes(&self, node: u64) -> Result<Attributes, i32> {
        if node == ROOT {
            return Ok(attributes(ROOT, 0));
        }
        let file = self.nodes.get(node).ok_or(libc::ESTALE)?;
        let passed = file.passed().filter(|passed| passed.number == node);
        Ok(attributes_of(&file, passed))
    }

    /// Has a read answered: at once, or by another thread where its medium may take its time. A
    /// peer that says nothing must hold none of the few threads that everybody's reads come to.
    fn answer_read(
        self: &Arc<Self>,
        read: HeldRead,
        parts: &mut Vec<Part>,
        answer: impl Fn(&Self, HeldRead, &mut Vec<Part>) + Send + 'static,
    ) {
        let node = self.nodes.get(read.node);
        let device = node.and_then(|node| node.device(&self.open).ok());
        let Some(device) = device.filter(|device| device.has_latency()) else {
            self.reading.fetch_add(1, Ordering::Relaxed);
            answer(self, read, parts);
            self.reading.fetch_sub(1, Ordering::Relaxed);
            return;
        };
        let server = self.clone();
        let job = move || answer(&server, read, &mut Vec::new());
        if let Err(job) = device.builds().read_aside(Box::new(job)) {
            job();
        }
    }

    /// Answers a read, or holds it.
    fn read(&self, mut read: HeldRead, parts: &mut Vec<Part>) {
        let Some(node) = self.nodes.get(read.node) else {
            return self.refuse(read.end, read.unique, libc::ESTALE);
        };
        if let Err(why) = self.try_read(&node, &read, parts) {
            eprintln!("{} at {}: {why}", node.name, read.offset);
            self.seen.stalled(&node.name);
            read.why = why;
            self.hold(read);
        }
    }

    /// Holds a read that can't be answered now, or gives it up where the bound has come: a slow
    /// medium takes its time to fail. Whether it waits.
    fn hold(&self, read: HeldRead) -> bool {
        if read.since.elapsed() >= self.bound {
            self.give_up(&read);
            return false;
        }
        if let Some(one) = self.held.add(read) {
            self.give_up(&one);
        }
        true
    }

    fn try_read(
        &self,
        node: &Node,
        read: &HeldRead,
        parts: &mut Vec<Part>,
    ) -> Result<(), Unreadable> {
        parts.clear();
        let device = node.device(&self.open)?;
        let flows = self.read_ahead(node, &device, read);
        let origin = device.read(read.offset, read.size, parts)?;
        let bytes = parts.iter().map(Part::len).sum::<usize>() as u64;
        // Before it is answered: what is asked for after that comes behind it.
        node.with_given(|given| given.read(read.offset, bytes));
        self.reply(read.end, read.unique, &slices(parts));
        self.seen
            .served(&node.name, origin, bytes, read.since.elapsed());
        parts.clear(); // frames are let go of
        if flows {
            device.let_go(read.offset..read.offset + bytes);
        }
        Ok(())
    }

    /// Whether a read over a medium with latency is one of many that follow each other; what comes
    /// after it is asked for then.
    fn read_ahead(&self, node: &Node, device: &Device, read: &HeldRead) -> bool {
        if !device.has_latency() {
            return false;
        }
        let (offset, size) = (read.offset, read.size as u64);
        let noted = node.with_streams(|runs| runs.note(offset, size, node.size_bytes, share));
        let Some(next) = noted else {
            return false;
        };
        if !next.is_empty() {
            // What can't be opened the read says.
            let asked = device.ask_ahead(next).unwrap_or_default();
            self.seen.ahead(&node.name, asked);
        }
        true
    }

    /// Tries a held read once more.
    fn again(&self, mut read: HeldRead) {
        let (end, unique) = (read.end, read.unique);
        let waits = match self.nodes.get(read.node) {
            None => {
                self.refuse(end, unique, libc::ESTALE);
                false
            }
            Some(node) => match self.try_read(&node, &read, &mut Vec::new()) {
                Ok(()) => false,
                Err(_) if is_dying(read.pid) => {
                    self.refuse(end, unique, libc::EIO);
                    false
                }
                Err(why) => {
                    read.why = why;
                    self.hold(read)
                }
            },
        };
        if !waits {
            self.held.answered(end, unique);
        }
    }

    /// The bound has come: whoever waits is killed, and only then the read fails.
    fn give_up(&self, read: &HeldRead) {
        self.end_waiting(read);
        self.refuse(read.end, read.unique, libc::EIO);
    }

    fn end_waiting(&self, read: &HeldRead) {
        for client in self.waiting(read) {
            if client.kill(&cause_of(read)) {
                eprintln!("{}: killed, since {}", client.sandbox, read.why);
                self.keeps.killed(&client.sandbox);
            }
        }
    }

    /// Whose access a read is.
    fn waiting(&self, read: &HeldRead) -> Vec<Arc<Client>> {
        let name = self.nodes.get(read.node).map(|node| node.name.clone());
        self.clients.waiting(read.pid, &name.unwrap_or_default())
    }

    /// Whether a read is being answered right now.
    pub fn is_reading(&self) -> bool {
        self.reading.load(Ordering::Relaxed) > 0
    }

    fn refuse(&self, end: usize, unique: u64, error: i32) {
        if let Err(failed) = self.fuse.reply(end, unique, -error, &[]) {
            eprintln!("an answer ({error}) was not taken: {failed}");
        }
    }

    fn reply(&self, end: usize, unique: u64, data: &[IoSlice]) {
        if let Err(failed) = self.fuse.reply(end, unique, 0, data) {
            eprintln!("an answer was not taken: {failed}");
            self.refuse(end, unique, libc::EIO);
        }
    }
}

/// Why a read is not answered, and for how long.
fn cause_of(read: &HeldRead) -> Cause {
    Cause {
        blob: read.why.blob.clone(),
        cause: read.why.cause.clone(),
        waited_ms: read.since.elapsed().as_millis() as u64,
    }
}

/// A file's, as it is served or as it is passed through.
fn attributes_of(node: &Node, passed: Option<Passed>) -> Attributes {
    let served = attributes(node.number, node.size_bytes);
    match passed {
        None => served,
        Some(passed) => Attributes {
            node: passed.number,
            modified: passed.modified,
            ..served
        },
    }
}

fn attributes(node: u64, size_bytes: u64) -> Attributes {
    Attributes {
        node,
        inode: node,
        modified: (0, 0),
        size_bytes,
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
    }
}

/// Parts as the kernel takes them.
pub(crate) fn slices(parts: &[Part]) -> Vec<IoSlice<'_>> {
    let mut slices = Vec::with_capacity(parts.len() + 1);
    for part in parts {
        match part {
            Part::Zeros(length) => {
                let (whole, rest) = (length / ZEROS.len(), length % ZEROS.len());
                slices.extend((0..whole).map(|_| IoSlice::new(&ZEROS)));
                slices.push(IoSlice::new(&ZEROS[..rest]));
            }
            Part::Frame(frame, from, length) => {
                slices.push(IoSlice::new(&frame[*from..from + length]));
            }
            Part::Bytes(bytes) => slices.push(IoSlice::new(bytes)),
        }
    }
    slices
}
