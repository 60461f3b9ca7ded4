//! How much is read at once, how often, and what becomes of those who wait.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use diapause_format::{Extent, Target, FRAME_BYTES, PAGE_SIZE};
use diapause_pager::blobs::{BlobError, Medium};
use diapause_pager::build::{Builds, Frames};
use diapause_pager::device::Device;
use diapause_pager::frames::FRAMES_BYTES_MAX;
use proptest::prelude::*;
use support::{pages, read, store_build, Dice, Watched, World, FAR, NEAR};

const MIB: usize = 1 << 20;

fn watched(world: &World, medium: Medium) -> (Arc<Watched>, Device) {
    let source = Watched::new(&world.builds_directory(), medium);
    let device = Device::open(&world.spec, world.builds_from(source.clone())).unwrap();
    (source, device)
}

/// The reads of stored bytes of frames: not those of heads and tables.
fn frame_reads(world: &World, source: &Watched) -> Vec<(String, u64, u64)> {
    let mut ends = HashMap::new();
    for store in &world.stores {
        if store.capture.is_some() {
            continue;
        }
        let name = diapause_format::hex(&store.id);
        let file = std::fs::read(world.builds_directory().join(&name)).unwrap();
        let table = support::table(&store.id, &file);
        let last = table.frame(table.frame_count() - 1);
        ends.insert(name, last.offset + u64::from(last.length));
    }
    let log = source.log();
    let of_frames = log
        .reads
        .iter()
        .filter(|(name, offset, length)| *offset >= 32 && offset + length <= ends[name]);
    of_frames.cloned().collect()
}

fn assert_disjoint(mut reads: Vec<(String, u64, u64)>) {
    reads.sort();
    for pair in reads.windows(2) {
        let [(name, offset, length), (next_name, next, _)] = pair else {
            unreachable!()
        };
        assert!(name != next_name || offset + length <= *next, "{pair:?}");
    }
}

/// A device over several builds that alternate every page.
fn fragments(builds: u64, page_count: u64) -> World {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("builds")).unwrap();
    let mut dice = Dice::new(builds);
    let each = page_count.div_ceil(builds) * 16;
    let stores = (0..builds)
        .map(|_| store_build(directory.path(), pages(each, &mut dice)))
        .collect();
    let extents: Vec<Extent> = (0..page_count)
        .map(|page| Extent {
            page,
            length: 1,
            target: Target {
                build: (page % builds) as u32 + 1,
                position: page / builds * 16,
            },
        })
        .collect();
    World::of(directory, stores, &extents)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn every_stored_byte_is_fetched_once_by_however_many_readers(seed: u64, far: bool) {
        let world = World::new(seed, 700, 5, false);
        let (source, device) = watched(&world, if far { FAR } else { NEAR });
        let start = Barrier::new(6);
        thread::scope(|scope| {
            for reader in 0..6 {
                let (world, device, start) = (&world, &device, &start);
                scope.spawn(move || {
                    let mut dice = Dice::new(seed ^ reader << 20);
                    start.wait();
                    for _ in 0..40 {
                        let offset = dice.below(world.expected.len() as u64);
                        world.check(device, offset, dice.below(300_000) as usize);
                    }
                });
            }
        });
        assert_disjoint(frame_reads(&world, &source));
        let log = source.log();
        prop_assert!(log.opened.values().all(|times| *times == 1), "{:?}", log.opened);
    }
}

#[test]
fn readers_in_step_fetch_each_frame_once() {
    let world = World::straight(pages(200 * 16, &mut Dice::new(13)));
    for _ in 0..12 {
        let (source, device) = watched(&world, NEAR);
        let start = Barrier::new(4);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    start.wait();
                    for frame in 0..200 {
                        read(&device, frame * FRAME_BYTES as u64 + 7, 1).unwrap();
                    }
                });
            }
        });
        let reads = frame_reads(&world, &source);
        assert_eq!(reads.len(), 200);
        assert_disjoint(reads);
    }
}

#[test]
fn a_window_of_consecutive_frames_is_one_read() {
    let world = World::straight(pages(1024, &mut Dice::new(5)));
    let (source, device) = watched(&world, NEAR);
    for (size, offset) in [(128 << 10, 0), (MIB, 900_000), (64 << 10, 3 << 20)] {
        source.log().reads.clear();
        world.check(&device, offset, size);
        let reads = frame_reads(&world, &source);
        assert_eq!(reads.len(), 1, "{reads:?}");
    }
    // Frames that are there already are not read again.
    source.log().reads.clear();
    world.check(&device, 0, 256 << 10);
    let reads = frame_reads(&world, &source);
    assert_eq!(reads.len(), 1, "{reads:?}");
    source.log().reads.clear();
    world.check(&device, 0, 256 << 10);
    assert_eq!(frame_reads(&world, &source), []);
}

#[test]
fn a_slow_medium_brings_its_window_with_one_request() {
    let world = World::straight(pages(2048, &mut Dice::new(6)));
    let (source, device) = watched(&world, FAR);
    world.check(&device, 10 * FRAME_BYTES as u64 + 5, 100);
    for frame in 10..26 {
        world.check(&device, frame * FRAME_BYTES as u64, FRAME_BYTES);
    }
    let reads = frame_reads(&world, &source);
    assert_eq!(reads.len(), 1, "{reads:?}");
    // Head and table, and that is all that opening took.
    assert_eq!(source.log().reads.len(), 3);
    // The next stops where something is there already.
    world.check(&device, 2 * FRAME_BYTES as u64, 100);
    let reads = frame_reads(&world, &source);
    assert_eq!(reads.len(), 2);
    assert_disjoint(reads);
}

#[test]
fn a_fragmented_window_is_fetched_at_once_and_not_widened_beyond_one_window() {
    let world = fragments(5, 60);
    let (source, device) = watched(&world, FAR);
    source.log().delay_ms = 20;
    world.check(&device, 0, 30 * PAGE_SIZE);
    let reads = frame_reads(&world, &source);
    assert_disjoint(reads.clone());
    let fetched: u64 = reads.iter().map(|(_, _, length)| length).sum();
    assert!(
        fetched <= 2 * FAR.window_bytes + 30 * FRAME_BYTES as u64,
        "{fetched}"
    );
    let most = source.log().most_under_way;
    assert!((2..=FAR.parallel).contains(&most), "{most}");
    world.check(&device, 0, world.expected.len());
}

#[test]
fn a_local_fragmented_window_is_right_and_held_as_what_is_wanted() {
    let world = fragments(7, 512);
    let (_, device) = watched(&world, NEAR);
    let mut parts = Vec::new();
    device.read(0, world.expected.len(), &mut parts).unwrap();
    let (mut frames, mut copied) = (0, 0);
    for part in &parts {
        match part {
            diapause_pager::device::Part::Frame(frame, ..) => frames += frame.len(),
            other => copied += other.len(),
        }
    }
    assert!(frames <= 2 * MIB && copied > MIB, "{frames} and {copied}");
    world.check(&device, 0, world.expected.len());
}

#[test]
fn who_waits_for_a_fetch_that_fails_hears_it_and_the_next_tries_again() {
    for medium in [NEAR, FAR] {
        let world = World::straight(pages(64, &mut Dice::new(7)));
        let (source, device) = watched(&world, medium);
        world.check(&device, 40 * PAGE_SIZE as u64, 10);
        source.log().reads.clear();
        source.log().delay_ms = 100;
        source.log().fails = Some(BlobError::Unavailable("gone".into()));
        let start = Barrier::new(4);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    start.wait();
                    let error = read(&device, 0, 10).unwrap_err();
                    assert!(!error.damaged && error.cause.contains("gone"), "{error}");
                });
            }
        });
        source.log().fails = None;
        world.check(&device, 0, world.expected.len());
    }
}

#[test]
fn a_fetcher_that_panics_leaves_nobody_hanging() {
    for medium in [NEAR, FAR] {
        let world = World::straight(pages(64, &mut Dice::new(8)));
        let (source, device) = watched(&world, medium);
        world.check(&device, 63 * PAGE_SIZE as u64, 10);
        source.log().delay_ms = 100;
        source.log().panics = true;
        let start = Barrier::new(4);
        let outcomes: Vec<bool> = thread::scope(|scope| {
            let readers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        // The panic itself, or word of it.
                        let read = AssertUnwindSafe(|| read(&device, 0, 10).is_err());
                        catch_unwind(read).unwrap_or(true)
                    })
                })
                .collect();
            readers
                .into_iter()
                .map(|reader| reader.join().unwrap())
                .collect()
        });
        assert_eq!(outcomes, [true; 4]);
        source.log().panics = false;
        world.check(&device, 0, world.expected.len());
    }
}

#[test]
fn waiting_for_a_fetch_has_a_bound_and_who_asks_again_does_not_begin_another() {
    let world = World::straight(pages(64, &mut Dice::new(9)));
    let source = Watched::new(&world.builds_directory(), FAR);
    let builds = Builds::new(source.clone(), Arc::new(Frames::default()));
    let builds = Arc::new(builds.waiting_at_most(Duration::from_millis(60)));
    let device = Device::open(&world.spec, builds).unwrap();
    source.log().delay_ms = 700;
    let (began, mut late) = (Instant::now(), 0);
    let bytes = loop {
        match read(&device, 0, 10) {
            Ok((bytes, _)) => break bytes,
            Err(error) => {
                assert!(!error.damaged && error.cause.contains("within"), "{error}");
                late += 1;
            }
        }
        assert!(began.elapsed() < Duration::from_secs(60));
    };
    assert_eq!(bytes, world.expected[..10]);
    assert!(late > 0);
    // Head, table and the frames, each once.
    assert_eq!(source.log().reads.len(), 3);
    assert_eq!(source.log().opened.values().sum::<usize>(), 1);
}

#[test]
fn what_is_kept_stays_within_its_bound() {
    for medium in [NEAR, FAR] {
        let world = World::straight(pages(12 * 1024, &mut Dice::new(10)));
        let source = Watched::new(&world.builds_directory(), medium);
        let frames = Arc::new(Frames::default());
        let builds = Arc::new(Builds::new(source, frames.clone()));
        let device = Device::open(&world.spec, builds).unwrap();
        for offset in (0..world.expected.len() as u64).step_by(MIB) {
            world.check(&device, offset, MIB);
            assert!(frames.kept_bytes() <= FRAMES_BYTES_MAX);
        }
        assert!(frames.kept_bytes() > FRAMES_BYTES_MAX / 2);
    }
}

#[test]
fn a_sequential_reader_of_a_slow_medium_fetches_every_byte_once_beyond_what_is_kept() {
    let world = World::straight(pages(12 * 1024, &mut Dice::new(12)));
    let (source, device) = watched(&world, FAR);
    for offset in (0..world.expected.len() as u64).step_by(128 << 10) {
        world.check(&device, offset, 128 << 10);
    }
    let reads = frame_reads(&world, &source);
    assert_eq!(reads.len(), 48, "one for each MiB");
    assert_disjoint(reads);
}
