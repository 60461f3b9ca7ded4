//! A device against the bytes that it stands for, over every kind of store and damage.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;

use diapause_format::{hex, FRAME_BYTES, PAGE_SIZE};
use diapause_pager::device::{Device, Origin};
use proptest::prelude::*;
use support::{pages, read, table, Dice, World, FAR, NEAR};

const PAGE: u64 = PAGE_SIZE as u64;

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_window_reads_as_the_device(
        seed: u64,
        page_count in 1u64..500,
        builds in 1usize..6,
        captures: bool,
        far: bool,
        windows in prop::collection::vec((any::<u64>(), 0usize..1_200_000), 1..12),
    ) {
        let world = World::new(seed, page_count, builds, captures);
        let medium = if far { FAR } else { NEAR };
        let source = support::Watched::new(&world.builds_directory(), medium);
        let device = Device::open(&world.spec, world.builds_from(source)).unwrap();
        prop_assert_eq!(device.size_bytes(), world.expected.len() as u64);
        world.check(&device, 0, world.expected.len() + 5);
        let fresh = world.device();
        for (offset, size) in windows {
            let offset = offset % (world.expected.len() as u64 + 3 * PAGE);
            world.check(&device, offset, size);
            world.check(&fresh, offset, size);
        }
    }

    #[test]
    fn a_byte_that_is_wrong_anywhere_in_a_build_is_never_served(
        seed: u64,
        page_count in 1u64..200,
        at: u64,
        bit in 0u8..8,
        far: bool,
    ) {
        let world = World::straight(pages(page_count, &mut Dice::new(seed)));
        let path = world.build_file(0);
        let good = fs::read(&path).unwrap();
        let at = (at % good.len() as u64) as usize;
        let mut bad = good.clone();
        bad[at] ^= 1 << bit;
        fs::write(&path, &bad).unwrap();
        let medium = if far { FAR } else { NEAR };
        let source = support::Watched::new(&world.builds_directory(), medium);
        let device = Device::open(&world.spec, world.builds_from(source)).unwrap();
        let entries = table(&world.stores[0].id, &good);
        let hit = (0..entries.frame_count()).find(|frame| {
            let entry = entries.frame(*frame);
            (entry.offset..entry.offset + u64::from(entry.length)).contains(&(at as u64))
        });
        for frame in 0..entries.frame_count() {
            let (from, length) = (frame * FRAME_BYTES as u64, entries.frame_bytes(frame));
            match hit {
                Some(wrong) if wrong != frame => world.check(&device, from, length),
                _ => {
                    let error = read(&device, from, length).unwrap_err();
                    prop_assert!(error.damaged, "{}", error);
                    prop_assert!(error.blob.ends_with(&hex(&world.stores[0].id)));
                }
            }
        }
        prop_assert!(read(&device, 0, world.expected.len()).is_err());
        // Mended in its place or by another file: the next read has it, though frames of the old
        // one may still be kept.
        fs::write(path.with_extension("new"), &good).unwrap();
        fs::rename(path.with_extension("new"), &path).unwrap();
        world.check(&device, 0, world.expected.len());
    }

    #[test]
    fn a_build_that_is_cut_short_is_damaged(seed: u64, page_count in 1u64..100, left: u64) {
        let world = World::straight(pages(page_count, &mut Dice::new(seed)));
        let path = world.build_file(0);
        let good = fs::read(&path).unwrap();
        let left = left % good.len() as u64;
        // Cut before it is opened, and under one who has it open.
        let before = world.device();
        world.check(&before, 0, 1);
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(left).unwrap();
        let error = read(&world.device(), 0, world.expected.len()).unwrap_err();
        prop_assert!(error.damaged, "{}", error);
        let entries = table(&world.stores[0].id, &good);
        let last = entries.frame(entries.frame_count() - 1);
        match read(&before, 0, world.expected.len()) {
            // Its table is known, and of its frames none is gone that is not kept.
            Ok((bytes, _)) => {
                let there = left >= last.offset + u64::from(last.length);
                prop_assert!(bytes == world.expected && (there || entries.frame_count() == 1));
            }
            Err(error) => prop_assert!(error.damaged, "{}", error),
        }
    }
}

#[test]
fn a_build_that_is_missing_is_away_and_found_when_it_is_there() {
    let world = World::straight(pages(40, &mut Dice::new(1)));
    let hidden = world.directory.path().join("hidden");
    fs::rename(world.build_file(0), &hidden).unwrap();
    let device = world.device();
    for _ in 0..3 {
        let error = read(&device, 5000, 100).unwrap_err();
        assert!(!error.damaged && error.cause.contains("missing"), "{error}");
    }
    fs::rename(&hidden, world.build_file(0)).unwrap();
    world.check(&device, 5000, 100);
}

#[test]
fn another_device_of_the_same_build_reopens_it_too() {
    let world = World::straight(pages(64, &mut Dice::new(2)));
    let path = world.build_file(0);
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[33] ^= 1;
    fs::write(&path, bad).unwrap();
    let builds = world.builds();
    let [one, other] = [0; 2].map(|_| Device::open(&world.spec, builds.clone()).unwrap());
    // Both have it open.
    world.check(&one, 20 * PAGE, 100);
    world.check(&other, 36 * PAGE, 100);
    assert!(read(&one, 0, 10).unwrap_err().damaged);
    fs::write(path.with_extension("new"), &good).unwrap();
    fs::rename(path.with_extension("new"), &path).unwrap();
    world.check(&other, 0, world.expected.len());
    world.check(&one, 0, world.expected.len());
}

#[test]
fn nothing_is_allocated_for_a_table_of_a_size_that_only_the_file_claims() {
    let world = World::straight(pages(40, &mut Dice::new(3)));
    let path = world.build_file(0);
    let mut file = fs::read(&path).unwrap();
    // A sparse file of 8 TiB whose footer is right about its own table, which is nearly all of it.
    let size: u64 = 1 << 43;
    let frames = (size - 96) / 32;
    let at = file.len() - 64;
    let mut footer = file.split_off(at);
    footer[8..16].copy_from_slice(&frames.to_le_bytes());
    footer[16..24].copy_from_slice(&(size - 64 - frames * 32).to_le_bytes());
    fs::write(&path, &file[..32]).unwrap();
    let sparse = fs::OpenOptions::new().write(true).open(&path).unwrap();
    sparse.set_len(size).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &footer, size - 64).unwrap();
    let error = read(&world.device(), 0, 10).unwrap_err();
    assert!(
        error.damaged && error.cause.contains("count of frames"),
        "{error}"
    );
}

#[test]
fn where_bytes_came_from_is_said() {
    let world = World::straight(pages(100, &mut Dice::new(4)));
    let device = world.device();
    assert_eq!(read(&device, 0, 10).unwrap().1, Origin::Local);
    assert_eq!(read(&device, 10, 10).unwrap().1, Origin::Kept);
    assert_eq!(read(&device, 10, FRAME_BYTES).unwrap().1, Origin::Local);
    let source = support::Watched::new(&world.builds_directory(), FAR);
    let far = Device::open(&world.spec, world.builds_from(source)).unwrap();
    assert_eq!(read(&far, 0, 10).unwrap().1, Origin::Remote);
    // Its window of 1 MiB came with it.
    let waited = std::iter::repeat_with(|| read(&far, 400_000, 10).unwrap().1);
    assert!(waited.take(1000).any(|origin| origin == Origin::Kept));
    let captured = World::new(11, 60, 1, true);
    let device = captured.device();
    let origins: Vec<Origin> = (0..60)
        .map(|page| read(&device, page * PAGE, PAGE_SIZE).unwrap().1)
        .collect();
    for expected in [Origin::Zero, Origin::Capture, Origin::Local] {
        assert!(origins.contains(&expected), "{expected:?} of {origins:?}");
    }
}

#[test]
fn captures_are_held_against_their_header() {
    let world = World::new(11, 60, 1, true);
    let open = |spec: &_| Device::open(spec, world.builds()).map(|_| ()).unwrap_err();
    let mut spec = world.spec.clone();
    spec.captures.clear();
    assert!(open(&spec).cause.contains("no such capture"));
    let mut spec = world.spec.clone();
    spec.captures[0].id = "x".into();
    assert!(open(&spec).damaged);
    let mut spec = world.spec.clone();
    spec.size_bytes += PAGE;
    assert!(open(&spec).damaged);
    let mut spec = world.spec.clone();
    spec.header_digest = hex(&[9; 32]);
    assert!(open(&spec).damaged);
    let mut spec = world.spec.clone();
    spec.header_digest = "none".into();
    assert!(open(&spec).damaged);
    let mut spec = world.spec.clone();
    spec.header = "/nowhere".into();
    assert!(!open(&spec).damaged);
    // The capture of another header: other pages than this one says.
    let at = world
        .spec
        .captures
        .iter()
        .position(|spec| spec.map.is_some());
    let spec = world.spec.clone();
    let map = spec.captures[at.unwrap()].map.clone().unwrap();
    fs::write(map, "[]").unwrap();
    let error = open(&spec);
    assert!(
        error.damaged && error.cause.contains("the header says"),
        "{error}"
    );
}

#[test]
fn a_page_of_a_capture_file_that_is_wrong_is_never_served() {
    let world = World::new(11, 60, 1, true);
    let device = world.device();
    let good: Vec<bool> = (0..60)
        .map(|page| read(&device, page * PAGE, 4096).is_ok())
        .collect();
    assert!(good.iter().all(|good| *good));
    let path = world.directory.path().join("capture0");
    let mut file = fs::read(&path).unwrap();
    let end = file.len();
    // Every page of the file: sums stand before them.
    let from = end - world.stores[1].pages.len();
    file[from..]
        .iter_mut()
        .step_by(PAGE_SIZE)
        .for_each(|byte| *byte ^= 4);
    fs::write(&path, file).unwrap();
    let mut wrong = 0;
    for page in 0..60 {
        match read(&device, page * PAGE + 1, 4000) {
            Ok(_) => world.check(&device, page * PAGE + 1, 4000),
            Err(error) => {
                assert!(error.damaged, "{error}");
                wrong += 1;
            }
        }
    }
    assert!(wrong > 0);
}
