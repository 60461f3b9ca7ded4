//! Frames: up to 16 pages stored together, compressed where that saves at least one eighth.

use crate::build::FrameEntry;
use crate::error::{FormatError, Result};
use crate::page::{digest16, PAGE_SIZE};

/// Pages of a full frame.
pub const FRAME_PAGES: usize = 16;
/// Bytes of a full frame's pages.
pub const FRAME_BYTES: usize = FRAME_PAGES * PAGE_SIZE;

/// Cheap enough to run behind every pause; higher levels gain little on memory.
const LEVEL: i32 = 1;

/// A frame as a build stores it.
pub struct EncodedFrame {
    /// The stored bytes.
    pub bytes: Vec<u8>,
    /// Pages in it, 1 to 16.
    pub pages: usize,
    /// Whether the bytes are zstd's.
    pub compressed: bool,
    /// The first 16 bytes of the BLAKE3 of the stored bytes.
    pub digest: [u8; 16],
}

/// Compresses frames, one thread's.
pub struct Encoder(zstd::bulk::Compressor<'static>);

impl Encoder {
    /// A compressor of the level that builds use.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new() -> Result<Self> {
        Ok(Self(zstd::bulk::Compressor::new(LEVEL)?))
    }

    /// Makes the frame of 1 to 16 pages.
    ///
    /// # Errors
    /// The compressor failed.
    ///
    /// # Panics
    /// When `raw` is not 1 to 16 whole pages.
    pub fn encode(&mut self, raw: &[u8]) -> Result<EncodedFrame> {
        assert!(!raw.is_empty() && raw.len() <= FRAME_BYTES && raw.len() % PAGE_SIZE == 0);
        let mut bytes = self.0.compress(raw)?;
        let compressed = bytes.len() <= raw.len() - raw.len() / 8;
        if !compressed {
            bytes.clear();
            bytes.extend_from_slice(raw);
        }
        bytes.shrink_to_fit();
        let digest = digest16(&bytes);
        Ok(EncodedFrame {
            bytes,
            pages: raw.len() / PAGE_SIZE,
            compressed,
            digest,
        })
    }
}

/// Decompresses frames, one thread's.
pub struct Decoder(zstd::bulk::Decompressor<'static>);

impl Decoder {
    /// A decompressor.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new() -> Result<Self> {
        Ok(Self(zstd::bulk::Decompressor::new()?))
    }

    /// Verifies the stored bytes of frame `number` and writes its pages to `into`, which has their
    /// length.
    ///
    /// # Errors
    /// Bad frame digest; a length that is not that of the pages.
    pub fn decode(
        &mut self,
        number: u64,
        entry: &FrameEntry,
        stored: &[u8],
        into: &mut [u8],
    ) -> Result<()> {
        if stored.len() != entry.length as usize || digest16(stored) != entry.digest {
            return Err(FormatError::BadFrame { frame: number });
        }
        let wrong = FormatError::BadFrameLength {
            frame: number,
            expected: into.len(),
        };
        if entry.compressed {
            return match self.0.decompress_to_buffer(stored, into) {
                Ok(length) if length == into.len() => Ok(()),
                _ => Err(wrong),
            };
        }
        if stored.len() != into.len() {
            return Err(wrong);
        }
        into.copy_from_slice(stored);
        Ok(())
    }
}
