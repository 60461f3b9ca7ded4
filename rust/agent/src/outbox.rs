//! What the agent has to send: numbered frames until they are acknowledged, and urgent ones.
//!
//! Invariants: numbered frames leave in order, without a gap, and stay until acknowledged; data is
//! only queued while [`Outbox::has_room`], so at most [`WINDOW`] bytes of it plus one frame per
//! stream wait here; a frame's header is written when it leaves, so its acknowledgement is fresh.

use std::collections::VecDeque;
use std::io;

use crate::frame::{encode, stamp, Header, FRAME_MAX, HEADER_LEN};

/// Unacknowledged bytes above which no more data is read from commands.
pub const WINDOW: usize = 1 << 20;
/// Unacknowledged bytes above which the host is not a Diapause host, which acknowledges.
pub const HARD_LIMIT: usize = 8 << 20;

const FRAME_OVERHEAD: usize = 96; // what a queued frame costs beside its bytes
const URGENT_MAX: usize = 16;
const SPARE_MAX: usize = 4;

struct Queued {
    bytes: Vec<u8>, // room for the header, then the payload
    header: Header,
}

enum Current {
    Nothing,
    Urgent,
    Numbered,
}

/// Frames on their way to the host.
pub struct Outbox {
    queue: VecDeque<Queued>,
    urgent: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    next: usize, // index in `queue` of the first frame that is not sent yet
    current: Current,
    written: usize, // bytes of the current frame that have left
    last_seq: u64,
    queued_bytes: usize,
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            urgent: VecDeque::new(),
            spare: Vec::new(),
            next: 0,
            current: Current::Nothing,
            written: 0,
            last_seq: 0,
            queued_bytes: 0,
        }
    }
}

impl Outbox {
    /// Whether data may be queued.
    pub fn has_room(&self) -> bool {
        self.queued_bytes < WINDOW
    }

    /// Whether the host leaves so much unacknowledged that it can't be trusted.
    pub fn is_over_limit(&self) -> bool {
        self.queued_bytes > HARD_LIMIT
    }

    /// Whether something is left to send.
    pub fn is_pending(&self) -> bool {
        !matches!(self.current, Current::Nothing)
            || !self.urgent.is_empty()
            || self.next < self.queue.len()
    }

    /// Whether something urgent is left to send.
    pub fn is_urgent(&self) -> bool {
        !self.urgent.is_empty()
    }

    /// A buffer of one frame's size, to read a payload into behind [`HEADER_LEN`] bytes.
    pub fn buffer(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_else(|| vec![0; FRAME_MAX])
    }

    /// Gives a buffer back that was not needed.
    pub fn give_back(&mut self, buffer: Vec<u8>) {
        if buffer.len() == FRAME_MAX && self.spare.len() < SPARE_MAX {
            self.spare.push(buffer);
        }
    }

    /// Queues a buffer with `count` bytes of payload.
    pub fn push_buffer(&mut self, kind: u8, session: u32, mut buffer: Vec<u8>, count: usize) {
        let used = HEADER_LEN + count;
        if used < FRAME_MAX / 2 {
            // A small frame must not hold a large buffer until it is acknowledged.
            let bytes = buffer[..used].to_vec();
            self.give_back(buffer);
            buffer = bytes;
        } else {
            buffer.truncate(used);
        }
        self.last_seq += 1;
        self.queued_bytes += buffer.len() + FRAME_OVERHEAD;
        let header = Header {
            kind,
            session,
            seq: self.last_seq,
            ..Header::default()
        };
        self.queue.push_back(Queued {
            bytes: buffer,
            header,
        });
    }

    /// Queues a numbered frame.
    pub fn push(&mut self, kind: u8, session: u32, payload: &[u8]) {
        let mut bytes = vec![0; HEADER_LEN + payload.len()];
        bytes[HEADER_LEN..].copy_from_slice(payload);
        self.push_buffer(kind, session, bytes, payload.len());
    }

    /// Queues a frame without a number, before the numbered ones; dropped if too many wait.
    pub fn push_urgent(&mut self, kind: u8, payload: &[u8], ack: u64) {
        if self.urgent.len() < URGENT_MAX {
            let header = Header {
                kind,
                ack,
                ..Header::default()
            };
            self.urgent.push_back(encode(&header, payload));
        }
    }

    /// Queues zero bytes that flush whatever half frame the host is reading.
    pub fn push_preamble(&mut self) {
        self.urgent.push_back(vec![0; FRAME_MAX]);
    }

    /// Forgets what the host says it has; false if it can't have it.
    pub fn acknowledge(&mut self, ack: u64) -> bool {
        let first = self.first_seq();
        if ack < first {
            return true;
        }
        if ack > self.last_seq {
            return false;
        }
        let count = ack - first + 1;
        let sending = usize::from(matches!(self.current, Current::Numbered));
        if count > (self.next - sending) as u64 {
            return false;
        }
        self.drop_front(count as usize);
        true
    }

    /// Starts again behind `received`, for a new connection of the same link; false if that frame
    /// was never sent.
    pub fn rewind(&mut self, received: u64) -> bool {
        let first = self.first_seq();
        if received > self.last_seq || received + 1 < first {
            return false;
        }
        self.abandon();
        self.drop_front((received + 1 - first) as usize);
        self.next = 0;
        true
    }

    /// Forgets everything, for a new link.
    pub fn reset(&mut self) {
        *self = Self {
            spare: std::mem::take(&mut self.spare),
            ..Self::default()
        };
    }

    /// Forgets the frame that is half sent and all urgent ones: the connection is gone.
    pub fn abandon(&mut self) {
        self.urgent.clear();
        self.current = Current::Nothing;
        self.written = 0;
    }

    fn first_seq(&self) -> u64 {
        self.last_seq + 1 - self.queue.len() as u64
    }

    fn drop_front(&mut self, count: usize) {
        for queued in self.queue.drain(..count) {
            self.queued_bytes -= queued.bytes.len() + FRAME_OVERHEAD;
            let mut buffer = queued.bytes;
            if buffer.capacity() >= FRAME_MAX && self.spare.len() < SPARE_MAX {
                buffer.resize(FRAME_MAX, 0);
                self.spare.push(buffer);
            }
        }
        self.next = self.next.saturating_sub(count);
    }

    /// As [`Outbox::flush`], but for urgent frames only: the host does not listen to others now.
    pub fn flush_urgent(
        &mut self,
        write: impl FnMut(&[u8]) -> io::Result<usize>,
    ) -> io::Result<bool> {
        let next = std::mem::replace(&mut self.next, self.queue.len());
        let outcome = self.flush(0, write);
        self.next = next;
        outcome
    }

    /// Writes until nothing is left or `write` would block; `ack` goes into each frame. Returns
    /// whether a frame began to leave.
    pub fn flush(
        &mut self,
        ack: u64,
        mut write: impl FnMut(&[u8]) -> io::Result<usize>,
    ) -> io::Result<bool> {
        let mut sent = false;
        loop {
            if matches!(self.current, Current::Nothing) {
                if !self.begin(ack) {
                    return Ok(sent);
                }
                sent = true;
            }
            let bytes = match self.current {
                Current::Urgent => &self.urgent[0],
                _ => &self.queue[self.next - 1].bytes,
            };
            let count = match write(&bytes[self.written..]) {
                Ok(0) => return Ok(sent),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(sent),
                Err(error) => return Err(error),
            };
            self.written += count;
            if self.written == bytes.len() {
                self.finish();
            }
        }
    }

    fn begin(&mut self, ack: u64) -> bool {
        if !self.urgent.is_empty() {
            self.current = Current::Urgent;
        } else if let Some(queued) = self.queue.get_mut(self.next) {
            queued.header.ack = ack;
            stamp(&mut queued.bytes, &queued.header);
            self.next += 1;
            self.current = Current::Numbered;
        } else {
            return false;
        }
        true
    }

    fn finish(&mut self) {
        if matches!(self.current, Current::Urgent) {
            self.urgent.pop_front();
        }
        self.current = Current::Nothing;
        self.written = 0;
    }
}
