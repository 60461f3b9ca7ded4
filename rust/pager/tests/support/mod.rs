//! Devices made of builds and captures of every kind, with the bytes that they have to read as.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

pub mod server;

use std::collections::HashMap;
use std::fs;
use std::io::{Cursor, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use diapause_format::{
    digest, digest16, hex, BuildKind, BuildRef, BuildTable, BuildWriter, CaptureHead,
    CaptureLayout, Digest, Encoder, Extent, HeaderWriter, Target, CAPTURE_HEAD_LEN, FRAME_BYTES,
    PAGE_SIZE,
};
use diapause_pager::blobs::{Blob, BlobError, BlobSource, Directory, Medium, Opened};
use diapause_pager::build::Builds;
use diapause_pager::build::Frames;
use diapause_pager::device::{Device, Part};
use diapause_pager::spec::{BlobsSpec, CaptureSpec, DeviceSpec};

/// Numbers that follow from a seed.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2).wrapping_add(1))
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }
}

/// Pages of noise, of words, and of both: frames of them are stored as they are or compressed.
pub fn pages(count: u64, dice: &mut Dice) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count as usize * PAGE_SIZE);
    while bytes.len() < count as usize * PAGE_SIZE {
        let noise = (bytes.len() / FRAME_BYTES) as u64 % 3 + dice.below(2) > 1;
        for word in 0..PAGE_SIZE as u64 / 8 {
            let value = match noise {
                true => dice.next(),
                false => word / 9 + bytes.len() as u64 / 4096 * 77,
            };
            bytes.extend_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

/// The file of a build of these pages.
pub fn build(pages: &[u8]) -> (Digest, Vec<u8>) {
    let mut writer = BuildWriter::new(Cursor::new(Vec::new())).unwrap();
    let mut encoder = Encoder::new().unwrap();
    for frame in pages.chunks(FRAME_BYTES) {
        writer.push(&encoder.encode(frame).unwrap()).unwrap();
    }
    let (summary, to) = writer.finish().unwrap();
    (summary.id, to.into_inner())
}

/// The table of such a file.
pub fn table(id: &Digest, file: &[u8]) -> BuildTable {
    BuildTable::read(&mut Cursor::new(file), file.len() as u64, id).unwrap()
}

/// What a header of a test can map to.
pub struct Store {
    pub id: Digest,
    pub kind: BuildKind,
    pub pages: Vec<u8>,
    pub capture: Option<CaptureSpec>,
}

impl Store {
    fn page_count(&self) -> u64 {
        (self.pages.len() / PAGE_SIZE) as u64
    }
}

/// A directory with a device in it.
pub struct World {
    pub directory: tempfile::TempDir,
    pub stores: Vec<Store>,
    pub spec: DeviceSpec,
    pub expected: Vec<u8>,
}

impl World {
    /// A device of at least `page_count` pages over so many builds, and over captures of all kinds.
    pub fn new(seed: u64, page_count: u64, builds: usize, captures: bool) -> Self {
        let mut dice = Dice::new(seed);
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("builds")).unwrap();
        let mut stores: Vec<Store> = (0..builds)
            .map(|_| {
                let count = 1 + dice.below(70);
                store_build(directory.path(), pages(count, &mut dice))
            })
            .collect();
        if captures {
            for (at, kind) in [write_file, write_buffer, write_overlay].iter().enumerate() {
                let count = 1 + dice.below(page_count.min(40));
                let pages = pages(count, &mut dice);
                let path = directory.path().join(format!("capture{at}"));
                let mut capture = kind(&path, &pages, page_count);
                capture.id = hex(&[at as u8 + 1; 32]);
                stores.push(Store {
                    id: [at as u8 + 1; 32],
                    kind: BuildKind::Capture,
                    pages,
                    capture: Some(capture),
                });
            }
        }
        let extents = scatter(&stores, page_count, &mut dice);
        Self::of(directory, stores, &extents)
    }

    /// A device of these extents, whose builds are counted from 1 in `stores`.
    pub fn of(directory: tempfile::TempDir, stores: Vec<Store>, extents: &[Extent]) -> Self {
        let last = extents.last().unwrap();
        let page_count = last.page + last.length;
        let mut expected = vec![0; page_count as usize * PAGE_SIZE];
        let mut writer = HeaderWriter::new(Vec::new(), page_count).unwrap();
        for extent in extents {
            let describe = |number: u32| {
                let store = &stores[number as usize - 1];
                BuildRef {
                    id: store.id,
                    pages: store.page_count(),
                    kind: store.kind,
                }
            };
            writer.push(*extent, describe).unwrap();
            if !extent.target.is_zero() {
                let at = extent.page as usize * PAGE_SIZE;
                let from = extent.target.position as usize * PAGE_SIZE;
                let length = extent.length as usize * PAGE_SIZE;
                let pages = &stores[extent.target.build as usize - 1].pages;
                expected[at..at + length].copy_from_slice(&pages[from..from + length]);
            }
        }
        let (summary, header) = writer.finish().unwrap();
        fs::write(directory.path().join("header"), header).unwrap();
        let used: Vec<Digest> = summary.builds.iter().map(|build| build.id).collect();
        let spec = DeviceSpec {
            size_bytes: page_count * PAGE_SIZE as u64,
            header: directory.path().join("header"),
            header_digest: hex(&summary.digest),
            blobs: BlobsSpec::directory(directory.path().join("builds")),
            captures: stores
                .iter()
                .filter(|store| used.contains(&store.id))
                .filter_map(|store| store.capture.clone())
                .collect(),
        };
        Self {
            directory,
            stores,
            spec,
            expected,
        }
    }

    /// One build, and a device that is that build from first to last.
    pub fn straight(pages: Vec<u8>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("builds")).unwrap();
        let length = (pages.len() / PAGE_SIZE) as u64;
        let stores = vec![store_build(directory.path(), pages)];
        let whole = Extent {
            page: 0,
            length,
            target: Target {
                build: 1,
                position: 0,
            },
        };
        Self::of(directory, stores, &[whole])
    }

    pub fn builds_directory(&self) -> PathBuf {
        self.directory.path().join("builds")
    }

    pub fn build_file(&self, store: usize) -> PathBuf {
        self.builds_directory().join(hex(&self.stores[store].id))
    }

    pub fn builds(&self) -> Arc<Builds> {
        self.builds_from(Arc::new(Directory(self.builds_directory())))
    }

    pub fn builds_from(&self, source: Arc<dyn BlobSource>) -> Arc<Builds> {
        let builds = Builds::new(source, Arc::new(Frames::default()));
        // Longer than a machine that is busy takes for anything.
        Arc::new(builds.waiting_at_most(Duration::from_secs(60)))
    }

    pub fn device(&self) -> Device {
        Device::open(&self.spec, self.builds()).unwrap()
    }

    /// Reads, and compares every byte and what was said of it.
    pub fn check(&self, device: &Device, offset: u64, size: usize) {
        let (bytes, _) = read(device, offset, size).unwrap();
        self.compare(offset, size, &bytes);
    }

    /// Compares what a window read as.
    pub fn compare(&self, offset: u64, size: usize, bytes: &[u8]) {
        let start = self.expected.len().min(offset as usize);
        let end = self.expected.len().min(start + size);
        assert!(
            bytes == &self.expected[start..end],
            "{size} bytes at {offset} differ"
        );
    }
}

/// The bytes of a window, and where they came from.
pub fn read(
    device: &Device,
    offset: u64,
    size: usize,
) -> Result<(Vec<u8>, diapause_pager::device::Origin), diapause_pager::build::Unreadable> {
    // Parts of another window stay before those of this one.
    let mut parts = vec![Part::Zeros(3)];
    let origin = match device.read(offset, size, &mut parts) {
        Ok(origin) => origin,
        Err(error) => {
            assert_eq!(parts.len(), 1, "parts beside an error");
            return Err(error);
        }
    };
    assert!(matches!(parts.remove(0), Part::Zeros(3)));
    let mut bytes = vec![0xAA; parts.iter().map(Part::len).sum()];
    let mut rest = &mut bytes[..];
    for part in &parts {
        assert!(!part.is_empty());
        let (here, later) = rest.split_at_mut(part.len());
        part.copy_to(here);
        rest = later;
    }
    Ok((bytes, origin))
}

pub fn store_build(directory: &Path, pages: Vec<u8>) -> Store {
    let (id, file) = build(&pages);
    fs::write(directory.join("builds").join(hex(&id)), file).unwrap();
    Store {
        id,
        kind: BuildKind::Packed,
        pages,
        capture: None,
    }
}

/// Extents of all lengths over all stores, and zeros between.
fn scatter(stores: &[Store], page_count: u64, dice: &mut Dice) -> Vec<Extent> {
    let mut extents = Vec::new();
    let mut page = 0;
    while page < page_count {
        let long = [1, 1, 3, 40][dice.below(4) as usize];
        let mut length = (1 + dice.below(long)).min(page_count - page);
        let build = dice.below(stores.len() as u64 + 1) as u32;
        let position = match build {
            0 => 0,
            _ => {
                let there = stores[build as usize - 1].page_count();
                let position = dice.below(there);
                length = length.min(there - position);
                position
            }
        };
        let target = Target { build, position };
        extents.push(Extent {
            page,
            length,
            target,
        });
        page += length;
    }
    extents
}

fn list(pages: &[u8]) -> Vec<u8> {
    let count = (pages.len() / PAGE_SIZE) as u64;
    (0..count).flat_map(u64::to_le_bytes).collect()
}

/// Puts each page of a capture, its entry and its sum where the layout has them.
fn place(into: &mut [u8], layout: CaptureLayout, first: u64, pages: &[u8], sums: bool) {
    for (position, page) in (first..).zip(pages.chunks(PAGE_SIZE)) {
        let mut put = |at: u64, bytes: &[u8]| {
            into[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        };
        put(layout.page(position), page);
        put(layout.list_entry(position), &position.to_le_bytes());
        if sums {
            put(layout.sum(position), &digest16(page));
        }
    }
}

fn spec(path: &Path) -> CaptureSpec {
    CaptureSpec {
        id: String::new(),
        path: path.to_owned(),
        spill: None,
        map: None,
    }
}

/// A capture file.
pub fn write_file(path: &Path, pages: &[u8], device_pages: u64) -> CaptureSpec {
    let count = (pages.len() / PAGE_SIZE) as u64;
    let layout = CaptureLayout::for_pages(count);
    let sums: Vec<u8> = pages.chunks(PAGE_SIZE).flat_map(digest16).collect();
    let head = CaptureHead {
        sealed: true,
        device_pages,
        captured: count,
        capacity: count,
        list_digest: digest(&list(pages)),
        sums_digest: Some(digest(&sums)),
    };
    let mut file = vec![0; layout.size_bytes as usize];
    file[..CAPTURE_HEAD_LEN].copy_from_slice(&head.encode());
    place(&mut file, layout, 0, pages, true);
    fs::write(path, file).unwrap();
    spec(path)
}

/// A buffer with room for half of the pages, and the spill.
pub fn write_buffer(path: &Path, pages: &[u8], device_pages: u64) -> CaptureSpec {
    let count = (pages.len() / PAGE_SIZE) as u64;
    let capacity = count / 2;
    let layout = CaptureLayout::for_pages(capacity);
    let head = CaptureHead {
        sealed: true,
        device_pages,
        captured: count,
        capacity,
        list_digest: digest(&list(pages)),
        sums_digest: None,
    };
    let (resident, spilled) = pages.split_at(capacity as usize * PAGE_SIZE);
    let mut buffer = vec![0; layout.size_bytes as usize];
    buffer[..CAPTURE_HEAD_LEN].copy_from_slice(&head.encode());
    place(&mut buffer, layout, 0, resident, false);
    fs::write(path, buffer).unwrap();
    let whole = CaptureLayout::for_pages(count);
    let mut file = vec![0; whole.size_bytes as usize];
    place(&mut file, whole, capacity, spilled, false);
    let spill = path.with_extension("spill");
    fs::write(&spill, file).unwrap();
    CaptureSpec {
        spill: Some(spill),
        ..spec(path)
    }
}

/// An overlay whose clusters lie in any order, and its map.
pub fn write_overlay(path: &Path, pages: &[u8], _device_pages: u64) -> CaptureSpec {
    let count = pages.len() / PAGE_SIZE;
    let mut file = vec![0xEE; (count + 1) * 2 * PAGE_SIZE];
    let mut map = Vec::new();
    for (at, page) in pages.chunks(PAGE_SIZE).enumerate() {
        // Two halves, the later pages first in the file.
        let place = 1 + (count - 1 - at) * 2 - (at % 2);
        let offset = place.max(1) * PAGE_SIZE;
        file[offset..offset + PAGE_SIZE].copy_from_slice(page);
        map.push(serde_json::json!({
            "start": at * PAGE_SIZE, "length": PAGE_SIZE, "depth": 0, "present": true,
            "zero": false, "data": true, "offset": offset,
        }));
    }
    fs::write(path, file).unwrap();
    let map_path = path.with_extension("map");
    fs::write(&map_path, serde_json::to_vec(&map).unwrap()).unwrap();
    CaptureSpec {
        map: Some(map_path),
        ..spec(path)
    }
}

/// A directory that counts, is slow, fails, and lies; with latency of its own where it says so.
#[derive(Debug)]
pub struct Watched {
    pub directory: Directory,
    pub medium: Medium,
    pub log: Arc<Mutex<Log>>,
}

/// What a [`Watched`] medium saw, and what it is to do.
#[derive(Debug, Default)]
pub struct Log {
    pub opened: HashMap<String, usize>,
    /// Name, offset, length of every read of stored bytes.
    pub reads: Vec<(String, u64, u64)>,
    pub delay_ms: u64,
    /// Reads fail until it is taken back.
    pub fails: Option<BlobError>,
    pub panics: bool,
    pub under_way: usize,
    pub most_under_way: usize,
}

#[derive(Debug)]
struct WatchedBlob {
    name: String,
    blob: Box<dyn Blob>,
    medium: Medium,
    log: Arc<Mutex<Log>>,
}

pub const NEAR: Medium = Medium {
    name: "local",
    window_bytes: 64 << 10,
    parallel: 1,
};

pub const FAR: Medium = Medium {
    name: "far",
    window_bytes: 1 << 20,
    parallel: 4,
};

impl Watched {
    pub fn new(directory: &Path, medium: Medium) -> Arc<Self> {
        Arc::new(Self {
            directory: Directory(directory.to_owned()),
            medium,
            log: Arc::default(),
        })
    }

    pub fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap()
    }
}

impl BlobSource for Watched {
    fn open_with_end(&self, name: &str, end_bytes: u64) -> Result<Opened, BlobError> {
        *self.log().opened.entry(name.to_owned()).or_default() += 1;
        let Opened { blob, end } = self.directory.open_with_end(name, end_bytes)?;
        let blob = Box::new(WatchedBlob {
            name: name.to_owned(),
            blob,
            medium: self.medium,
            log: self.log.clone(),
        });
        Ok(Opened { blob, end })
    }

    fn medium(&self) -> Medium {
        self.medium
    }
}

impl WatchedBlob {
    fn watch<T>(
        &self,
        offset: u64,
        length: u64,
        work: impl FnOnce() -> Result<T, BlobError>,
    ) -> Result<T, BlobError> {
        let (delay_ms, fails, panics) = {
            let mut log = self.log.lock().unwrap();
            log.reads.push((self.name.clone(), offset, length));
            log.under_way += 1;
            log.most_under_way = log.most_under_way.max(log.under_way);
            (log.delay_ms, log.fails.clone(), log.panics)
        };
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        self.log.lock().unwrap().under_way -= 1;
        assert!(!panics, "on purpose");
        fails.map_or_else(work, Err)
    }
}

impl Blob for WatchedBlob {
    fn size_bytes(&self) -> u64 {
        self.blob.size_bytes()
    }

    fn medium(&self) -> Medium {
        self.medium
    }

    fn read_into(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<(), BlobError> {
        let length = into.iter().map(|part| part.len() as u64).sum();
        self.watch(offset, length, || self.blob.read_into(offset, into))
    }

    fn stream(&self, offset: u64, length: u64) -> Result<Box<dyn std::io::Read + '_>, BlobError> {
        self.watch(offset, length, || self.blob.stream(offset, length))
    }
}
