//! What a stream has come to so far: counted, told, and its data put into files on the way.

use std::io::Read;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::uio::pwrite;

use crate::error::{Error, Result};
use crate::limits::BUFFER_BYTES;
use crate::read::Reader;
use crate::{Progress, Summary};

pub(crate) struct Tally<'a> {
    pub(crate) summary: Summary,
    progress: Progress<'a>,
    buffer: Vec<u8>,
}

impl<'a> Tally<'a> {
    pub(crate) fn new(progress: Progress<'a>) -> Self {
        Self {
            summary: Summary::default(),
            progress,
            buffer: vec![0; BUFFER_BYTES],
        }
    }

    /// Says how far it is, of `total` bytes or of 0 where that is not known.
    pub(crate) fn tell(&mut self, total: u64) -> Result<()> {
        if (self.progress)(self.summary.bytes, total) {
            Ok(())
        } else {
            Err(Error::Cancelled)
        }
    }

    /// Puts the next `length` bytes of the entry's data into its file, from `at` on.
    pub(crate) fn fill(
        &mut self,
        file: &OwnedFd,
        path: &[u8],
        mut at: u64,
        length: u64,
        reader: &mut Reader<impl Read>,
    ) -> Result<()> {
        let end = at + length;
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let want = self.buffer.len().min(left);
            let got = reader.data(&mut self.buffer[..want])?;
            if got == 0 {
                return Err(Error::refused(path, "it is shorter than it says"));
            }
            write_all(file, &self.buffer[..got], at).map_err(|errno| Error::file(path, errno))?;
            at += got as u64;
            self.summary.bytes += got as u64;
            self.tell(reader.total())?;
        }
        Ok(())
    }
}

fn write_all(file: &OwnedFd, mut data: &[u8], mut at: u64) -> std::result::Result<(), Errno> {
    while !data.is_empty() {
        match pwrite(file, data, at as i64) {
            Ok(0) => return Err(Errno::EIO),
            Ok(count) => {
                at += count as u64;
                data = &data[count..];
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
