//! What a file of the pager stands for: written by the daemon, kept by the keeper.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One device of one snapshot. Another spec of the same name stands for the same bytes.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct DeviceSpec {
    /// Its size, a whole number of pages.
    pub size_bytes: u64,
    /// The file of its header, packed or provisional.
    pub header: PathBuf,
    /// The header's digest, in digits.
    pub header_digest: String,
    /// The directory that builds lie in, by their digests.
    pub builds: PathBuf,
    /// What the header maps to besides builds.
    #[serde(default)]
    pub captures: Vec<CaptureSpec>,
}

/// A capture that is not packed yet.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct CaptureSpec {
    /// What the header calls it, in digits.
    pub id: String,
    /// Its file: a capture file or buffer, or an overlay.
    pub path: PathBuf,
    /// Where the pages are that a buffer had no room for.
    #[serde(default)]
    pub spill: Option<PathBuf>,
    /// For an overlay: the file with its map, as `qemu-img map --output=json` prints it.
    #[serde(default)]
    pub map: Option<PathBuf>,
}
