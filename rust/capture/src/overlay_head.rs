//! The head of a qcow2 overlay, looked at before any tool opens the file.
//!
//! A VMM wrote it, whose guest may have taken it over: a head that names other files would have
//! whoever reads the overlay open them. Refused is also what no overlay of ours has and what would
//! change the meaning of its clusters.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};

/// The part of the head that is looked at.
const HEAD_LEN: usize = 104;
/// QEMU's, not ours.
const MAGIC: [u8; 4] = [b'Q', b'F', b'I', 0xfb];
const VERSION: u32 = 3;
/// Incompatible features: the image was open when its writer died; clusters have subclusters.
const DIRTY: u64 = 1 << 0;
const EXTENDED_L2: u64 = 1 << 4;
/// Incompatible feature: QEMU itself found it to be corrupt.
const CORRUPT: u64 = 1 << 1;

/// Refuses an overlay that is not one of a device of `device_bytes`, as Diapause makes them; while
/// a disk is `folding` its head says what is below it.
///
/// # Errors
/// Missing, damaged, storage.
pub fn check_overlay_head(path: &Path, device_bytes: u64, folding: bool) -> Result<()> {
    let name = path.display().to_string();
    let failed = |cause| Error::read_failed(&name, path, cause);
    let mut head = [0; HEAD_LEN];
    let file = File::open(path).map_err(failed)?;
    file.read_exact_at(&mut head, 0).map_err(failed)?;
    check_head(&head, device_bytes, folding).map_err(|cause| Error::Damaged { blob: name, cause })
}

fn check_head(
    head: &[u8; HEAD_LEN],
    device_bytes: u64,
    folding: bool,
) -> std::result::Result<(), String> {
    let u32_at = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&head[at..at + 4]);
        u32::from_be_bytes(bytes)
    };
    let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
    let refused = [
        (head[..4] != MAGIC, "it is no qcow2 image"),
        (u32_at(4) != VERSION, "its version is not 3"),
        (u64_at(8) != 0 && !folding, "it names a file below it"),
        (!(9..=21).contains(&u32_at(20)), "its cluster size can't be"),
        (
            u64_at(24) != device_bytes,
            "it is of another size than its disk",
        ),
        (u32_at(32) != 0, "it says that it is encrypted"),
        (u32_at(60) != 0, "it has snapshots of its own"),
        (u64_at(72) & CORRUPT != 0, "it is marked as corrupt"),
        (
            u64_at(72) & !(DIRTY | CORRUPT | EXTENDED_L2) != 0,
            "it has features that no overlay of ours has",
        ),
    ];
    match refused.iter().find(|(wrong, _)| *wrong) {
        Some((_, cause)) => Err((*cause).to_owned()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> [u8; HEAD_LEN] {
        let mut head = [0; HEAD_LEN];
        head[..4].copy_from_slice(&MAGIC);
        head[7] = 3;
        head[23] = 17;
        head[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        head[79] = EXTENDED_L2 as u8;
        head
    }

    #[test]
    fn what_names_other_files_or_means_something_else_is_refused() {
        assert_eq!(check_head(&sound(), 1 << 30, false), Ok(()));
        let refused = [
            (0, b'X', "no qcow2"),
            (7, 2, "version"),
            (15, 1, "below it"),
            (23, 8, "cluster size"),
            (23, 22, "cluster size"),
            (31, 1, "another size"),
            (35, 1, "encrypted"),
            (63, 1, "snapshots"),
            (79, 1 << 1, "corrupt"),
            (79, 1 << 2, "features"),
            (79, 1 << 3, "features"),
            (72, 1, "features"),
        ];
        for (at, byte, word) in refused {
            let mut head = sound();
            head[at] = byte;
            let cause = check_head(&head, 1 << 30, false).unwrap_err();
            assert!(cause.contains(word), "{cause}");
        }
        let mut standing = sound();
        standing[15] = 104;
        assert_eq!(check_head(&standing, 1 << 30, true), Ok(()));
    }

    #[test]
    fn a_file_that_is_too_short_is_damaged() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), MAGIC).unwrap();
        let error = check_overlay_head(file.path(), 1 << 30, false).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }));
    }
}
