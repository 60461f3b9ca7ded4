//! Digests of a flat file, one for each chunk of it, so that it can be checked by itself.
//!
//! ```text
//! head, 32 bytes:  0 magic "DIAPSUM\0"   8 version u32 = 1   12 pages of a chunk u32 = 1024
//!                 16 device pages u64   24 zero u64
//! 32    one BLAKE3-256 for each chunk: of its pages that are not zero, one after the other, and
//!       then of the numbers of these pages in the chunk, u16 each
//! end   BLAKE3-256 of all bytes before
//! ```
//!
//! A digest does not depend on which zeros are holes, and holes cost nothing to make or to check.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use diapause_format::{is_zero, Digest, PAGES_MAX, PAGE_SIZE};

use crate::blob::NewFile;
use crate::error::{Error, Result};
use crate::source::data_segments;
use crate::threads::for_each_part;

const MAGIC: &[u8; 8] = b"DIAPSUM\0";
const VERSION: u32 = 1;
/// Pages of a chunk.
pub(crate) const CHUNK_PAGES: u64 = 1024;
/// Bytes of a chunk.
pub(crate) const CHUNK_BYTES: u64 = CHUNK_PAGES * PAGE_SIZE as u64;
const HEAD_LEN: usize = 32;
const DIGEST_LEN: usize = 32;

/// The verified digests of a flat file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatSums {
    page_count: u64,
    chunks: Vec<Digest>,
}

/// What a flat file was found to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatCheck {
    /// Bytes read: what is allocated.
    pub read_bytes: u64,
    /// First byte of each chunk that is not what its digest says.
    pub damaged: Vec<u64>,
}

impl FlatSums {
    /// Digests that are known already, one for each chunk of so many pages.
    pub(crate) fn new(page_count: u64, chunks: Vec<Digest>) -> Self {
        assert_eq!(chunks.len() as u64, page_count.div_ceil(CHUNK_PAGES));
        Self { page_count, chunks }
    }

    /// Pages of the device.
    pub(crate) fn page_count(&self) -> u64 {
        self.page_count
    }

    /// The digest of each chunk.
    pub(crate) fn chunks(&self) -> &[Digest] {
        &self.chunks
    }

    /// Computes the digests of the plain file at `path`. Returns them and the bytes read.
    ///
    /// # Errors
    /// Missing, damaged (unreadable), storage.
    pub fn of(path: &Path, threads: usize) -> Result<(Self, u64)> {
        let (chunks, read_bytes, size_bytes) = digests(path, threads)?;
        let page_count = size_bytes / PAGE_SIZE as u64;
        Ok((Self { page_count, chunks }, read_bytes))
    }

    /// Writes them to the new file `to`; it is gone when this fails.
    ///
    /// # Errors
    /// Storage.
    pub fn write(&self, to: &Path) -> Result<()> {
        let out = NewFile::create_for(to)?;
        let mut bytes = self.head().to_vec();
        bytes.extend(self.chunks.iter().flatten());
        bytes.extend(blake3::hash(&bytes).as_bytes());
        (&out)
            .write_all(&bytes)
            .map_err(|cause| out.write_failed(cause))?;
        out.publish(to)
    }

    /// Reads and verifies them.
    ///
    /// # Errors
    /// Missing, damaged, storage.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let failed = |cause| Error::read_failed(&name, path, cause);
        let damaged = |cause: &str| Error::Damaged {
            blob: name.clone(),
            cause: cause.to_owned(),
        };
        let mut file = File::open(path).map_err(failed)?;
        let size_bytes = file.metadata().map_err(failed)?.len();
        let bytes_max = HEAD_LEN as u64 + (PAGES_MAX / CHUNK_PAGES + 1) * DIGEST_LEN as u64;
        if size_bytes < (HEAD_LEN + DIGEST_LEN) as u64 || size_bytes > bytes_max {
            return Err(damaged("its size can't be"));
        }
        let mut bytes = vec![0; size_bytes as usize];
        file.read_exact(&mut bytes).map_err(failed)?;
        let (body, digest) = bytes.split_at(bytes.len() - DIGEST_LEN);
        if blake3::hash(body).as_bytes() != digest {
            return Err(damaged("bad digest"));
        }
        let mut pages = [0; 8];
        pages.copy_from_slice(&body[16..24]);
        let chunks = body[HEAD_LEN..].chunks(DIGEST_LEN);
        let sums = Self {
            page_count: u64::from_le_bytes(pages),
            chunks: chunks
                .map(|chunk| Digest::try_from(chunk).map_err(|_| damaged("its size can't be")))
                .collect::<Result<_>>()?,
        };
        let fits = sums.page_count <= PAGES_MAX
            && sums.chunks.len() as u64 == sums.page_count.div_ceil(CHUNK_PAGES);
        if body[..HEAD_LEN] != sums.head() || !fits {
            return Err(damaged("its head is not one of this version"));
        }
        Ok(sums)
    }

    /// Compares the plain file at `path` with them.
    ///
    /// # Errors
    /// Missing, damaged (unreadable, or of another size), storage.
    pub fn check(&self, path: &Path, threads: usize) -> Result<FlatCheck> {
        let (chunks, read_bytes, size_bytes) = digests(path, threads)?;
        if size_bytes != self.page_count * PAGE_SIZE as u64 {
            return Err(Error::Damaged {
                blob: path.display().to_string(),
                cause: format!("it has {size_bytes} bytes, not {} pages", self.page_count),
            });
        }
        let damaged = (0u64..)
            .zip(self.chunks.iter().zip(&chunks))
            .filter(|(_, (known, found))| known != found)
            .map(|(chunk, _)| chunk * CHUNK_BYTES)
            .collect();
        Ok(FlatCheck {
            read_bytes,
            damaged,
        })
    }

    fn head(&self) -> [u8; HEAD_LEN] {
        let mut head = [0; HEAD_LEN];
        head[..8].copy_from_slice(MAGIC);
        head[8..12].copy_from_slice(&VERSION.to_le_bytes());
        head[12..16].copy_from_slice(&(CHUNK_PAGES as u32).to_le_bytes());
        head[16..24].copy_from_slice(&self.page_count.to_le_bytes());
        head
    }
}

/// The digest of each chunk of a plain file, the bytes read, and its size.
fn digests(path: &Path, threads: usize) -> Result<(Vec<Digest>, u64, u64)> {
    let name = path.display().to_string();
    let failed = |cause| Error::read_failed(&name, path, cause);
    let file = File::open(path).map_err(failed)?;
    let size_bytes = file.metadata().map_err(failed)?.len();
    let segments = data_segments(&file, size_bytes).map_err(failed)?;
    let count = size_bytes.div_ceil(CHUNK_BYTES) as usize;
    let (next, read_bytes) = (AtomicUsize::new(0), AtomicU64::new(0));
    let work = |_| -> Result<Vec<(usize, Digest)>> {
        let mut scratch = Vec::with_capacity(CHUNK_BYTES as usize);
        let mut found = Vec::new();
        loop {
            let chunk = next.fetch_add(1, Ordering::Relaxed);
            if chunk >= count {
                return Ok(found);
            }
            let (digest, read) =
                chunk_digest(&file, &segments, chunk as u64, &mut scratch).map_err(failed)?;
            read_bytes.fetch_add(read, Ordering::Relaxed);
            found.push((chunk, digest));
        }
    };
    let mut chunks = vec![[0; 32]; count];
    for part in for_each_part(0..threads.clamp(1, count.max(1)), work) {
        for (chunk, digest) in part? {
            chunks[chunk] = digest;
        }
    }
    Ok((chunks, read_bytes.into_inner(), size_bytes))
}

/// Reads the data of a chunk, drops its zero pages, and digests what is left.
fn chunk_digest(
    file: &File,
    segments: &[(u64, u64)],
    chunk: u64,
    scratch: &mut Vec<u8>,
) -> std::io::Result<(Digest, u64)> {
    let (start, end) = (chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES);
    let first = segments.partition_point(|(_, to)| *to <= start);
    let (mut numbers, mut read_bytes) = (Vec::new(), 0);
    scratch.clear();
    for (from, to) in segments[first..].iter().take_while(|(from, _)| *from < end) {
        let (from, to) = ((*from).max(start), (*to).min(end));
        let at = scratch.len();
        scratch.resize(at + (to - from) as usize, 0);
        file.read_exact_at(&mut scratch[at..], from)?;
        read_bytes += to - from;
        let mut kept = at;
        for page in 0..(to - from) as usize / PAGE_SIZE {
            let place = at + page * PAGE_SIZE;
            if is_zero(&scratch[place..place + PAGE_SIZE]) {
                continue;
            }
            if kept < place {
                scratch.copy_within(place..place + PAGE_SIZE, kept);
            }
            kept += PAGE_SIZE;
            let number = (from - start) / PAGE_SIZE as u64 + page as u64;
            numbers.extend((number as u16).to_le_bytes());
        }
        scratch.truncate(kept);
    }
    Ok((digest_chunk(scratch, &numbers), read_bytes))
}

/// The digest of a chunk: of its pages that are not zero, and of their numbers, u16 each.
pub(crate) fn digest_chunk(pages: &[u8], numbers: &[u8]) -> Digest {
    let mut hash = blake3::Hasher::new();
    hash.update(pages).update(numbers);
    *hash.finalize().as_bytes()
}

/// The digest of a chunk that lies whole in memory, zero pages too.
pub(crate) fn digest_pages(pages: &[u8], scratch: &mut Vec<u8>) -> Digest {
    scratch.clear();
    let mut numbers = Vec::new();
    for (number, page) in (0u16..).zip(pages.chunks_exact(PAGE_SIZE)) {
        if !is_zero(page) {
            scratch.extend_from_slice(page);
            numbers.extend(number.to_le_bytes());
        }
    }
    digest_chunk(scratch, &numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn flat(directory: &Path) -> std::path::PathBuf {
        let path = directory.join("flat");
        let file = File::create(&path).unwrap();
        file.set_len(3 * CHUNK_BYTES + 5 * PAGE).unwrap();
        file.write_all_at(&[7; 8192], 3 * PAGE).unwrap();
        file.write_all_at(&[9; 4096], CHUNK_BYTES - PAGE).unwrap();
        file.write_all_at(&[5; 4096], 3 * CHUNK_BYTES + 4 * PAGE)
            .unwrap();
        path
    }

    #[test]
    fn a_turned_bit_is_found_in_its_chunk_and_zeros_may_be_holes() {
        let directory = tempfile::tempdir().unwrap();
        let path = flat(directory.path());
        let (sums, read) = FlatSums::of(&path, 3).unwrap();
        assert!((4 * PAGE..CHUNK_BYTES).contains(&read));
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[0; 65536], 2 * CHUNK_BYTES).unwrap();
        assert!(sums.check(&path, 1).unwrap().damaged.is_empty());
        file.write_all_at(&[4], 3 * CHUNK_BYTES + 4 * PAGE + 77)
            .unwrap();
        file.write_all_at(&[4], CHUNK_BYTES + 77).unwrap();
        let found = sums.check(&path, 2).unwrap().damaged;
        assert_eq!(found, [CHUNK_BYTES, 3 * CHUNK_BYTES]);
    }

    #[test]
    fn a_page_that_moved_within_its_chunk_is_another_content() {
        let directory = tempfile::tempdir().unwrap();
        let path = flat(directory.path());
        let (sums, _) = FlatSums::of(&path, 1).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[0; 4096], CHUNK_BYTES - PAGE).unwrap();
        file.write_all_at(&[9; 4096], CHUNK_BYTES - 2 * PAGE)
            .unwrap();
        assert_eq!(sums.check(&path, 1).unwrap().damaged, [0]);
        file.set_len(2 * CHUNK_BYTES).unwrap();
        assert!(matches!(sums.check(&path, 1), Err(Error::Damaged { .. })));
    }

    #[test]
    fn they_are_read_back_and_any_turned_byte_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (sums, _) = FlatSums::of(&flat(directory.path()), 2).unwrap();
        let place = directory.path().join("sums");
        sums.write(&place).unwrap();
        assert_eq!(FlatSums::read(&place).unwrap(), sums);
        let bytes = std::fs::read(&place).unwrap();
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 1;
            std::fs::write(&place, &other).unwrap();
            assert!(matches!(FlatSums::read(&place), Err(Error::Damaged { .. })));
        }
        std::fs::write(&place, &bytes[..40]).unwrap();
        assert!(matches!(FlatSums::read(&place), Err(Error::Damaged { .. })));
    }
}
