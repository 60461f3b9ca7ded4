//! Root file systems: what is handed back, what stands on the host, what holds for any bytes.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use diapause_archive::{unpack_rootfs, Bounds, Error, Placed, Special};
use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

const BOUNDS: Bounds = Bounds {
    bytes: 1 << 20,
    entries: 100,
};

fn entry(archive: &mut Builder<Vec<u8>>, path: &str, kind: EntryType, link: &str, data: &[u8]) {
    let mut header = Header::new_ustar();
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o4711);
    header.set_uid(1000);
    header.set_gid(7);
    header.set_mtime(1_000_000_000);
    header.set_size(data.len() as u64);
    header.set_device_major(1).unwrap();
    header.set_device_minor(3).unwrap();
    header.set_cksum();
    archive.append(&header, data).unwrap();
}

fn sample() -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    entry(
        &mut archive,
        "usr/bin/su",
        EntryType::Regular,
        "",
        b"program",
    );
    entry(
        &mut archive,
        "usr/bin/sg",
        EntryType::Link,
        "usr/bin/su",
        b"",
    );
    entry(&mut archive, "link", EntryType::Symlink, "/outside", b"");
    entry(&mut archive, "dev/null", EntryType::Char, "", b"");
    entry(&mut archive, "dev/", EntryType::Directory, "", b"");
    archive.into_inner().unwrap()
}

fn unpacked(stream: &[u8], root: &Path, bounds: Bounds) -> Result<Vec<Placed>, Error> {
    unpack_rootfs(stream, root, bounds, &mut |_, _| true).map(|(_, placed)| placed)
}

#[test]
fn rights_are_handed_back_and_not_put_on_files() {
    let root = tempfile::tempdir().unwrap();
    let placed = unpacked(&sample(), root.path(), BOUNDS).unwrap();
    let file = fs::metadata(root.path().join("usr/bin/su")).unwrap();
    assert_eq!(file.permissions().mode() & 0o7777, 0o711);
    assert!(fs::symlink_metadata(root.path().join("dev/null")).is_err());
    assert_eq!(
        fs::read_link(root.path().join("link")).unwrap(),
        Path::new("/outside")
    );
    let by_path = |path: &[u8]| placed.iter().find(|one| one.path == path).unwrap();
    let su = by_path(b"usr/bin/su");
    assert_eq!((su.mode, su.uid, su.gid), (0o104_711, 1000, 7));
    let null = by_path(b"dev/null");
    assert_eq!(null.special, Some(Special::Character(1, 3)));
    assert_eq!(by_path(b"dev").mode, 0o044_711);
    assert!(placed.iter().all(|one| one.path != b"usr/bin/sg"));
}

#[test]
fn bounds_hold_before_anything_is_kept() {
    for bounds in [
        Bounds { bytes: 6, ..BOUNDS },
        Bounds {
            entries: 2,
            ..BOUNDS
        },
    ] {
        let root = tempfile::tempdir().unwrap();
        let refused = unpacked(&sample(), root.path(), bounds);
        assert!(matches!(refused, Err(Error::TooLarge(_))));
    }
}

#[test]
fn device_numbers_that_cannot_be_are_refused() {
    let mut archive = Builder::new(Vec::new());
    let mut header = Header::new_ustar();
    header.as_old_mut().name[0] = b'd';
    header.set_entry_type(EntryType::Block);
    header.set_mode(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header.set_device_major(4096).unwrap();
    header.set_device_minor(0).unwrap();
    header.set_cksum();
    archive.append(&header, &b""[..]).unwrap();
    let root = tempfile::tempdir().unwrap();
    let refused = unpacked(&archive.into_inner().unwrap(), root.path(), BOUNDS);
    assert!(matches!(refused, Err(Error::Refused { .. })));
}

fn with_good_sums(mut stream: Vec<u8>) -> Vec<u8> {
    for block in stream.chunks_exact_mut(512) {
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    stream
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever bytes come: no panic, and nothing beside the directory is touched.
    #[test]
    fn any_bytes_stay_inside(
        changes in proptest::collection::vec((0usize..6144, any::<u8>()), 0..12),
        cut in 0usize..6144,
    ) {
        let mut stream = sample();
        for (at, to) in changes {
            if let Some(byte) = stream.get_mut(at) {
                *byte = to;
            }
        }
        stream.truncate(stream.len() - cut.min(stream.len()) / 8);
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::write(place.path().join("outside"), b"as it was").unwrap();
        let _ = unpacked(&with_good_sums(stream), &root, BOUNDS);
        prop_assert_eq!(fs::read(place.path().join("outside")).unwrap(), b"as it was");
        prop_assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2);
    }
}
