//! How much of the files of another process the page cache has.
//!
//! The files may be served by a process that is slow, stuck or dead, so nothing is asked of it:
//! `pidfd_getfd` hands out the other's open file, and `cachestat` (Linux 6.5) only looks at its
//! pages. An `open`, and on some servers a `close`, would be a request.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::scan::PAGE_SIZE;

/// Linux 6.5; not in every libc.
const SYS_CACHESTAT: libc::c_long = 451;

/// What the page cache has of a file that a process has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cached {
    /// Bytes; None where the file behind can't be told.
    pub bytes: Option<u64>,
    /// Whether it is passed through: its bytes are in the page cache as another file's.
    pub passed: bool,
}

/// What the page cache has of each file that a process has open, by its name and the path of the
/// file that it may be passed through to; None for one that it has not open.
///
/// # Errors
/// What the kernel says: the process is gone, not ours to look at, or the kernel can't tell.
pub fn cached_bytes(pid: i32, files: &[(String, String)]) -> io::Result<Vec<Option<Cached>>> {
    // SAFETY: only numbers are passed.
    let process = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let open = open_files(pid)?;
    files
        .iter()
        .map(
            |(name, behind)| match open.iter().find(|(file, _)| file == name) {
                Some((_, fd)) => look(&borrowed(&process, *fd)?, behind).map(Some),
                None => Ok(None),
            },
        )
        .collect()
}

/// A served file has no time. One that is passed through has that of the file behind it, by which
/// it is known from another that took its place.
fn look(file: &OwnedFd, behind: &str) -> io::Result<Cached> {
    let time = modified(file)?;
    if time == (0, 0) {
        let bytes = Some(cached(file)?);
        return Ok(Cached {
            bytes,
            passed: false,
        });
    }
    let behind = fs::File::open(behind).map(OwnedFd::from);
    let same = behind
        .ok()
        .filter(|file| modified(file).is_ok_and(|of| of == time));
    let bytes = same.map(|file| cached(&file)).transpose()?;
    Ok(Cached {
        bytes,
        passed: true,
    })
}

/// When a file was written, as far as the kernel knows without asking a server.
fn modified(file: &OwnedFd) -> io::Result<(i64, u32)> {
    // SAFETY: all zeros is a value of this plain structure.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    let (fd, mask) = (file.as_raw_fd(), libc::STATX_MTIME);
    // SAFETY: the path is NUL-terminated, the structure is the kernel's, both outlive the call.
    match unsafe { libc::statx(fd, c"".as_ptr(), flags, mask, &raw mut found) } {
        0 => Ok((found.stx_mtime.tv_sec, found.stx_mtime.tv_nsec)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The last parts of the names of all files that a process has open, and their numbers there.
fn open_files(pid: i32) -> io::Result<Vec<(String, i32)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        // One that was closed meanwhile is none.
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let number = entry.file_name().to_string_lossy().parse().ok();
        if let (Some(name), Some(number)) = (target.file_name(), number) {
            let name = name.to_string_lossy();
            // One whose name leads to another node by now.
            let name = name.strip_suffix(" (deleted)").unwrap_or(&name);
            found.push((name.to_owned(), number));
        }
    }
    Ok(found)
}

/// An open file of another process.
fn borrowed(process: &OwnedFd, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: only numbers are passed.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) })
}

fn cached(file: &OwnedFd) -> io::Result<u64> {
    let whole = [0_u64, 0]; // a range of length 0 goes to the end
                            // Pages: cached, dirty, in writeback, evicted, recently evicted.
    let mut counts = [0_u64; 5];
    // SAFETY: the kernel reads two and writes five 64-bit numbers; both arrays outlive the call.
    let answer = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            whole.as_ptr(),
            counts.as_mut_ptr(),
            0,
        )
    };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(counts[0] * PAGE_SIZE)
}

fn owned(answer: libc::c_long) -> io::Result<OwnedFd> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(answer as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    fn here(names: [&str; 2], behind: &str) -> Vec<Option<Cached>> {
        let files = names.map(|name| (name.to_owned(), behind.to_owned()));
        cached_bytes(std::process::id() as i32, &files).unwrap()
    }

    fn written(bytes: usize) -> (tempfile::NamedTempFile, String) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let name = file.path().file_name().unwrap().to_string_lossy();
        let name = name.into_owned();
        file.write_all(&vec![1; bytes]).unwrap();
        file.as_file().sync_all().unwrap();
        file.rewind().unwrap();
        file.read_to_end(&mut Vec::new()).unwrap();
        (file, name)
    }

    #[test]
    fn what_the_cache_has_of_an_open_file_is_counted() {
        let (file, name) = written(64 * 4096);
        // As the pager serves: without a time.
        file.as_file().set_modified(std::time::UNIX_EPOCH).unwrap();
        let served = Cached {
            bytes: Some(64 * 4096),
            passed: false,
        };
        assert_eq!(
            here([&name, "nobody-has-this-open"], "/nowhere"),
            [Some(served), None]
        );
        assert!(cached_bytes(i32::MAX, &[]).is_err());
    }

    #[test]
    fn of_one_that_is_passed_through_the_file_behind_is_counted() {
        let (file, name) = written(4096);
        let (behind, _) = written(8 * 4096);
        let path = behind.path().to_str().unwrap();
        let passed = |bytes| {
            Some(Cached {
                bytes,
                passed: true,
            })
        };
        // Another file has taken the place of the one behind.
        let earlier = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1);
        behind.as_file().set_modified(earlier).unwrap();
        assert_eq!(here([&name, "nobody"], path), [passed(None), None]);
        let time = file.as_file().metadata().unwrap().modified().unwrap();
        behind.as_file().set_modified(time).unwrap();
        assert_eq!(
            here([&name, "nobody"], path),
            [passed(Some(8 * 4096)), None]
        );
        drop(behind);
        assert_eq!(here([&name, "nobody"], "/nowhere"), [passed(None), None]);
    }
}
