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

/// Bytes in the page cache of each named file that a process has open; None for one that it has
/// not open.
///
/// # Errors
/// What the kernel says: the process is gone, not ours to look at, or the kernel can't tell.
pub fn cached_bytes(pid: i32, names: &[String]) -> io::Result<Vec<Option<u64>>> {
    // SAFETY: only numbers are passed.
    let process = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let open = open_files(pid)?;
    names
        .iter()
        .map(|name| match open.iter().find(|(file, _)| file == name) {
            Some((_, fd)) => cached(&borrowed(&process, *fd)?).map(Some),
            None => Ok(None),
        })
        .collect()
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
            found.push((name.to_string_lossy().into_owned(), number));
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

    #[test]
    fn what_the_cache_has_of_an_open_file_is_counted() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let name = file.path().file_name().unwrap().to_string_lossy();
        let names = [name.into_owned(), "nobody-has-this-open".to_owned()];
        let pid = std::process::id() as i32;
        file.write_all(&vec![1; 64 * 4096]).unwrap();
        file.as_file().sync_all().unwrap();
        file.rewind().unwrap();
        file.read_to_end(&mut Vec::new()).unwrap();
        let found = cached_bytes(pid, &names).unwrap();
        assert_eq!(found, [Some(64 * 4096), None]);
        assert!(cached_bytes(i32::MAX, &names).is_err());
    }
}
