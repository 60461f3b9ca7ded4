//! What must hold for any bytes; fuzzed by the targets, replayed over the corpora by an ordinary
//! test.
//!
//! Checksums and digests would stop a fuzzer at the door, so each check runs twice: on the bytes as
//! they are, and with every checksum put right.

use std::io::Cursor;

use diapause_format::capture_file::{CaptureHead, CAPTURE_HEAD_LEN};
use diapause_format::{BuildTable, Decoder, HeaderReader, HeaderWriter, FOOTER_LEN, HEAD_LEN};

/// Checks bytes as a header, also with right checksums.
pub fn header(bytes: &[u8]) {
    check_header(bytes);
    let mut right = bytes.to_vec();
    right_header(&mut right);
    check_header(&right);
}

/// Checks bytes as a build, also with the right id.
pub fn build(bytes: &[u8]) {
    check_build(bytes);
    let mut right = bytes.to_vec();
    right_build(&mut right);
    check_build(&right);
}

/// Checks bytes as the head of a capture, also with the right checksum.
pub fn capture(bytes: &[u8]) {
    check_capture(bytes);
    if bytes.len() >= CAPTURE_HEAD_LEN {
        let mut right = bytes.to_vec();
        let crc = crc32fast::hash(&right[..CAPTURE_HEAD_LEN - 4]);
        right[CAPTURE_HEAD_LEN - 4..CAPTURE_HEAD_LEN].copy_from_slice(&crc.to_le_bytes());
        check_capture(&right);
    }
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize
}

fn right_header(bytes: &mut [u8]) {
    if bytes.len() < 32 {
        return;
    }
    let crc = crc32fast::hash(&bytes[..28]);
    bytes[28..32].copy_from_slice(&crc.to_le_bytes());
    let mut at = 32;
    while at + 12 <= bytes.len() && u32_at(bytes, at + 4) <= bytes.len() - at - 12 {
        let end = at + 12 + u32_at(bytes, at + 4);
        if bytes[at] == 3 && end - at == 12 + 56 {
            let digest = *blake3::hash(&bytes[..at]).as_bytes();
            bytes[end - 32..end].copy_from_slice(&digest);
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(&bytes[at..at + 8]);
        crc.update(&bytes[at + 12..end]);
        bytes[at + 8..at + 12].copy_from_slice(&crc.finalize().to_le_bytes());
        at = end;
    }
}

fn right_build(bytes: &mut [u8]) {
    let Some(footer) = bytes
        .len()
        .checked_sub(FOOTER_LEN)
        .filter(|at| *at >= HEAD_LEN)
    else {
        return;
    };
    let table_bytes = u32_at(bytes, footer + 8).saturating_mul(32);
    if table_bytes <= footer - HEAD_LEN {
        let mut hash = blake3::Hasher::new();
        hash.update(&bytes[..HEAD_LEN])
            .update(&bytes[footer - table_bytes..footer]);
        bytes[footer + 24..footer + 56].copy_from_slice(hash.finalize().as_bytes());
    }
}

/// Bytes that are read as a header to the end are exactly what a writer makes of its extents.
fn check_header(bytes: &[u8]) {
    let Ok(mut reader) = HeaderReader::new(bytes, None) else {
        return;
    };
    let mut writer = HeaderWriter::new(Vec::new(), reader.page_count()).expect("checked");
    loop {
        match reader.next_extent() {
            Err(_) => return,
            Ok(None) => break,
            Ok(Some(extent)) => {
                writer
                    .push(extent, |number| *reader.build(number))
                    .expect("extents were checked");
            }
        }
    }
    let (written, again) = writer.finish().expect("extents cover the device");
    assert!(again == bytes, "one mapping, one encoding");
    assert_eq!(reader.finish().expect("it was read before"), written);
}

/// Bytes that are read as a build have the id that their footer says, and frames of the right size.
fn check_build(bytes: &[u8]) {
    let mut id = [0; 32];
    if let Some(footer) = bytes.len().checked_sub(FOOTER_LEN) {
        id.copy_from_slice(&bytes[footer + 24..footer + 56]);
    }
    let size_bytes = bytes.len() as u64;
    let Ok(table) = BuildTable::read(&mut Cursor::new(bytes), size_bytes, &id) else {
        return;
    };
    assert_eq!(*table.id(), id);
    let mut decoder = Decoder::new().expect("memory");
    for number in 0..table.frame_count() {
        let entry = table.frame(number);
        let stored = &bytes[entry.offset as usize..][..entry.length as usize];
        let mut pages = vec![0; table.frame_bytes(number)];
        // An error is right here; a panic is not.
        let _ = decoder.decode(number, entry, stored, &mut pages);
    }
}

/// A capture's head that is read is exactly what encoding it again makes.
fn check_capture(bytes: &[u8]) {
    let Ok(head) = CaptureHead::decode(bytes, u64::MAX) else {
        return;
    };
    assert!(
        head.encode() == bytes[..CAPTURE_HEAD_LEN],
        "one head, one encoding"
    );
    assert!(head.resident() <= head.captured);
}
