//! Devices for the programs that measure: of frames that are stored as they are, or compressed.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use diapause_format::{
    hex, BuildKind, BuildRef, BuildTable, BuildWriter, Encoder, Extent, HeaderWriter, Target,
    FRAME_BYTES, PAGE_SIZE,
};
use diapause_pager::blobs::Directory;
use diapause_pager::build::{Builds, Frames};
use diapause_pager::spec::{BlobsSpec, DeviceSpec};

/// One device over one build.
pub struct Case {
    pub name: &'static str,
    pub spec: DeviceSpec,
    pub builds: Arc<Builds>,
    pub file: File,
    pub table: BuildTable,
}

/// Words of a guest's memory, more or less: each page compresses to about a third.
pub fn words(page: u64, into: &mut Vec<u8>) {
    let mut seed = page.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for word in 0..PAGE_SIZE as u64 / 8 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let value = match word % 4 {
            0 => seed,
            1 => page,
            2 => seed & 0xFF,
            _ => word / 8,
        };
        into.extend_from_slice(&value.to_le_bytes());
    }
}

/// Nothing that compresses.
pub fn noise(page: u64, into: &mut Vec<u8>) {
    let mut seed = page.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for _ in 0..PAGE_SIZE / 8 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        into.extend_from_slice(&seed.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
}

/// A build of so many MiB of these pages, and a header that maps all of it.
pub fn make(name: &'static str, directory: &Path, mib: u64, page: fn(u64, &mut Vec<u8>)) -> Case {
    let new = directory.join("new");
    let mut writer = BuildWriter::new(File::create(&new).unwrap()).unwrap();
    let mut encoder = Encoder::new().unwrap();
    let pages = mib * 256;
    let mut raw = Vec::new();
    for first in (0..pages).step_by(FRAME_BYTES / PAGE_SIZE) {
        raw.clear();
        (first..first + 16).for_each(|at| page(at, &mut raw));
        writer.push(&encoder.encode(&raw).unwrap()).unwrap();
    }
    let (summary, file) = writer.finish().unwrap();
    file.sync_all().unwrap();
    let path = directory.join(hex(&summary.id));
    std::fs::rename(new, &path).unwrap();
    let mut header = HeaderWriter::new(Vec::new(), pages).unwrap();
    let target = Target {
        build: 1,
        position: 0,
    };
    let whole = Extent {
        page: 0,
        length: pages,
        target,
    };
    let build = BuildRef {
        id: summary.id,
        pages,
        kind: BuildKind::Packed,
    };
    header.push(whole, |_| build).unwrap();
    let (head, bytes) = header.finish().unwrap();
    let header = directory.join(format!("{name}.header"));
    std::fs::write(&header, bytes).unwrap();
    let spec = DeviceSpec {
        size_bytes: pages * PAGE_SIZE as u64,
        header,
        header_digest: hex(&head.digest),
        blobs: BlobsSpec::directory(directory),
        captures: Vec::new(),
    };
    let source = Arc::new(Directory(directory.to_owned()));
    let builds = Arc::new(Builds::new(source, Arc::new(Frames::default())));
    let mut file = File::open(&path).unwrap();
    let table = BuildTable::read(&mut file, summary.size_bytes, &summary.id).unwrap();
    Case {
        name,
        spec,
        builds,
        file,
        table,
    }
}
