//! Clones a plain sparse file: shared blocks where the file system can, else a copy of its data
//! alone.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::copy_file_range;

use crate::source::data_segments;

/// Makes `to`, which is empty and of `size_bytes`, hold what `from` does. Returns the bytes copied.
///
/// # Errors
/// What the kernel says.
pub(crate) fn clone_file(from: &File, to: &File, size_bytes: u64) -> io::Result<u64> {
    if share_blocks(from, to) {
        return Ok(size_bytes);
    }
    let mut copied = 0;
    for (start, end) in data_segments(from, size_bytes)? {
        copy_segment(from, to, start, end)?;
        copied += end - start;
    }
    Ok(copied)
}

fn share_blocks(from: &File, to: &File) -> bool {
    // SAFETY: the ioctl takes two open descriptors and touches no memory of this process.
    unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) == 0 }
}

fn copy_segment(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut from_at, mut to_at) = (start as i64, start as i64);
    while (from_at as u64) < end {
        let left = (end - from_at as u64) as usize;
        match copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::EINTR) => {}
            // Two file systems, or one that can't: through this process.
            Err(Errno::EXDEV | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {
                return copy_through(from, to, from_at as u64, end)
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_through(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut chunk = vec![0; (end - start).min(1 << 20) as usize];
    let mut at = start;
    while at < end {
        let length = ((end - at) as usize).min(chunk.len());
        from.read_exact_at(&mut chunk[..length], at)?;
        to.write_all_at(&chunk[..length], at)?;
        at += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn holes_stay_holes_either_way() {
        let from = tempfile::tempfile().unwrap();
        from.set_len(64 << 20).unwrap();
        from.write_all_at(&[7; 8192], 4 << 20).unwrap();
        from.write_all_at(&[9; 4096], (64 << 20) - 4096).unwrap();
        for through in [false, true] {
            let to = tempfile::tempfile().unwrap();
            to.set_len(64 << 20).unwrap();
            if through {
                copy_through(&from, &to, 4 << 20, (4 << 20) + 8192).unwrap();
                copy_through(&from, &to, (64 << 20) - 4096, 64 << 20).unwrap();
            } else {
                clone_file(&from, &to, 64 << 20).unwrap();
            }
            let mut byte = [0];
            for (at, expected) in [
                (0, 0),
                (4 << 20, 7),
                ((4 << 20) + 8192, 0),
                ((64 << 20) - 1, 9),
            ] {
                to.read_exact_at(&mut byte, at).unwrap();
                assert_eq!(byte[0], expected);
            }
            assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20);
        }
    }
}
