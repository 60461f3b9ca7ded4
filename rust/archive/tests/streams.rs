//! Streams: trees that come back, the corpus of hostile ones, and what must hold for any bytes.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
use std::path::Path;

use diapause_archive::{pack, unpack, Entry, Error, Kind, Meta, Reader, Trust, Writer};
use proptest::prelude::*;

#[path = "../fuzz/check.rs"]
mod check;

fn packed(root: &Path) -> Vec<u8> {
    let mut stream = Vec::new();
    pack(root, b"top", &mut stream, &mut |_, _| true).unwrap();
    stream
}

fn meta() -> Meta {
    Meta {
        mode: 0o640,
        uid: 0,
        gid: 0,
        modified: (1_000_000_000, 5),
        accessed: (-7, 999_999_999),
    }
}

fn tree() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("sub")).unwrap();
    fs::write(root.path().join("sub/file"), b"data").unwrap();
    fs::hard_link(root.path().join("sub/file"), root.path().join("twin")).unwrap();
    symlink("../../elsewhere", root.path().join("link")).unwrap();
    let holes = fs::File::create(root.path().join("holes")).unwrap();
    holes.set_len(1 << 30).unwrap();
    root
}

#[test]
fn a_tree_comes_back() {
    let (root, target) = (tree(), tempfile::tempdir().unwrap());
    let stream = packed(root.path());
    assert!(stream.len() < 100_000, "holes are not sent");
    let done = unpack(
        &stream[..],
        target.path(),
        Some(b"made"),
        Trust::Full,
        &mut |_, _| true,
    );
    assert_eq!(done.unwrap().entries, 6);
    let made = target.path().join("made");
    assert_eq!(fs::read(made.join("twin")).unwrap(), b"data");
    let nodes = ["twin", "sub/file"].map(|name| fs::metadata(made.join(name)).unwrap().ino());
    assert_eq!(nodes[0], nodes[1]);
    assert_eq!(fs::metadata(made.join("holes")).unwrap().len(), 1 << 30);
    assert_eq!(fs::metadata(made.join("holes")).unwrap().blocks(), 0);
    let (ours, theirs) = (
        fs::metadata(root.path()).unwrap(),
        fs::metadata(&made).unwrap(),
    );
    assert_eq!(ours.permissions().mode(), theirs.permissions().mode());
    assert_eq!(
        (ours.mtime(), ours.mtime_nsec()),
        (theirs.mtime(), theirs.mtime_nsec())
    );
}

#[test]
fn the_corpus_touches_nothing_outside() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/unpack");
    let inputs: Vec<_> = fs::read_dir(corpus).unwrap().collect();
    assert!(inputs.len() >= 30);
    for input in inputs {
        check::nothing_outside(&fs::read(input.unwrap().path()).unwrap());
    }
}

#[test]
fn a_cancelled_copy_leaves_nothing() {
    let (root, target) = (tree(), tempfile::tempdir().unwrap());
    let stream = packed(root.path());
    for steps in 0..6 {
        let mut left = steps;
        let mut count = |_, _| {
            left -= 1;
            left >= 0
        };
        let done = unpack(
            &stream[..],
            target.path(),
            Some(b"made"),
            Trust::Full,
            &mut count,
        );
        assert!(matches!(done, Err(Error::Cancelled)), "{done:?}");
        assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_path_that_is_too_deep_is_refused() {
    let mut stream = Vec::new();
    let mut writer = Writer::new(&mut stream, 0).unwrap();
    let path = [b"top".to_vec(), b"/d".repeat(256)].concat();
    let kind = Kind::Directory;
    writer
        .entry(&Entry {
            path,
            kind,
            meta: meta(),
        })
        .unwrap();
    writer.finish().unwrap();
    let target = tempfile::tempdir().unwrap();
    let done = unpack(
        &stream[..],
        target.path(),
        Some(b"x"),
        Trust::Full,
        &mut |_, _| true,
    );
    assert!(matches!(done, Err(Error::Refused { .. })), "{done:?}");
}

proptest! {
    #[test]
    fn an_entry_comes_back(
        path in prop::collection::vec(1u8.., 1..300),
        target in prop::collection::vec(1u8.., 1..300),
        data in prop::collection::vec(any::<u8>(), 0..2000),
        seconds in -10_000_000_000i64..10_000_000_000,
        nanoseconds in 0u32..1_000_000_000,
        uid in 0u64..0xFFFF_FFFF,
    ) {
        let meta = Meta { uid, modified: (seconds, nanoseconds), ..meta() };
        let size = data.len() as u64;
        let entries = [Kind::File { size, map: None }, Kind::Symlink(target)]
            .map(|kind| Entry { path: path.clone(), kind, meta });
        let mut stream = Vec::new();
        let mut writer = Writer::new(&mut stream, size).unwrap();
        writer.entry(&entries[0]).unwrap();
        writer.data(&data).unwrap();
        writer.entry(&entries[1]).unwrap();
        writer.finish().unwrap();
        let mut reader = Reader::new(&stream[..]);
        prop_assert_eq!(&reader.next_entry().unwrap().unwrap(), &entries[0]);
        prop_assert_eq!(reader.total(), size);
        let mut got = vec![0; data.len()];
        let mut filled = 0;
        while filled < got.len() {
            filled += reader.data(&mut got[filled..]).unwrap();
        }
        prop_assert_eq!(got, data);
        prop_assert_eq!(&reader.next_entry().unwrap().unwrap(), &entries[1]);
        prop_assert_eq!(reader.next_entry().unwrap(), None);
    }

    #[test]
    fn a_stream_with_changed_bytes_touches_nothing_outside(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        let mut stream = packed(tree().path());
        for (at, byte) in changes {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        if let Some(cut) = cut {
            let length = cut.index(stream.len());
            stream.truncate(length);
        }
        check::nothing_outside(&stream);
    }
}
