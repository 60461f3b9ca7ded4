//! The guest agent: runs commands, sets the clock and freezes file systems for a Diapause host.
//!
//! One thread, one poll loop, bounded memory. The host is reached over a byte stream that a pause,
//! a fork or a restart may cut at any byte; `docs/formats/agent-protocol.md` describes what goes
//! over it. Layers, lowest first: `frame` (bytes), `outbox` (numbers, acknowledgements,
//! retransmission), `message` (payloads), `spawn` and `session` (commands), `system` and
//! `filesystems` (effects on the guest), `engine` (the loop).
//! `copy` stands beside them: a command that the program is when it is started for one.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod channel;
pub mod copy;
pub mod engine;
pub mod filesystems;
pub mod frame;
pub mod link;
pub mod message;
pub mod options;
pub mod outbox;
pub mod session;
pub mod spawn;
pub mod streams;
pub mod system;
