//! What must hold for any bytes; fuzzed by the targets, replayed over the corpora by an ordinary
//! test.

use std::io::Cursor;

use diapause_format::capture_file::{CaptureHead, CAPTURE_HEAD_LEN};
use diapause_format::{BuildTable, Decoder, HeaderReader, HeaderWriter, FOOTER_LEN};

/// Bytes that are read as a header to the end are exactly what a writer makes of its extents.
pub fn header(bytes: &[u8]) {
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
pub fn build(bytes: &[u8]) {
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
pub fn capture(bytes: &[u8]) {
    let Ok(head) = CaptureHead::decode(bytes, u64::MAX) else {
        return;
    };
    assert!(
        head.encode() == bytes[..CAPTURE_HEAD_LEN],
        "one head, one encoding"
    );
    assert!(head.resident() <= head.captured);
}
