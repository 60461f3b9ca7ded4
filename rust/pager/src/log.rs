//! What the two processes say goes to one file, their standard error; a large one is set aside.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{fstat, SFlag};

/// Sets a log of so many bytes aside, as `NAME.1`, and goes on in a new one; that file, for the
/// other process. None where it is smaller, or no file.
///
/// # Errors
/// What the kernel says; the old one is written on then.
pub fn turn(bytes_max: u64) -> io::Result<Option<OwnedFd>> {
    let found = fstat(io::stderr().as_fd())?;
    let is_file = found.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits();
    if !is_file || found.st_size.unsigned_abs() < bytes_max {
        return Ok(None);
    }
    let fresh = set_aside(&fs::read_link("/proc/self/fd/2")?)?;
    go_on_in(&fresh)?;
    Ok(Some(fresh))
}

/// Writes on in this file from now on.
///
/// # Errors
/// Why not, in words.
pub fn go_on(file: &OwnedFd) -> Result<(), String> {
    go_on_in(file).map_err(|error| error.to_string())
}

fn go_on_in(file: &OwnedFd) -> io::Result<()> {
    // SAFETY: both are open, and standard error is nobody's in particular.
    Errno::result(unsafe { libc::dup2(file.as_raw_fd(), libc::STDERR_FILENO) })?;
    Ok(())
}

fn set_aside(log: &Path) -> io::Result<OwnedFd> {
    let mut aside = log.as_os_str().to_owned();
    aside.push(".1");
    fs::rename(log, PathBuf::from(aside))?;
    let fresh = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(log)?;
    Ok(fresh.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_kept_beside_the_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("pager.log");
        for text in ["first", "second"] {
            fs::write(&log, text).unwrap();
            let fresh = set_aside(&log).unwrap();
            nix::unistd::write(&fresh, b"more").unwrap();
            assert_eq!(fs::read_to_string(&log).unwrap(), "more");
            let aside = directory.path().join("pager.log.1");
            assert_eq!(fs::read_to_string(aside).unwrap(), text);
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }
}
