//! The loop: waits for the host, for commands and for time, and moves bytes between them.
//!
//! Invariants: nothing in it waits but the one poll; each turn does a bounded amount of work per
//! source, so that no session and no flood from the host keeps the others from their turn.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::time::ClockId;

use crate::channel::{Channel, Received};
use crate::filesystems::{self, Freezer};
use crate::frame::{kind, Decoder, Event, Header, MORE};
use crate::link::{Link, Verdict};
use crate::message::{
    decode_credit, to_json, Announce, Exec, ExecFailed, Failure, Hello, Request, Resize, Signal,
    Welcome, EXEC_MAX, PROTOCOL,
};
use crate::options::Options;
use crate::outbox::Outbox;
use crate::session::Sessions;
use crate::spawn::FileLimit;
use crate::system::{self, System};

const ACK_DELAY: Duration = Duration::from_millis(20);
/// A port that takes nothing for so long is tried again, should its wake-up have been lost.
const WRITE_RETRY: Duration = Duration::from_secs(1);
const READS_PER_TURN: usize = 16;

/// What the loop waits for.
#[derive(Clone, Copy)]
enum Source {
    Channel,
    Freezer,
    End(usize),
    Input(usize),
    Output(usize, usize),
    Drain(usize),
}

/// The agent.
pub struct Engine {
    channel: Channel,
    decoder: Decoder,
    core: Core,
    scratch: Vec<u8>,
    write_retry: Option<Instant>,
}

/// Everything that frames act on.
struct Core {
    link: Link,
    outbox: Outbox,
    sessions: Sessions,
    system: System,
    freezer: Freezer,
    exec: Option<(u32, Vec<u8>)>, // an EXEC whose frames are still coming
    ack_due: Option<Instant>,
}

impl Engine {
    /// Opens the channel and says that an agent has begun.
    pub fn new(options: &Options) -> io::Result<Self> {
        let system = System::new(options.system)?;
        if options.system {
            filesystems::thaw_leftovers();
        }
        let mut core = Core {
            link: Link::default(),
            outbox: Outbox::default(),
            sessions: Sessions::new(FileLimit::raise()),
            system,
            freezer: Freezer::default(),
            exec: None,
            ack_due: None,
        };
        core.announce();
        let channel = Channel::open(&options.endpoint)?;
        Ok(Self {
            channel,
            decoder: Decoder::default(),
            core,
            scratch: vec![0; 64 << 10],
            write_retry: None,
        })
    }

    /// Serves until the channel fails.
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            let ready = self.wait()?;
            let now = Instant::now();
            for source in ready {
                self.handle(source, now)?;
            }
            self.receive()?;
            self.core.end_turn(now);
            self.send()?;
        }
    }

    fn wait(&mut self) -> io::Result<Vec<Source>> {
        let timeout = self.timeout();
        let (mut fds, sources) = self.interests();
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let mut ready: Vec<Source> = fds
            .iter()
            .zip(sources)
            .filter(|(fd, _)| is_ready(fd))
            .map(|(_, source)| source)
            .collect();
        // A drain that ends is swapped with the last one: from the back, no index changes before
        // its turn.
        ready.reverse();
        Ok(ready)
    }

    fn interests(&self) -> (Vec<PollFd<'_>>, Vec<Source>) {
        let core = &self.core;
        let room = core.outbox.has_room();
        let mut fds = vec![PollFd::new(self.channel.waiting_fd(), PollFlags::POLLIN)];
        let mut sources = vec![Source::Channel];
        if let Some(results) = core.freezer.waiting_fd() {
            fds.push(PollFd::new(results.as_fd(), PollFlags::POLLIN));
            sources.push(Source::Freezer);
        }
        for (index, session) in core.sessions.list.iter().enumerate() {
            if let Some(pidfd) = session.pidfd() {
                fds.push(PollFd::new(pidfd.as_fd(), PollFlags::POLLIN));
                sources.push(Source::End(index));
            }
            if let Some(input) = session.input.waiting_fd() {
                fds.push(PollFd::new(input.as_fd(), PollFlags::POLLOUT));
                sources.push(Source::Input(index));
            }
            for (stream, output) in session.outputs.iter().enumerate() {
                if let Some(fd) = output.fd().filter(|_| session.wants_output(stream, room)) {
                    fds.push(PollFd::new(fd.as_fd(), PollFlags::POLLIN));
                    sources.push(Source::Output(index, stream));
                }
            }
        }
        for (index, drain) in core.sessions.drains.iter().enumerate() {
            fds.push(PollFd::new(drain.as_fd(), PollFlags::POLLIN));
            sources.push(Source::Drain(index));
        }
        (fds, sources)
    }

    fn timeout(&self) -> PollTimeout {
        if self.channel.is_readable() {
            return PollTimeout::ZERO;
        }
        let now = Instant::now();
        let ack = self.core.ack_due.filter(|_| !self.core.outbox.is_pending());
        let ends = self
            .core
            .sessions
            .list
            .iter()
            .filter_map(|session| session.deadline());
        let deadlines = [ack, self.core.freezer.deadline(), self.write_retry];
        let Some(next) = ends.chain(deadlines.into_iter().flatten()).min() else {
            return PollTimeout::NONE;
        };
        // Rounded up: waking before the deadline would only mean to wait again.
        let wait = next.saturating_duration_since(now).as_millis() + 1;
        PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
    }

    fn handle(&mut self, source: Source, now: Instant) -> io::Result<()> {
        let core = &mut self.core;
        match source {
            Source::Channel => {
                if self.channel.notice()? {
                    self.decoder.clear();
                    core.lose();
                }
            }
            Source::Freezer => {
                if let Some(answer) = core.freezer.progress() {
                    core.outbox.push(kind::FROZEN, 0, &to_json(&answer));
                }
            }
            Source::End(index) => core.sessions.list[index].reap(now),
            Source::Input(index) => core.sessions.list[index].input.write_queued(),
            Source::Output(index, stream) => {
                core.sessions.list[index].read_output(stream, &mut core.outbox)
            }
            Source::Drain(index) => {
                if core.sessions.drain(index, &mut self.scratch) {
                    core.sessions.drains.swap_remove(index);
                }
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        for _ in 0..READS_PER_TURN {
            if !self.channel.is_readable() {
                break;
            }
            match self.channel.read(self.decoder.space())? {
                Received::Bytes(count) => self.decoder.fill(count),
                Received::Nothing => break,
                Received::Absent => {
                    self.decoder.clear();
                    self.core.lose();
                    break;
                }
            }
            while let Some(event) = self.decoder.next() {
                match event {
                    Event::Frame {
                        header,
                        payload,
                        opens,
                    } => self.core.take(&header, payload, opens),
                    Event::Broken => self.core.lost_place(),
                }
            }
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        if self
            .write_retry
            .is_some_and(|retry| Instant::now() >= retry)
        {
            self.channel.assume_writable();
            self.write_retry = None;
        }
        let core = &mut self.core;
        let (link, channel) = (&core.link, &mut self.channel);
        let sent = match link.listening {
            true => core
                .outbox
                .flush(link.received, |bytes| channel.write(bytes))?,
            false => core.outbox.flush_urgent(|bytes| channel.write(bytes))?,
        };
        if sent && core.link.listening {
            core.link.acknowledged();
            core.ack_due = None;
        }
        let blocked = core.must_send() && !self.channel.is_writable();
        let retry = self.write_retry.filter(|_| !sent);
        self.write_retry = blocked.then(|| retry.unwrap_or_else(|| Instant::now() + WRITE_RETRY));
        Ok(())
    }
}

impl Core {
    fn must_send(&self) -> bool {
        self.outbox.is_urgent() || (self.link.listening && self.outbox.is_pending())
    }

    /// The connection is gone; what is unacknowledged waits for the next.
    fn lose(&mut self) {
        self.link.lose(&mut self.outbox);
        self.exec = None;
        self.ack_due = None;
    }

    /// The stream makes no sense any more: asks for a HELLO, once.
    fn lost_place(&mut self) {
        if self.link.listening {
            self.lose();
            self.announce();
        }
    }

    fn announce(&mut self) {
        let announce = Announce {
            incarnation: self.system.incarnation().to_owned(),
        };
        self.outbox.push_preamble();
        self.outbox
            .push_urgent(kind::ANNOUNCE, &to_json(&announce), 0);
    }

    fn refuse(&mut self, cause: &str) {
        self.lose();
        self.outbox.push_urgent(
            kind::ERROR,
            &to_json(&Failure {
                cause: cause.to_owned(),
            }),
            0,
        );
    }

    fn end_turn(&mut self, now: Instant) {
        self.freezer.expire(now);
        for session in &mut self.sessions.list {
            session.report_input(&mut self.outbox);
        }
        self.sessions.settle(now, &mut self.outbox);
        if self.outbox.is_over_limit() {
            self.refuse("it acknowledges nothing");
        }
        if self.link.owes_ack() && self.ack_due.is_none() {
            self.ack_due = Some(now + ACK_DELAY);
        }
        let due = self.ack_due.is_some_and(|due| now >= due) && self.link.owes_ack();
        if (due || self.link.owes_ack_now()) && !self.outbox.is_pending() {
            self.outbox.push_urgent(kind::ACK, &[], self.link.received);
        }
    }

    fn take(&mut self, header: &Header, payload: &[u8], opens: bool) {
        if header.kind == kind::HELLO {
            if opens {
                self.greet(payload);
            }
            return;
        }
        match self.link.accept(header, payload.len(), &mut self.outbox) {
            Verdict::Take => self.act(header, payload),
            Verdict::Drop => {}
            Verdict::Lost => self.lost_place(),
        }
    }

    fn greet(&mut self, payload: &[u8]) {
        let Ok(hello) = serde_json::from_slice::<Hello>(payload) else {
            self.refuse("its HELLO can't be read");
            return;
        };
        self.exec = None;
        self.freezer.thaw(0);
        let resumed = self.link.greet(&hello, &mut self.outbox);
        if !resumed {
            self.sessions.detach_all();
        }
        let failed = self.system.apply(&hello);
        self.system.note("greeted", hello.operation.as_deref());
        let welcome = Welcome {
            protocol: PROTOCOL,
            nonce: hello.nonce,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: system::boot_id(),
            incarnation: self.system.incarnation().to_owned(),
            epoch: self.link.epoch,
            resumed,
            received: self.link.received,
            realtime_ns: system::clock_ns(ClockId::CLOCK_REALTIME),
            monotonic_ns: system::clock_ns(ClockId::CLOCK_MONOTONIC),
            pid: std::process::id(),
            failed,
        };
        self.outbox
            .push_urgent(kind::WELCOME, &to_json(&welcome), self.link.received);
    }

    fn act(&mut self, header: &Header, payload: &[u8]) {
        let id = header.session;
        match header.kind {
            kind::PING => self
                .outbox
                .push_urgent(kind::PONG, payload, self.link.received),
            kind::EXEC => self.exec_part(header, payload),
            kind::FREEZE => self.freeze(payload),
            kind::THAW => self.thaw(payload),
            kind::CLOSE => {
                if let Some(session) = self.sessions.find(id) {
                    session.detach();
                }
                self.outbox.push(kind::CLOSED, id, &[]);
            }
            _ => {
                if !self.act_on_session(header, payload) {
                    self.refuse("it broke a session's rules");
                }
            }
        }
    }

    /// False if the host did what it never may; a session that is over is no such case.
    fn act_on_session(&mut self, header: &Header, payload: &[u8]) -> bool {
        let Some(session) = self.sessions.find(header.session) else {
            return true;
        };
        match header.kind {
            kind::STDIN => return session.input.push(payload),
            kind::STDIN_EOF => session.input.end(),
            kind::SIGNAL => match serde_json::from_slice::<Signal>(payload) {
                Ok(signal) => session.signal(signal.number),
                Err(_) => return false,
            },
            kind::RESIZE => match serde_json::from_slice::<Resize>(payload) {
                Ok(size) => session.resize(size.rows, size.cols),
                Err(_) => return false,
            },
            kind::CREDIT => match decode_credit(payload) {
                Some((stream @ (1 | 2), bytes)) => {
                    return session.outputs[usize::from(stream) - 1].grant(bytes)
                }
                _ => return false,
            },
            _ => {} // from a newer host
        }
        true
    }

    fn exec_part(&mut self, header: &Header, payload: &[u8]) {
        let id = header.session;
        let mut text = match self.exec.take() {
            Some((begun, text)) if begun == id => text,
            Some(_) => return self.refuse("it mixed two EXECs"),
            None => Vec::new(),
        };
        if text.len() + payload.len() > EXEC_MAX {
            return self.refuse("its EXEC is too long");
        }
        text.extend_from_slice(payload);
        if header.flags & MORE != 0 {
            self.exec = Some((id, text));
            return;
        }
        if id == 0 || self.sessions.find(id).is_some() {
            return self.refuse("its EXEC has the id of another");
        }
        match serde_json::from_slice::<Exec>(&text) {
            Ok(exec) => self.sessions.start(id, &exec, &mut self.outbox),
            Err(error) => {
                let failed = ExecFailed {
                    what: "request",
                    errno: libc::EINVAL,
                    message: error.to_string(),
                };
                self.outbox.push(kind::EXEC_FAILED, id, &to_json(&failed));
            }
        }
    }

    fn freeze(&mut self, payload: &[u8]) {
        let Ok(request) = serde_json::from_slice::<Request>(payload) else {
            return self.refuse("its FREEZE can't be read");
        };
        self.system
            .note("freezes file systems", request.operation.as_deref());
        let enabled = self.system.is_enabled();
        if let Some(answer) = self.freezer.freeze(request.id, enabled, Instant::now()) {
            self.outbox.push(kind::FROZEN, 0, &to_json(&answer));
        }
    }

    fn thaw(&mut self, payload: &[u8]) {
        let Ok(request) = serde_json::from_slice::<Request>(payload) else {
            return self.refuse("its THAW can't be read");
        };
        let answer = self.freezer.thaw(request.id);
        self.system
            .note("thawed file systems", request.operation.as_deref());
        self.outbox.push(kind::THAWED, 0, &to_json(&answer));
    }
}
