//! One link: which host's connections belong together, and what has come in on them.
//!
//! Invariants: numbered frames are taken once each, in order; nothing but a HELLO behind a whole
//! preamble makes the link listen again after it has lost its place in the stream.

use crate::frame::{kind, Header};
use crate::message::Hello;
use crate::outbox::Outbox;

/// Received bytes after which an acknowledgement is sent at once.
pub const ACK_STEP: usize = 128 << 10;

/// What to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Act on it.
    Take,
    /// It is old news.
    Drop,
    /// The host is not where it should be in the stream.
    Lost,
}

/// The receiving half of the link, and its name.
#[derive(Default)]
pub struct Link {
    id: Option<String>,
    /// How often a link began.
    pub epoch: u64,
    /// The highest number received.
    pub received: u64,
    /// Whether a HELLO was answered on this connection.
    pub listening: bool,
    unacknowledged: usize,
}

impl Link {
    /// Takes a HELLO: true if the link goes on where it was, false if a new one begins.
    pub fn greet(&mut self, hello: &Hello, outbox: &mut Outbox) -> bool {
        self.listening = true;
        self.unacknowledged = 0;
        if self.id.as_ref() == Some(&hello.link_id) && outbox.rewind(hello.received) {
            return true;
        }
        self.id = Some(hello.link_id.clone());
        self.epoch += 1;
        self.received = 0;
        outbox.reset();
        false
    }

    /// Counts a frame that is not a HELLO.
    pub fn accept(&mut self, header: &Header, payload_len: usize, outbox: &mut Outbox) -> Verdict {
        if !self.listening {
            return Verdict::Drop;
        }
        if !outbox.acknowledge(header.ack) {
            return Verdict::Lost;
        }
        if header.seq == 0 {
            return if header.kind <= kind::ERROR {
                Verdict::Take
            } else {
                Verdict::Lost
            };
        }
        if header.kind <= kind::ERROR || header.seq > self.received + 1 {
            return Verdict::Lost;
        }
        if header.seq <= self.received {
            return Verdict::Drop;
        }
        self.received = header.seq;
        self.unacknowledged += payload_len + crate::frame::HEADER_LEN;
        Verdict::Take
    }

    /// The connection is gone, or its place in the stream.
    pub fn lose(&mut self, outbox: &mut Outbox) {
        self.listening = false;
        outbox.abandon();
    }

    /// Whether the host should hear soon what has come in.
    pub fn owes_ack(&self) -> bool {
        self.listening && self.unacknowledged > 0
    }

    /// Whether it should hear at once.
    pub fn owes_ack_now(&self) -> bool {
        self.listening && self.unacknowledged >= ACK_STEP
    }

    /// An acknowledgement has left, in whatever frame.
    pub fn acknowledged(&mut self) {
        self.unacknowledged = 0;
    }
}
