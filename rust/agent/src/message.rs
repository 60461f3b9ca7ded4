//! The payloads that are not raw bytes: JSON for what is rare, fixed fields for what is frequent.
//!
//! Invariants: unknown fields are ignored, so that an agent which slept in an old snapshot
//! understands a newer host; every length is bounded by the frame or by [`EXEC_MAX`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The version of the protocol that this agent speaks.
pub const PROTOCOL: u32 = 1;
/// The largest EXEC, over all its frames.
pub const EXEC_MAX: usize = 1 << 20;
/// How many bytes of a stream may be on their way before the receiver grants more.
pub const STREAM_WINDOW: u32 = 256 << 10;

/// HELLO.
#[derive(Clone, Debug, Deserialize)]
pub struct Hello {
    /// The version of the protocol that the host speaks.
    pub protocol: u32,
    /// Echoed in the answer.
    pub nonce: String,
    /// Which link this connection belongs to.
    pub link_id: String,
    /// The highest frame number that the host has received on it.
    pub received: u64,
    /// The host's clock.
    pub realtime_ns: i64,
    /// 64 random bytes, hex.
    pub entropy: String,
    /// What a clone is called from now on.
    #[serde(default)]
    pub identity: Option<Identity>,
    /// What the host does this for: the id that its log and its journal have.
    #[serde(default)]
    pub operation: Option<String>,
}

/// What makes a clone itself.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Identity {
    /// For sethostname and /etc/hostname.
    pub hostname: String,
    /// 32 hex digits, for /etc/machine-id.
    pub machine_id: String,
}

/// WELCOME.
#[derive(Clone, Debug, Serialize)]
pub struct Welcome {
    /// The version of the protocol that the agent speaks.
    pub protocol: u32,
    /// From the HELLO that this answers.
    pub nonce: String,
    /// The agent's version.
    pub version: String,
    /// The kernel's boot id.
    pub boot_id: String,
    /// Random, made when this agent process began.
    pub incarnation: String,
    /// How often this agent began a link.
    pub epoch: u64,
    /// Whether the link goes on where it was.
    pub resumed: bool,
    /// The highest frame number that the agent has received on it.
    pub received: u64,
    /// CLOCK_REALTIME after it was set.
    pub realtime_ns: i64,
    /// CLOCK_MONOTONIC.
    pub monotonic_ns: i64,
    /// The agent's process id.
    pub pid: u32,
    /// What could not be done, each with its cause.
    pub failed: Vec<String>,
}

/// ANNOUNCE.
#[derive(Clone, Debug, Serialize)]
pub struct Announce {
    /// As in WELCOME.
    pub incarnation: String,
}

/// ERROR.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// What the host did.
    pub cause: String,
}

/// EXEC.
#[derive(Clone, Debug, Deserialize)]
pub struct Exec {
    /// The command and its arguments.
    pub argv: Vec<String>,
    /// Its working directory; `/` unless said.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Added to the default environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Whether it runs on a terminal.
    #[serde(default)]
    pub tty: bool,
    /// The terminal's rows.
    #[serde(default)]
    pub rows: u16,
    /// The terminal's columns.
    #[serde(default)]
    pub cols: u16,
    /// Whether it has a standard input; /dev/null otherwise.
    #[serde(default)]
    pub stdin: bool,
}

/// STARTED.
#[derive(Clone, Debug, Serialize)]
pub struct Started {
    /// The command's process id in the guest.
    pub pid: i32,
}

/// EXIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Exit {
    /// The exit code; 128 + the signal for a command that a signal ended.
    pub code: u8,
    /// The signal, if one ended it.
    pub signal: Option<u8>,
}

/// EXEC_FAILED.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExecFailed {
    /// What failed: `command`, `directory`, `limit`, `request` or `system`.
    pub what: &'static str,
    /// The error number.
    pub errno: i32,
    /// The error in words.
    pub message: String,
}

/// SIGNAL.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Signal {
    /// The signal's number.
    pub number: i32,
}

/// RESIZE.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Resize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// FREEZE and THAW.
#[derive(Clone, Debug, Deserialize)]
pub struct Request {
    /// Echoed in the answer.
    pub id: u64,
    /// As in HELLO.
    #[serde(default)]
    pub operation: Option<String>,
}

/// FROZEN and THAWED.
#[derive(Clone, Debug, Serialize)]
pub struct Filesystems {
    /// From the request.
    pub id: u64,
    /// The mount points that are frozen now, or were thawed.
    pub mounts: Vec<String>,
    /// What could not be done, each with its cause.
    pub failed: Vec<String>,
}

/// The bytes of a JSON payload.
pub fn to_json(message: &impl Serialize) -> Vec<u8> {
    // Only a map with keys that aren't strings fails.
    serde_json::to_vec(message).unwrap_or_default()
}

/// The payload of CREDIT: a stream (0 input, 1 output, 2 error) and a number of bytes.
pub fn encode_credit(stream: u8, bytes: u32) -> [u8; 8] {
    let count = bytes.to_le_bytes();
    [stream, 0, 0, 0, count[0], count[1], count[2], count[3]]
}

/// Reads the payload of CREDIT.
pub fn decode_credit(payload: &[u8]) -> Option<(u8, u32)> {
    let fields: [u8; 8] = payload.try_into().ok()?;
    Some((
        fields[0],
        u32::from_le_bytes([fields[4], fields[5], fields[6], fields[7]]),
    ))
}

/// Reads hex digits into exactly `N` bytes.
pub fn decode_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = (pair[0] as char).to_digit(16)?;
        let low = (pair[1] as char).to_digit(16)?;
        *byte = (high * 16 + low) as u8;
    }
    Some(bytes)
}

/// Writes bytes as hex digits.
pub fn encode_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
