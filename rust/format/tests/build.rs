//! Builds: a frame is right or an error; so is the table, up to the id.
#![allow(clippy::unwrap_used)]

use std::io::Cursor;

use diapause_format::{
    BuildSummary, BuildTable, BuildWriter, Decoder, Encoder, FormatError, FOOTER_LEN, FRAME_BYTES,
    HEAD_LEN, PAGE_SIZE,
};
use proptest::prelude::*;

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut reader = blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof();
    reader.fill(&mut bytes);
    bytes
}

/// Pages that compress (a seed below 100) and pages that don't.
fn pages(seeds: &[u64]) -> Vec<u8> {
    seeds
        .iter()
        .flat_map(|seed| match seed {
            0..100 => [*seed as u8; PAGE_SIZE].to_vec(),
            _ => noise(*seed, PAGE_SIZE),
        })
        .collect()
}

fn write(pages: &[u8]) -> (BuildSummary, Vec<u8>) {
    let mut encoder = Encoder::new().unwrap();
    let mut writer = BuildWriter::new(Cursor::new(Vec::new())).unwrap();
    for raw in pages.chunks(FRAME_BYTES) {
        writer.push(&encoder.encode(raw).unwrap()).unwrap();
    }
    let (summary, file) = writer.finish().unwrap();
    (summary, file.into_inner())
}

fn read(bytes: &[u8], id: &[u8; 32]) -> Result<Vec<u8>, FormatError> {
    let table = BuildTable::read(&mut Cursor::new(bytes), bytes.len() as u64, id)?;
    let mut decoder = Decoder::new()?;
    let mut pages = Vec::new();
    for number in 0..table.frame_count() {
        let entry = table.frame(number);
        let stored = &bytes[entry.offset as usize..][..entry.length as usize];
        let at = pages.len();
        pages.resize(at + table.frame_bytes(number), 0);
        decoder.decode(number, entry, stored, &mut pages[at..])?;
    }
    Ok(pages)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_written_is_read(seeds in prop::collection::vec(0u64..200, 0..50)) {
        let pages = pages(&seeds);
        let (summary, bytes) = write(&pages);
        prop_assert_eq!(summary.size_bytes, bytes.len() as u64);
        prop_assert_eq!(summary.page_count, seeds.len() as u64);
        prop_assert_eq!(read(&bytes, &summary.id).unwrap(), pages);
    }

    #[test]
    fn noise_is_never_a_build_and_never_a_panic(
        noise in prop::collection::vec(any::<u8>(), 0..300), keep in 0usize..9000,
    ) {
        let (summary, bytes) = write(&pages(&[1, 2, 3]));
        let mut mixed = bytes[..keep.min(bytes.len())].to_vec();
        mixed.extend(&noise);
        prop_assert!(mixed == bytes || read(&mixed, &summary.id).is_err());
    }
}

#[test]
fn the_id_is_the_digest_of_head_and_table() {
    let (summary, bytes) = write(&pages(&[1; 40]));
    let table = bytes.len() - FOOTER_LEN - 3 * 32;
    let mut hash = blake3::Hasher::new();
    hash.update(&bytes[..HEAD_LEN])
        .update(&bytes[table..table + 3 * 32]);
    assert_eq!(summary.id, *hash.finalize().as_bytes());
}

#[test]
fn pages_that_do_not_compress_are_stored_as_they_are() {
    let (_, bytes) = write(&noise(7, FRAME_BYTES));
    assert_eq!(
        &bytes[HEAD_LEN..HEAD_LEN + FRAME_BYTES],
        &noise(7, FRAME_BYTES)[..]
    );
    let (_, bytes) = write(&[3; FRAME_BYTES]);
    assert!(bytes.len() < 300);
}

#[test]
fn any_flipped_bit_and_any_truncation_is_an_error() {
    let (summary, bytes) = write(&pages(&[1, 2, 3, 150]));
    for at in 0..bytes.len() {
        let mut wrong = bytes.clone();
        wrong[at] ^= 1 << (at % 8);
        assert!(read(&wrong, &summary.id).is_err(), "byte {at}");
        assert!(read(&bytes[..at], &summary.id).is_err(), "length {at}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(read(&longer, &summary.id).is_err());
}

#[test]
fn each_cause_has_its_own_error() {
    let (summary, bytes) = write(&pages(&[1, 2, 3]));
    let footer = bytes.len() - FOOTER_LEN;
    let flipped = |at: usize| {
        let mut wrong = bytes.clone();
        wrong[at] ^= 1;
        read(&wrong, &summary.id).unwrap_err()
    };
    assert!(matches!(
        flipped(0),
        FormatError::BadMagic {
            part: "build's head"
        }
    ));
    assert!(matches!(
        flipped(8),
        FormatError::UnknownVersion { found: 0, .. }
    ));
    assert!(matches!(flipped(12), FormatError::OutOfRange { .. }));
    assert!(matches!(flipped(16), FormatError::BadDigest { .. }));
    assert!(matches!(flipped(24), FormatError::OutOfRange { .. }));
    assert!(matches!(
        flipped(HEAD_LEN),
        FormatError::BadFrame { frame: 0 }
    ));
    assert!(matches!(
        flipped(footer - 1),
        FormatError::BadDigest {
            part: "frame table"
        }
    ));
    assert!(matches!(flipped(footer), FormatError::OutOfRange { .. }));
    assert!(matches!(
        flipped(footer + 8),
        FormatError::OutOfRange { .. }
    ));
    assert!(matches!(
        flipped(footer + 16),
        FormatError::OutOfRange { .. }
    ));
    assert!(matches!(
        flipped(footer + 24),
        FormatError::BadDigest { .. }
    ));
    assert!(matches!(
        flipped(footer + 56),
        FormatError::BadMagic {
            part: "build's footer"
        }
    ));
    assert!(matches!(
        read(&bytes, &[0; 32]),
        Err(FormatError::BadDigest { .. })
    ));
    assert!(matches!(
        read(&bytes[..90], &summary.id),
        Err(FormatError::Truncated { .. })
    ));
}

#[test]
fn a_frame_of_another_length_is_an_error_behind_a_right_digest() {
    let mut encoder = Encoder::new().unwrap();
    let frame = encoder.encode(&[5; 2 * PAGE_SIZE]).unwrap();
    let (summary, bytes) = write(&[5; 2 * PAGE_SIZE]);
    let table =
        BuildTable::read(&mut Cursor::new(&bytes), bytes.len() as u64, &summary.id).unwrap();
    for wrong in [PAGE_SIZE, 3 * PAGE_SIZE] {
        let mut into = vec![0; wrong];
        let error = Decoder::new()
            .unwrap()
            .decode(0, table.frame(0), &frame.bytes, &mut into);
        assert!(matches!(
            error,
            Err(FormatError::BadFrameLength { frame: 0, .. })
        ));
    }
}

#[test]
fn a_footer_that_claims_more_than_the_file_allocates_nothing() {
    let (summary, mut bytes) = write(&pages(&[1]));
    let footer = bytes.len() - FOOTER_LEN;
    bytes[footer + 8..footer + 16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(
        read(&bytes, &summary.id),
        Err(FormatError::OutOfRange { .. })
    ));
}
