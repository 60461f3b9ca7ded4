//! A local directory, a file for each blob.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{posix_fadvise, PosixFadviseAdvice};
use nix::sys::uio::preadv;

use super::{Blob, BlobError, BlobSource, Medium, Opened};

const LOCAL: Medium = Medium {
    name: "local",
    window_bytes: 64 << 10,
    parallel: 1,
};

/// A local directory, a file for each blob.
#[derive(Debug)]
pub struct Directory(pub PathBuf);

#[derive(Debug)]
struct LocalFile {
    file: File,
    size_bytes: u64,
}

impl BlobSource for Directory {
    fn open_with_end(&self, name: &str, _end_bytes: u64) -> Result<Opened, BlobError> {
        let file = File::open(self.0.join(name))?;
        let size_bytes = file.metadata()?.len();
        Ok(Opened {
            blob: Box::new(LocalFile { file, size_bytes }),
            end: Vec::new(),
        })
    }

    fn medium(&self) -> Medium {
        LOCAL
    }
}

impl Blob for LocalFile {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn medium(&self) -> Medium {
        LOCAL
    }

    /// Always a copy into the caller's memory, never a mapping of the file: what was verified must
    /// stay what it is until it was served, whatever happens to the file meanwhile, and a file cut
    /// short must be an error and not SIGBUS.
    fn read_into(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<(), BlobError> {
        let (mut rest, mut at) = (into, offset);
        IoSliceMut::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let from = i64::try_from(at).map_err(|_| BlobError::Short)?;
            match preadv(&self.file, rest, from) {
                Ok(0) => return Err(BlobError::Short),
                Ok(read) => {
                    IoSliceMut::advance_slices(&mut rest, read);
                    at += read as u64;
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(())
    }

    fn will_need(&self, offset: u64, length: u64) {
        let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else {
            return;
        };
        // A hint: where it fails, the read itself says what is wrong.
        let _ = posix_fadvise(
            &self.file,
            offset,
            length,
            PosixFadviseAdvice::POSIX_FADV_WILLNEED,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(bytes: &[u8]) -> (tempfile::TempDir, Box<dyn Blob>) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a"), bytes).unwrap();
        let blob = Directory(directory.path().to_owned()).open("a").unwrap();
        (directory, blob)
    }

    #[test]
    fn several_buffers_are_filled_one_after_the_other() {
        let bytes: Vec<u8> = (0..200).collect();
        let (_kept, blob) = blob(&bytes);
        let (mut a, mut b, mut c) = ([0; 7], [], [0; 90]);
        let mut into = [&mut a[..], &mut b[..], &mut c[..]].map(IoSliceMut::new);
        blob.read_into(5, &mut into).unwrap();
        blob.read_into(5, &mut []).unwrap();
        assert_eq!((&a[..], &c[..]), (&bytes[5..12], &bytes[12..102]));
        assert_eq!(blob.size_bytes(), 200);
        let mut streamed = Vec::new();
        let mut stream = blob.stream(190, 10).unwrap();
        io::Read::read_to_end(&mut stream, &mut streamed).unwrap();
        assert_eq!(streamed, &bytes[190..]);
    }

    #[test]
    fn the_end_of_the_file_and_a_file_that_is_not_there_are_errors() {
        let (kept, blob) = blob(&[1; 100]);
        let mut into = [0; 10];
        assert_eq!(blob.read_at(91, &mut into), Err(BlobError::Short));
        assert_eq!(blob.read_at(u64::MAX, &mut into), Err(BlobError::Short));
        let missing = Directory(kept.path().to_owned()).open("b").err();
        assert_eq!(missing, Some(BlobError::Missing));
        let directory = Directory("/proc/self".into()).open("fd").unwrap();
        let refused = directory.read_at(0, &mut into).unwrap_err();
        assert!(matches!(refused, BlobError::Unavailable(_)), "{refused}");
    }
}
