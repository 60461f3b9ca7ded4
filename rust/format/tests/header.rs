//! Headers: one mapping, one encoding; whatever is damaged is an error of its own kind.
#![allow(clippy::unwrap_used)]

use diapause_format::{
    overwrite, BuildKind, BuildRef, Differ, Extent, FormatError, HeaderIndex, HeaderReader,
    HeaderSummary, HeaderWriter, Target, NEW_BUILD,
};
use proptest::prelude::*;

/// A page's place by build id byte and position; None is zero.
type Model = Vec<Option<(u8, u64)>>;

fn build(number: u32) -> BuildRef {
    let kind = if number % 5 == 0 {
        BuildKind::Capture
    } else {
        BuildKind::Packed
    };
    BuildRef {
        id: [number as u8; 32],
        pages: 1 << 20,
        kind,
    }
}

/// The extents of a model as a caller that merges nothing would push them.
fn single_pages(model: &Model) -> Vec<Extent> {
    let extent = |(page, place): (usize, &Option<(u8, u64)>)| Extent {
        page: page as u64,
        length: 1,
        target: place.map_or(Target::ZERO, |(build, position)| Target {
            build: u32::from(build),
            position,
        }),
    };
    model.iter().enumerate().map(extent).collect()
}

fn encode_extents(extents: &[Extent], pages: u64) -> (HeaderSummary, Vec<u8>) {
    let mut writer = HeaderWriter::new(Vec::new(), pages).unwrap();
    extents
        .iter()
        .for_each(|extent| writer.push(*extent, build).unwrap());
    writer.finish().unwrap()
}

fn encode(model: &Model) -> (HeaderSummary, Vec<u8>) {
    encode_extents(&single_pages(model), model.len() as u64)
}

fn read(bytes: &[u8]) -> Result<(HeaderSummary, Model), FormatError> {
    let mut reader = HeaderReader::new(bytes, None)?;
    let mut model = Model::new();
    while let Some(extent) = reader.next_extent()? {
        assert_eq!(extent.page, model.len() as u64);
        for step in 0..extent.length {
            let target = extent.target.after(step);
            let id = |number| reader.build(number).id[0];
            let place = (!target.is_zero()).then(|| (id(target.build), target.position));
            model.push(place);
        }
    }
    Ok((reader.finish()?, model))
}

fn models(pages: usize) -> impl Strategy<Value = Model> {
    let run = (1usize..9, prop::option::of((1u8..12, 0u64..500)));
    prop::collection::vec(run, 0..pages).prop_map(|runs| {
        let place = |(length, place): (usize, Option<(u8, u64)>)| {
            (0..length).map(move |step| place.map(|(build, at)| (build, at + step as u64)))
        };
        runs.into_iter().flat_map(place).collect()
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(model in models(60)) {
        let (summary, bytes) = encode(&model);
        let (again, read) = read(&bytes).unwrap();
        prop_assert_eq!(&again, &summary);
        prop_assert_eq!(summary.size_bytes, bytes.len() as u64);
        prop_assert_eq!(&read, &model);
        prop_assert_eq!(summary.mapped_pages, model.iter().flatten().count() as u64);
    }

    #[test]
    fn one_mapping_has_one_encoding_however_it_is_cut_and_numbered(
        model in models(60), turn in 1u32..11,
    ) {
        let (summary, bytes) = encode(&model);
        let mut writer = HeaderWriter::new(Vec::new(), model.len() as u64).unwrap();
        let renumber = |number: u32| if number == 0 { 0 } else { (number + turn) % 12 + 1 };
        let back = |number: u32| build((number - 1 + 12 - turn % 12) % 12);
        for mut extent in single_pages(&model) {
            extent.target.build = renumber(extent.target.build);
            writer.push(extent, back).unwrap();
        }
        let (other, other_bytes) = writer.finish().unwrap();
        prop_assert_eq!(other, summary);
        prop_assert_eq!(other_bytes, bytes);
    }

    #[test]
    fn every_page_is_looked_up(model in models(40)) {
        let bytes = encode(&model).1;
        let index = HeaderIndex::load(HeaderReader::new(&bytes[..], None).unwrap()).unwrap();
        for (page, place) in model.iter().enumerate() {
            let target = index.lookup(page as u64).unwrap();
            let id = |number| index.build(number).id[0];
            let found = (!target.is_zero()).then(|| (id(target.build), target.position));
            prop_assert_eq!(found, *place);
        }
        prop_assert_eq!(index.lookup(model.len() as u64), None);
        let covered = index.extents().map(|extent| extent.length).sum::<u64>();
        prop_assert_eq!(covered, model.len() as u64);
    }

    #[test]
    fn an_overwrite_is_what_a_list_of_pages_says(
        parent in models(40),
        over in prop::collection::btree_map(0usize..300, any::<bool>(), 0..60),
    ) {
        let over: Vec<_> = over.into_iter().filter(|(page, _)| *page < parent.len()).collect();
        let mut expected = parent.clone();
        let mut extents = Vec::new();
        for (position, (page, zero)) in over.iter().enumerate() {
            let position = position as u64;
            expected[*page] = (!zero).then_some((200, position));
            let target = if *zero { Target::ZERO } else { Target { build: NEW_BUILD, position } };
            extents.push(Ok(Extent { page: *page as u64, length: 1, target }));
        }
        let bytes = encode(&parent).1;
        let mut reader = HeaderReader::new(&bytes[..], None).unwrap();
        let mut writer = HeaderWriter::new(Vec::new(), reader.page_count()).unwrap();
        overwrite(&mut reader, extents, build(200), &mut writer).unwrap();
        prop_assert_eq!(read(&writer.finish().unwrap().1).unwrap().1, expected);
    }

    #[test]
    fn a_difference_is_where_pages_differ(old in models(40), new in models(40)) {
        let pages = old.len().min(new.len());
        let (old, new) = (old[..pages].to_vec(), new[..pages].to_vec());
        let (old_bytes, new_bytes) = (encode(&old).1, encode(&new).1);
        let reader = |bytes| HeaderReader::new(bytes, None).unwrap();
        let mut differ = Differ::new(reader(&old_bytes[..]), reader(&new_bytes[..]));
        let mut found = Vec::new();
        while let Some(run) = differ.next_difference().unwrap() {
            found.extend(run.page..run.page + run.length);
        }
        let expected: Vec<u64> =
            (0..pages).filter(|page| old[*page] != new[*page]).map(|page| page as u64).collect();
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn noise_is_never_a_header_and_never_a_panic(
        noise in prop::collection::vec(any::<u8>(), 0..400), keep in 0usize..300,
    ) {
        let (_, bytes) = encode(&vec![Some((1, 5)), None, Some((2, 9)), Some((1, 6))]);
        let mut mixed = bytes[..keep.min(bytes.len())].to_vec();
        mixed.extend(&noise);
        prop_assert!(mixed == bytes || read(&mixed).is_err());
    }
}

/// A header with several blocks of each type.
fn large() -> Model {
    (0..30_000usize)
        .map(|page| (page % 3 != 0).then(|| ((page / 700 % 12) as u8 + 1, page as u64)))
        .collect()
}

#[test]
fn blocks_come_one_after_the_other() {
    let model = large();
    let (summary, bytes) = encode(&model);
    assert!(summary.extent_count > 4 * 4096);
    assert_eq!(read(&bytes).unwrap().1, model);
    assert_eq!(summary.builds.len(), 12);
}

#[test]
fn a_device_without_pages_has_a_header() {
    let (summary, bytes) = encode(&vec![]);
    assert_eq!((summary.extent_count, summary.page_count), (0, 0));
    assert_eq!(read(&bytes).unwrap().1, vec![]);
}

#[test]
fn any_flipped_bit_is_an_error() {
    let bytes = encode(&vec![
        Some((1, 5)),
        None,
        Some((2, 9)),
        None,
        Some((1, 6)),
        Some((3, 0)),
    ])
    .1;
    for at in 0..bytes.len() * 8 {
        let mut wrong = bytes.clone();
        wrong[at / 8] ^= 1 << (at % 8);
        assert!(read(&wrong).is_err(), "bit {at}");
    }
    let bytes = encode(&large()).1;
    for at in (0..bytes.len()).step_by(97) {
        let mut wrong = bytes.clone();
        wrong[at] ^= 0x10;
        assert!(read(&wrong).is_err(), "byte {at}");
    }
}

#[test]
fn any_truncation_and_any_byte_more_is_an_error() {
    let mut bytes = encode(&vec![Some((1, 5)), None, Some((2, 9))]).1;
    for length in 0..bytes.len() {
        let error = read(&bytes[..length]).unwrap_err();
        assert!(
            matches!(error, FormatError::Truncated { .. }),
            "{length}: {error}"
        );
    }
    bytes.push(0);
    assert!(matches!(
        read(&bytes),
        Err(FormatError::NotCanonical { .. })
    ));
}

#[test]
fn another_header_than_the_expected_one_is_refused() {
    let (summary, bytes) = encode(&vec![None, None]);
    HeaderReader::new(&bytes[..], Some(summary.digest))
        .unwrap()
        .finish()
        .unwrap();
    let error = HeaderReader::new(&bytes[..], Some([0; 32]))
        .unwrap()
        .finish()
        .unwrap_err();
    assert!(matches!(error, FormatError::BadDigest { .. }));
}

/// Puts a changed block payload back with its right checksum, so that only the decoder can object.
fn with_block(bytes: &[u8], kind: u8, change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let (mut out, mut at) = (bytes[..32].to_vec(), 32);
    while at < bytes.len() {
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        let mut payload = bytes[at + 12..at + 12 + length].to_vec();
        if bytes[at] == kind {
            change(&mut payload);
        }
        let mut head = vec![bytes[at], 0, 0, 0];
        head.extend((payload.len() as u32).to_le_bytes());
        let crc = crc32fast::hash(&[&head[..], &payload].concat());
        out.extend(head);
        out.extend(crc.to_le_bytes());
        out.extend(payload);
        at += 12 + length;
    }
    out
}

#[test]
fn what_no_writer_makes_is_refused_behind_right_checksums() {
    // Extents: one page of build 1, one zero, one page of build 1 two further on.
    let bytes = encode(&vec![Some((1, 5)), None, Some((1, 7))]).1;
    let refused = |kind: u8, at: usize, value: u8, text: &str| {
        let wrong = with_block(&bytes, kind, |payload| payload[at] = value);
        let error = read(&wrong).unwrap_err().to_string();
        assert!(error.contains(text), "{error} has no {text:?}");
    };
    refused(1, 40, 3, "kind of a build");
    refused(1, 36, 200, "count of a build's pages");
    refused(2, 0, 1, "first page");
    refused(2, 8, 0, "not full");
    refused(2, 9, 0xff, "count of extents");
    refused(2, 12, 4, "columns");
    refused(2, 24, 0, "no pages");
    refused(2, 24, 9, "length of an extent");
    refused(2, 27, 2, "number of a build");
    refused(2, 27, 0, "column is longer");
    refused(2, 30, 1, "position in a build");
    refused(3, 0, 9, "total of extents");
    refused(3, 8, 9, "total of mapped pages");
    refused(3, 16, 9, "total of builds");
    refused(3, 24, 9, "digest");
    // All three of build 1, one after the other.
    let merged = encode(&vec![Some((1, 5)), Some((2, 6)), Some((1, 9))]).1;
    let merged = with_block(&merged, 2, |payload| {
        payload[28..33].copy_from_slice(&[1, 1, 10, 0, 0])
    });
    assert!(read(&merged)
        .unwrap_err()
        .to_string()
        .contains("continue each other"));
    let zeros = encode(&vec![None, Some((1, 5)), None]).1;
    let zeros = with_block(&zeros, 2, |payload| {
        payload[28] = 0;
        payload[20] = 0;
        payload.truncate(30);
    });
    assert!(read(&zeros)
        .unwrap_err()
        .to_string()
        .contains("continue each other"));
    let doubled = with_block(&bytes, 1, |payload| payload.extend(payload.clone()));
    assert!(read(&doubled).unwrap_err().to_string().contains("twice"));
    let unused = with_block(&bytes, 1, |payload| payload.extend([9; 41]));
    assert!(read(&unused).is_err());
    let unused = with_block(&bytes, 1, |payload| {
        let mut other = payload.clone();
        other[0] = 77;
        payload.extend(other);
    });
    assert!(read(&unused)
        .unwrap_err()
        .to_string()
        .contains("builds in use"));
    let long = with_block(&bytes, 2, |payload| {
        payload.insert(25, 0);
        payload[24] = 0x81;
        payload[12] += 1;
    });
    assert!(read(&long)
        .unwrap_err()
        .to_string()
        .contains("longer than it has to be"));
}

#[test]
fn a_writer_refuses_gaps_overlaps_and_what_lies_outside() {
    let extent = |page, length, position| Extent {
        page,
        length,
        target: Target { build: 1, position },
    };
    let mut writer = HeaderWriter::new(Vec::new(), 10).unwrap();
    writer.push(extent(0, 2, 0), build).unwrap();
    for wrong in [
        extent(3, 1, 0),
        extent(1, 1, 0),
        extent(2, 9, 0),
        extent(2, 2, 1 << 20),
    ] {
        assert!(matches!(
            writer.push(wrong, build),
            Err(FormatError::OutOfRange { .. })
        ));
    }
    assert!(writer.finish().is_err());
    assert!(HeaderWriter::new(Vec::new(), (1 << 32) + 1).is_err());
}

#[test]
fn a_header_holds_65535_builds_and_no_more() {
    let id = |number: u32| BuildRef {
        id: std::array::from_fn(|at| (number >> (8 * (at % 4))) as u8),
        pages: 1,
        kind: BuildKind::Packed,
    };
    let mut writer = HeaderWriter::new(Vec::new(), 65_536).unwrap();
    for page in 0..65_535u32 {
        let target = Target {
            build: page + 1,
            position: 0,
        };
        writer
            .push(
                Extent {
                    page: page.into(),
                    length: 1,
                    target,
                },
                id,
            )
            .unwrap();
    }
    let one_more = Extent {
        page: 65_535,
        length: 1,
        target: Target {
            build: 65_536,
            position: 0,
        },
    };
    assert!(matches!(
        writer.push(one_more, id),
        Err(FormatError::OutOfRange { .. })
    ));
}
