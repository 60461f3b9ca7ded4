//! The capture file, and the capture buffer, which has the same layout.
//!
//! ```text
//! 0         head, 4096 bytes
//!            0  magic "DIAPCAP\0"        40  capacity C u64 (pages that the layout is for)
//!            8  version u32 = 1          48  sums offset u64
//!           12  flags u32                56  pages offset u64
//!           16  device pages u64         64  BLAKE3 of the list (N entries)
//!           24  captured pages N u64     96  BLAKE3 of the sums, zero without them
//!           32  list offset u64 = 4096  4092 crc32 of the 4092 bytes before
//! 4096      list: C x u64, the device page of each captured page, ascending
//! aligned   sums: C x 16 bytes, truncated BLAKE3 of each page; not written without SUMS
//! aligned   pages: C x 4096 bytes, in the order of the list
//! ```
//!
//! A file has C = N. A buffer has the capacity it was made with: its first min(N, C) entries and
//! pages lie in it, the others in the capture file, where the layout for N puts them. Offsets
//! follow from C alone. The head is written last: without SEALED the rest means nothing.

use crate::bytes::{array_at, put, put_u32, put_u64, u32_at, u64_at};
use crate::error::{at_most, exactly, FormatError, Result};
use crate::header::PAGES_MAX;
use crate::page::{Digest, PAGE_SIZE};

/// Bytes of the head: one page.
pub const CAPTURE_HEAD_LEN: usize = PAGE_SIZE;
/// Bytes of a page's sum.
pub const SUM_LEN: usize = 16;

const MAGIC: &[u8; 8] = b"DIAPCAP\0";
const VERSION: u32 = 1;
const SEALED: u32 = 1;
const SUMS: u32 = 2;
const CRC_AT: usize = CAPTURE_HEAD_LEN - 4;
const FIELDS_END: usize = 128;
const PART: &str = "capture head";

/// Where the parts of a capture of so many pages lie, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CaptureLayout {
    /// Pages that there is room for.
    pub capacity: u64,
    /// Start of the list of u64 page indices.
    pub list_offset: u64,
    /// Start of the sums, 16 bytes each.
    pub sums_offset: u64,
    /// Start of the pages; a multiple of the page.
    pub pages_offset: u64,
    /// Size of the whole.
    pub size_bytes: u64,
}

impl CaptureLayout {
    /// The layout for `capacity` pages, at most 2^32.
    ///
    /// # Panics
    /// When there are more: whoever asks has checked it.
    pub fn for_pages(capacity: u64) -> Self {
        assert!(capacity <= PAGES_MAX, "{capacity} pages");
        let page = PAGE_SIZE as u64;
        let list_offset = CAPTURE_HEAD_LEN as u64;
        let sums_offset = (list_offset + 8 * capacity).next_multiple_of(page);
        let pages_offset = (sums_offset + SUM_LEN as u64 * capacity).next_multiple_of(page);
        let size_bytes = pages_offset + page * capacity;
        Self {
            capacity,
            list_offset,
            sums_offset,
            pages_offset,
            size_bytes,
        }
    }

    /// The largest capacity whose layout fits `size_bytes`; None where not even the head does.
    pub fn fitting(size_bytes: u64) -> Option<Self> {
        let page = PAGE_SIZE as u64;
        let mut capacity = (size_bytes.checked_sub(page)? / (page + 24)).min(PAGES_MAX);
        while capacity > 0 && Self::for_pages(capacity).size_bytes > size_bytes {
            capacity -= 1;
        }
        Some(Self::for_pages(capacity))
    }

    /// Where entry `position` of the list lies.
    pub fn list_entry(&self, position: u64) -> u64 {
        debug_assert!(position <= self.capacity);
        self.list_offset + 8 * position
    }

    /// Where the sum of page `position` lies.
    pub fn sum(&self, position: u64) -> u64 {
        debug_assert!(position <= self.capacity);
        self.sums_offset + SUM_LEN as u64 * position
    }

    /// Where page `position` lies.
    pub fn page(&self, position: u64) -> u64 {
        debug_assert!(position <= self.capacity);
        self.pages_offset + PAGE_SIZE as u64 * position
    }
}

/// The head of a capture file or buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureHead {
    /// Everything that the head speaks of is there.
    pub sealed: bool,
    /// Pages of the device.
    pub device_pages: u64,
    /// Pages captured, N.
    pub captured: u64,
    /// Pages that this file's layout is for, C.
    pub capacity: u64,
    /// BLAKE3-256 of all N list entries, as little-endian u64.
    pub list_digest: Digest,
    /// BLAKE3-256 of all N sums; None where there are none (a buffer).
    pub sums_digest: Option<Digest>,
}

impl CaptureHead {
    /// The layout of the file that this is the head of.
    pub fn layout(&self) -> CaptureLayout {
        CaptureLayout::for_pages(self.capacity)
    }

    /// How many of the captured pages lie in this file; the others spilled.
    pub fn resident(&self) -> u64 {
        self.captured.min(self.capacity)
    }

    /// The head's bytes.
    pub fn encode(&self) -> [u8; CAPTURE_HEAD_LEN] {
        assert!(self.captured <= self.device_pages && self.device_pages <= PAGES_MAX);
        let layout = self.layout();
        let mut head = [0; CAPTURE_HEAD_LEN];
        let sums = if self.sums_digest.is_some() { SUMS } else { 0 };
        put(&mut head, 0, MAGIC);
        put_u32(&mut head, 8, VERSION);
        put_u32(&mut head, 12, if self.sealed { SEALED } else { 0 } | sums);
        put_u64(&mut head, 16, self.device_pages);
        put_u64(&mut head, 24, self.captured);
        put_u64(&mut head, 32, layout.list_offset);
        put_u64(&mut head, 40, self.capacity);
        put_u64(&mut head, 48, layout.sums_offset);
        put_u64(&mut head, 56, layout.pages_offset);
        put(&mut head, 64, &self.list_digest);
        put(&mut head, 96, &self.sums_digest.unwrap_or_default());
        let crc = crc32fast::hash(&head[..CRC_AT]);
        put_u32(&mut head, CRC_AT, crc);
        head
    }

    /// Reads a head; `file_bytes` is the size of the file it begins.
    ///
    /// # Errors
    /// Bad magic, unknown version, bad checksum, a value out of range, or a file shorter than the
    /// layout.
    pub fn decode(head: &[u8], file_bytes: u64) -> Result<Self> {
        if head.len() < CAPTURE_HEAD_LEN || file_bytes < CAPTURE_HEAD_LEN as u64 {
            return Err(FormatError::Truncated { part: PART });
        }
        let head = &head[..CAPTURE_HEAD_LEN];
        if &head[..8] != MAGIC {
            return Err(FormatError::BadMagic { part: PART });
        }
        if u32_at(head, 8) != VERSION {
            return Err(FormatError::UnknownVersion {
                part: PART,
                found: u32_at(head, 8),
            });
        }
        if crc32fast::hash(&head[..CRC_AT]) != u32_at(head, CRC_AT) {
            return Err(FormatError::BadChecksum { part: PART });
        }
        let decoded = Self::fields(head)?;
        if file_bytes < decoded.layout().size_bytes {
            return Err(FormatError::Truncated {
                part: "captured pages",
            });
        }
        Ok(decoded)
    }

    fn fields(head: &[u8]) -> Result<Self> {
        let flags = u32_at(head, 12);
        at_most("capture flags", flags.into(), (SEALED | SUMS).into())?;
        let device_pages = u64_at(head, 16);
        at_most("count of device pages", device_pages, PAGES_MAX)?;
        let captured = u64_at(head, 24);
        at_most("count of captured pages", captured, device_pages)?;
        let capacity = u64_at(head, 40);
        at_most("capacity in pages", capacity, PAGES_MAX)?;
        let layout = CaptureLayout::for_pages(capacity);
        exactly("offset of the list", u64_at(head, 32), layout.list_offset)?;
        exactly("offset of the sums", u64_at(head, 48), layout.sums_offset)?;
        exactly("offset of the pages", u64_at(head, 56), layout.pages_offset)?;
        let has_sums = flags & SUMS != 0;
        if head[FIELDS_END..CRC_AT]
            .iter()
            .chain(head[96..128].iter().filter(|_| !has_sums))
            .any(|b| *b != 0)
        {
            return Err(FormatError::NotCanonical {
                what: "unused bytes of the capture head are not zero",
            });
        }
        Ok(Self {
            sealed: flags & SEALED != 0,
            device_pages,
            captured,
            capacity,
            list_digest: array_at(head, 64),
            sums_digest: has_sums.then(|| array_at(head, 96)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> CaptureHead {
        CaptureHead {
            sealed: true,
            device_pages: 1000,
            captured: 3,
            capacity: 3,
            list_digest: [7; 32],
            sums_digest: Some([9; 32]),
        }
    }

    #[test]
    fn a_head_is_read_back() {
        for head in [
            sample(),
            CaptureHead {
                sums_digest: None,
                sealed: false,
                capacity: 90,
                ..sample()
            },
        ] {
            let bytes = head.encode();
            assert_eq!(
                CaptureHead::decode(&bytes, head.layout().size_bytes).unwrap(),
                head
            );
        }
    }

    #[test]
    fn any_flip_and_any_short_file_is_an_error() {
        let size = sample().layout().size_bytes;
        let bytes = sample().encode();
        for at in 0..bytes.len() {
            let mut wrong = bytes;
            wrong[at] ^= 1 << (at % 8);
            let error = CaptureHead::decode(&wrong, size).unwrap_err();
            match at {
                0..8 => assert!(matches!(error, FormatError::BadMagic { .. })),
                8..12 => assert!(matches!(error, FormatError::UnknownVersion { .. })),
                _ => assert!(matches!(error, FormatError::BadChecksum { .. })),
            }
        }
        assert!(matches!(
            CaptureHead::decode(&bytes[..4095], size),
            Err(FormatError::Truncated { .. })
        ));
        assert!(matches!(
            CaptureHead::decode(&bytes, size - 1),
            Err(FormatError::Truncated { .. })
        ));
    }

    #[test]
    fn impossible_counts_and_offsets_are_refused_with_a_right_checksum() {
        let fields = [
            (12, 4),
            (16, u64::MAX),
            (24, 1001),
            (32, 0),
            (40, 1 << 40),
            (48, 1),
            (56, 1),
        ];
        for (at, value) in fields {
            let mut wrong = sample().encode();
            if at == 12 {
                put_u32(&mut wrong, at, value as u32);
            } else {
                put_u64(&mut wrong, at, value);
            }
            let crc = crc32fast::hash(&wrong[..CRC_AT]);
            put_u32(&mut wrong, CRC_AT, crc);
            let error = CaptureHead::decode(&wrong, u64::MAX).unwrap_err();
            assert!(
                matches!(error, FormatError::OutOfRange { .. }),
                "{at}: {error}"
            );
        }
    }

    proptest! {
        #[test]
        fn layouts_do_not_overlap_and_fit(capacity in 0..PAGES_MAX, size in 4096u64..1 << 45) {
            let layout = CaptureLayout::for_pages(capacity);
            prop_assert!(layout.list_entry(capacity) <= layout.sums_offset);
            prop_assert!(layout.sum(capacity) <= layout.pages_offset);
            prop_assert_eq!(layout.pages_offset % PAGE_SIZE as u64, 0);
            prop_assert_eq!(layout.page(capacity), layout.size_bytes);
            let fitting = CaptureLayout::fitting(size).unwrap();
            prop_assert!(fitting.size_bytes <= size);
            if fitting.capacity < PAGES_MAX {
                prop_assert!(CaptureLayout::for_pages(fitting.capacity + 1).size_bytes > size);
            }
        }
    }
}
