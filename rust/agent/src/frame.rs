//! Frames: a fixed header, a payload, one checksum; and the decoder that finds them in a stream.
//!
//! Invariants: nothing is allocated for a length before it was checked; the decoder never holds
//! more than two frames; a damaged frame is dropped whole, never searched for frames inside it, so
//! bytes that a client sends as data can't be taken for a frame. A frame that must begin a
//! connection is only believed behind [`FRAME_MAX`] zero bytes, which no sequence of frames and no
//! payload contains.

/// What every frame begins with; its last byte is the format's version.
pub const MAGIC: [u8; 4] = *b"DPA\x01";
/// Bytes of header before the payload.
pub const HEADER_LEN: usize = 36;
/// The largest frame, header included: what a virtio-serial port takes in one write.
pub const FRAME_MAX: usize = 32 * 1024;
/// The largest payload.
pub const PAYLOAD_MAX: usize = FRAME_MAX - HEADER_LEN;
/// Flag: the message goes on in the next frame.
pub const MORE: u8 = 1;

const CRC_AT: usize = HEADER_LEN - 4;

/// What a frame is about. Unknown kinds are carried as numbers and ignored by their receiver.
pub mod kind {
    /// Host: here I am; set the clock, mix this entropy, say who you are.
    pub const HELLO: u8 = 1;
    /// Agent: the answer to HELLO.
    pub const WELCOME: u8 = 2;
    /// Agent: I have no connection to speak in; send a HELLO.
    pub const ANNOUNCE: u8 = 3;
    /// Both: nothing but the acknowledgement in the header.
    pub const ACK: u8 = 4;
    /// Host: are you there?
    pub const PING: u8 = 5;
    /// Agent: the payload of PING back.
    pub const PONG: u8 = 6;
    /// Agent: the host broke the protocol.
    pub const ERROR: u8 = 7;
    /// Host: run a command.
    pub const EXEC: u8 = 16;
    /// Host: bytes for the command's standard input.
    pub const STDIN: u8 = 17;
    /// Host: the end of its standard input.
    pub const STDIN_EOF: u8 = 18;
    /// Host: send its process group a signal.
    pub const SIGNAL: u8 = 19;
    /// Host: its terminal has a new size.
    pub const RESIZE: u8 = 20;
    /// Both: so many more bytes of one stream may be sent.
    pub const CREDIT: u8 = 21;
    /// Host: nobody listens to this session any more.
    pub const CLOSE: u8 = 22;
    /// Host: sync and freeze the file systems.
    pub const FREEZE: u8 = 23;
    /// Host: thaw them.
    pub const THAW: u8 = 24;
    /// Agent: the command runs.
    pub const STARTED: u8 = 32;
    /// Agent: bytes from standard output, or from the terminal.
    pub const STDOUT: u8 = 33;
    /// Agent: bytes from standard error.
    pub const STDERR: u8 = 34;
    /// Agent: the command ended; nothing of the session comes after it.
    pub const EXIT: u8 = 35;
    /// Agent: the command never ran; nothing of the session comes after it.
    pub const EXEC_FAILED: u8 = 36;
    /// Agent: the command closed its standard input.
    pub const STDIN_CLOSED: u8 = 37;
    /// Agent: the answer to CLOSE; nothing of the session comes after it.
    pub const CLOSED: u8 = 38;
    /// Agent: the answer to FREEZE.
    pub const FROZEN: u8 = 39;
    /// Agent: the answer to THAW.
    pub const THAWED: u8 = 40;
}

/// The header of a frame, without its length and checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// One of [`kind`].
    pub kind: u8,
    /// [`MORE`] or nothing.
    pub flags: u8,
    /// The session it belongs to; 0 is the link itself.
    pub session: u32,
    /// Its number in its direction of the link; 0 for a frame that is not retransmitted.
    pub seq: u64,
    /// The highest number that its sender has received and will not ask for again.
    pub ack: u64,
}

/// Writes the header into the first [`HEADER_LEN`] bytes of `frame`; the rest is the payload.
pub fn stamp(frame: &mut [u8], header: &Header) {
    let payload_len = frame.len() - HEADER_LEN;
    debug_assert!(payload_len <= PAYLOAD_MAX);
    frame[..4].copy_from_slice(&MAGIC);
    frame[4] = header.kind;
    frame[5] = header.flags;
    frame[6..8].fill(0);
    frame[8..12].copy_from_slice(&(payload_len as u32).to_le_bytes());
    frame[12..16].copy_from_slice(&header.session.to_le_bytes());
    frame[16..24].copy_from_slice(&header.seq.to_le_bytes());
    frame[24..32].copy_from_slice(&header.ack.to_le_bytes());
    let crc = checksum(frame);
    frame[CRC_AT..HEADER_LEN].copy_from_slice(&crc.to_le_bytes());
}

/// A whole frame of its own.
pub fn encode(header: &Header, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN + payload.len()];
    frame[HEADER_LEN..].copy_from_slice(payload);
    stamp(&mut frame, header);
    frame
}

fn checksum(frame: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&frame[..CRC_AT]);
    hasher.update(&frame[HEADER_LEN..]);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// What the decoder found.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A frame whose checksum is right.
    Frame {
        /// Its header.
        header: Header,
        /// Its payload.
        payload: &'a [u8],
        /// Whether it came behind a whole preamble of zero bytes.
        opens: bool,
    },
    /// Bytes that are not a frame; they are gone.
    Broken,
}

/// Finds frames in a stream of bytes, in a buffer of two frames.
pub struct Decoder {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    zeros: usize, // how many zero bytes came right before `start`
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            buffer: vec![0; 2 * FRAME_MAX].into_boxed_slice(),
            start: 0,
            end: 0,
            zeros: 0,
        }
    }
}

impl Decoder {
    /// Where the next bytes of the stream go; never empty once [`Decoder::next`] gave nothing.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.buffer.len() - self.end < FRAME_MAX / 2 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buffer[self.end..]
    }

    /// Says that `count` bytes were put into the space.
    pub fn fill(&mut self, count: usize) {
        self.end += count;
        debug_assert!(self.end <= self.buffer.len());
    }

    /// Forgets everything, as for a new connection.
    pub fn clear(&mut self) {
        self.start = 0;
        self.end = 0;
        self.zeros = 0;
    }

    /// The next frame or break, or nothing until more bytes come.
    #[allow(clippy::should_implement_trait)] // it lends from itself, which Iterator can't
    pub fn next(&mut self) -> Option<Event<'_>> {
        self.skip_zeros();
        let bytes = &self.buffer[self.start..self.end];
        if bytes.is_empty() {
            return None;
        }
        if bytes[0] != MAGIC[0] {
            let junk = bytes
                .iter()
                .position(|byte| *byte == 0 || *byte == MAGIC[0]);
            return Some(self.broken(junk.unwrap_or(bytes.len()), 0));
        }
        if bytes.len() < HEADER_LEN {
            return None;
        }
        let payload_len = u32_at(bytes, 8) as usize;
        if bytes[..4] != MAGIC || bytes[6..8] != [0, 0] || payload_len > PAYLOAD_MAX {
            return Some(self.broken(1, 0));
        }
        let total = HEADER_LEN + payload_len;
        if bytes.len() < total {
            return None;
        }
        if checksum(&bytes[..total]) != u32_at(bytes, CRC_AT) {
            let zeros = bytes[..total]
                .iter()
                .rev()
                .take_while(|byte| **byte == 0)
                .count();
            return Some(self.broken(total, zeros));
        }
        Some(self.take(total))
    }

    fn take(&mut self, total: usize) -> Event<'_> {
        let frame = &self.buffer[self.start..self.start + total];
        let opens = self.zeros >= FRAME_MAX;
        self.start += total;
        self.zeros = 0;
        let header = Header {
            kind: frame[4],
            flags: frame[5],
            session: u32_at(frame, 12),
            seq: u64_at(frame, 16),
            ack: u64_at(frame, 24),
        };
        Event::Frame {
            header,
            payload: &frame[HEADER_LEN..],
            opens,
        }
    }

    fn skip_zeros(&mut self) {
        let bytes = &self.buffer[self.start..self.end];
        let zeros = bytes
            .iter()
            .position(|byte| *byte != 0)
            .unwrap_or(bytes.len());
        self.start += zeros;
        self.zeros = self.zeros.saturating_add(zeros);
    }

    fn broken(&mut self, skipped: usize, zeros: usize) -> Event<'static> {
        self.start += skipped;
        self.zeros = zeros;
        Event::Broken
    }
}

/// Feeds a whole stream to a decoder in pieces of `piece` bytes; what the fuzz target and its
/// replay run.
pub fn decode_all(
    stream: &[u8],
    piece: usize,
    mut each: impl FnMut(Option<(Header, &[u8], bool)>),
) {
    let mut decoder = Decoder::default();
    for chunk in stream.chunks(piece.clamp(1, 4096)) {
        let mut rest = chunk;
        while !rest.is_empty() {
            let space = decoder.space();
            let count = rest.len().min(space.len());
            assert!(count > 0, "the decoder is stuck");
            space[..count].copy_from_slice(&rest[..count]);
            decoder.fill(count);
            rest = &rest[count..];
            while let Some(event) = decoder.next() {
                match event {
                    Event::Frame {
                        header,
                        payload,
                        opens,
                    } => each(Some((header, payload, opens))),
                    Event::Broken => each(None),
                }
            }
        }
    }
}
