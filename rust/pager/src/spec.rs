//! What a file of the pager stands for: written by the daemon, kept by the keeper.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::blobs::{BlobSource, Directory, HttpLimits, HttpSource, Layered};

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
    /// Where builds lie, by their digests.
    pub blobs: BlobsSpec,
    /// What the header maps to besides builds.
    #[serde(default)]
    pub captures: Vec<CaptureSpec>,
}

/// Where builds lie; the same spec is the same medium.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq, Hash)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum BlobsSpec {
    /// A directory of this host.
    Directory {
        /// Its path.
        path: PathBuf,
        /// Where else to look for a build that does not lie here.
        #[serde(default)]
        fallback: Option<Box<BlobsSpec>>,
    },
    /// Another host's directory, or object storage behind a gateway.
    Http {
        /// What the names of builds are put behind.
        url: String,
        /// Where else to look for a build that can't be had there.
        #[serde(default)]
        fallback: Option<Box<BlobsSpec>>,
    },
}

impl BlobsSpec {
    /// Builds of a directory, and nowhere else.
    pub fn directory(path: impl Into<PathBuf>) -> Self {
        Self::Directory {
            path: path.into(),
            fallback: None,
        }
    }

    /// The medium; nothing is opened yet.
    ///
    /// # Errors
    /// What is wrong with the spec, in words.
    pub fn source(&self) -> Result<Arc<dyn BlobSource>, String> {
        let (first, fallback): (Arc<dyn BlobSource>, _) = match self {
            Self::Directory { path, fallback } => (Arc::new(Directory(path.clone())), fallback),
            Self::Http { url, fallback } => {
                let source = HttpSource::new(url, HttpLimits::default())?;
                (Arc::new(source), fallback)
            }
        };
        match fallback {
            Some(second) => Ok(Arc::new(Layered::new(first, second.source()?))),
            None => Ok(first),
        }
    }
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
