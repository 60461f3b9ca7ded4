//! What the process holds while it serves the devices of 64 guests. A program of its own: the
//! figure is the process's.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use diapause_format::{
    hex, BuildKind, BuildRef, BuildWriter, Encoder, Extent, HeaderWriter, Target, FRAME_BYTES,
    FRAME_PAGES, PAGE_SIZE,
};
use diapause_pager::blobs::{BlobSource, Directory};
use diapause_pager::build::{Builds, Frames};
use diapause_pager::device::Device;
use diapause_pager::frames::bound_malloc;
use diapause_pager::spec::{BlobsSpec, DeviceSpec};
use support::{pages, Dice, Watched, FAR};

const GUESTS: usize = 64;
const READERS: u64 = 8;
/// Of each device; all of them are larger than what is kept by far.
const PAGES: u64 = 32 * 1024;
/// Of what the pager and the keeper may have together, 60 MiB, this much is the pages' part.
const RESIDENT_MAX: u64 = 48 << 20;

fn frame(number: u64) -> Vec<u8> {
    pages(FRAME_PAGES as u64, &mut Dice::new(number))
}

/// A device over two builds by turns, every 40 pages; nothing of it stays in memory.
fn make(directory: &Path) -> DeviceSpec {
    let mut encoder = Encoder::new().unwrap();
    let builds = [0, 1].map(|build| {
        let path = directory.join("new");
        let mut writer = BuildWriter::new(File::create(&path).unwrap()).unwrap();
        for number in 0..PAGES / FRAME_PAGES as u64 {
            let pages = frame(number * 2 + build);
            writer.push(&encoder.encode(&pages).unwrap()).unwrap();
        }
        let (summary, _) = writer.finish().unwrap();
        fs::rename(path, directory.join(hex(&summary.id))).unwrap();
        BuildRef {
            id: summary.id,
            pages: PAGES,
            kind: BuildKind::Packed,
        }
    });
    let mut header = HeaderWriter::new(Vec::new(), PAGES).unwrap();
    for page in (0..PAGES).step_by(40) {
        let extent = Extent {
            page,
            length: 40.min(PAGES - page),
            target: Target {
                build: (page / 40 % 2) as u32 + 1,
                position: page,
            },
        };
        header
            .push(extent, |number| builds[number as usize - 1])
            .unwrap();
    }
    let (summary, bytes) = header.finish().unwrap();
    fs::write(directory.join("header"), bytes).unwrap();
    DeviceSpec {
        size_bytes: PAGES * PAGE_SIZE as u64,
        header: directory.join("header"),
        header_digest: hex(&summary.digest),
        blobs: BlobsSpec::directory(directory),
        captures: Vec::new(),
    }
}

/// The byte of a device at a place, made anew.
fn expected(page: u64) -> Vec<u8> {
    let frame = frame(page / FRAME_PAGES as u64 * 2 + page / 40 % 2);
    let at = (page % FRAME_PAGES as u64) as usize * PAGE_SIZE;
    frame[at..at + PAGE_SIZE].to_vec()
}

fn status(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

#[test]
fn devices_of_64_guests_are_served_within_the_budget() {
    bound_malloc();
    let directory = tempfile::tempdir().unwrap();
    let spec = make(directory.path());
    let media: [Arc<dyn BlobSource>; 2] = [
        Arc::new(Directory(directory.path().to_owned())),
        Watched::new(directory.path(), FAR),
    ];
    // The peak from here on.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    for source in media {
        let builds = Arc::new(
            Builds::new(source, Arc::new(Frames::default()))
                .waiting_at_most(Duration::from_secs(60)),
        );
        let open = || Device::open(&spec, builds.clone()).unwrap();
        let devices: Vec<Device> = std::iter::repeat_with(open).take(GUESTS).collect();
        std::thread::scope(|scope| {
            for reader in 0..READERS {
                let devices = &devices;
                scope.spawn(move || {
                    let mut dice = Dice::new(reader);
                    let mut parts = Vec::new();
                    for device in devices.iter().cycle().take(2 * GUESTS) {
                        // A window of a whole MiB, from anywhere; one of its pages is compared.
                        let page = dice.below(PAGES - 512);
                        let inside = dice.below(256);
                        let start = page * PAGE_SIZE as u64 + 9;
                        parts.clear();
                        device.read(start, 1 << 20, &mut parts).unwrap();
                        parts.clear();
                        let at = (page + inside) * PAGE_SIZE as u64;
                        device.read(at, PAGE_SIZE, &mut parts).unwrap();
                        let mut found = vec![0; PAGE_SIZE];
                        parts[0].copy_to(&mut found);
                        assert!(found == expected(page + inside));
                    }
                });
            }
        });
        let peak = status("VmHWM");
        assert!(peak < RESIDENT_MAX, "{peak} bytes at most");
        println!("{peak} bytes at most");
    }
    assert_eq!(FRAME_BYTES, FRAME_PAGES * PAGE_SIZE);
}
