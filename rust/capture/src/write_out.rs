//! Finishes a capture file from the sealed buffer: list, sums, buffered pages, head, fsync.
//!
//! The buffer stays as it is, so a failure loses nothing and the work can be done again from the
//! start. One fsync is enough: the head's digests tell a torn file from a whole one, and nobody is
//! told of it before.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use diapause_format::capture_file::{CaptureHead, CaptureLayout, SUM_LEN};
use diapause_format::{digest16, PAGE_SIZE};

use crate::blob::sync_directory_of;
use crate::error::{Error, Result};
use crate::source::PageSource;
use crate::threads::for_each_part;

/// Pages copied and summed at once.
const CHUNK_PAGES: u64 = 2048;

/// Makes `out` the capture file of what `buffer` holds; `out` has what spilled, or does not exist.
///
/// # Errors
/// Missing, damaged (the buffer), storage. `out` stays.
pub fn write_out(buffer: &Path, out: &Path) -> Result<CaptureHead> {
    let (head, _) = crate::capture_source::read_head(buffer)?;
    let spilled = head.captured > head.resident();
    let source = PageSource::capture(buffer, spilled.then_some(out))?;
    let failed = |cause| {
        let size_bytes = CaptureLayout::for_pages(head.captured).size_bytes;
        Error::write_failed(out, size_bytes, cause)
    };
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600);
    let file = file.open(out).map_err(failed)?;
    let finished = write_parts(&source, &head, &file, failed)?;
    file.sync_data().map_err(failed)?;
    sync_directory_of(out)?;
    Ok(finished)
}

fn write_parts(
    source: &PageSource,
    head: &CaptureHead,
    file: &File,
    failed: impl Fn(std::io::Error) -> Error,
) -> Result<CaptureHead> {
    let layout = CaptureLayout::for_pages(head.captured);
    // A file of the right length exists before its parts: without pages the layout is still whole.
    file.set_len(layout.size_bytes).map_err(&failed)?;
    write_list(source, &layout, file).map_err(&failed)?;
    let mut sums_hash = blake3::Hasher::new();
    let mut pages = vec![0; (head.captured.min(CHUNK_PAGES) as usize) * PAGE_SIZE];
    let mut position = 0;
    while position < head.captured {
        let count = (head.captured - position).min(CHUNK_PAGES);
        let chunk = &mut pages[..count as usize * PAGE_SIZE];
        source.read(position, chunk)?;
        let sums = sum_pages(chunk);
        sums_hash.update(&sums);
        file.write_all_at(&sums, layout.sum(position))
            .map_err(&failed)?;
        // What lies beyond the buffer is there already.
        let buffered = head.resident().saturating_sub(position).min(count) as usize;
        let buffered = &chunk[..buffered * PAGE_SIZE];
        file.write_all_at(buffered, layout.page(position))
            .map_err(&failed)?;
        position += count;
    }
    let sums_digest = Some(*sums_hash.finalize().as_bytes());
    let finished = CaptureHead {
        capacity: head.captured,
        sums_digest,
        ..head.clone()
    };
    file.write_all_at(&finished.encode(), 0).map_err(&failed)?;
    Ok(finished)
}

fn write_list(source: &PageSource, layout: &CaptureLayout, file: &File) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    let mut offset = layout.list_offset;
    for page in source
        .runs()
        .iter()
        .flat_map(|run| run.page..run.page + run.pages)
    {
        bytes.extend_from_slice(&page.to_le_bytes());
        if bytes.len() == 1 << 20 {
            file.write_all_at(&bytes, offset)?;
            offset += bytes.len() as u64;
            bytes.clear();
        }
    }
    file.write_all_at(&bytes, offset)
}

/// The sums of a chunk's pages, on two threads where that pays.
fn sum_pages(pages: &[u8]) -> Vec<u8> {
    let count = pages.len() / PAGE_SIZE;
    let mut sums = vec![0; count * SUM_LEN];
    let threads = if count >= 256 { 2 } else { 1 };
    let share = count.div_ceil(threads).max(1);
    let parts = pages
        .chunks(share * PAGE_SIZE)
        .zip(sums.chunks_mut(share * SUM_LEN));
    for_each_part(parts, |(pages, sums)| {
        for (page, sum) in pages
            .chunks_exact(PAGE_SIZE)
            .zip(sums.chunks_exact_mut(SUM_LEN))
        {
            sum.copy_from_slice(&digest16(page));
        }
    });
    sums
}
