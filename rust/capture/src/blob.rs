//! Write-once files: a temporary file, fsync, rename, fsync of the directory.
//!
//! Invariant: a [`NewFile`] that was not published is unlinked when it is dropped, whatever the
//! reason, so a failure leaves nothing and a crash leaves at most a file in the temporary
//! directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use diapause_format::FormatError;

use crate::error::{Error, Result};

static NAMES: AtomicU64 = AtomicU64::new(0);

/// A file that does not exist for anybody else yet.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    file: File,
    published: bool,
    /// About how much it will take, for whoever finds the disk full.
    needed_bytes: u64,
}

impl NewFile {
    /// Creates `path`, which must not exist, readable by its owner alone.
    ///
    /// # Errors
    /// Storage, also when it exists.
    pub fn create(path: &Path) -> Result<Self> {
        let file = create_new(path).map_err(|cause| Error::write_failed(path, 0, cause))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            published: false,
            needed_bytes: 0,
        })
    }

    /// Creates a file of a new name in `directory`.
    ///
    /// # Errors
    /// Storage.
    pub fn create_in(directory: &Path, stem: &str) -> Result<Self> {
        loop {
            let number = NAMES.fetch_add(1, Ordering::Relaxed);
            let path = directory.join(format!("{stem}.{}.{number}", std::process::id()));
            match create_new(&path) {
                Ok(file) => {
                    return Ok(Self {
                        path,
                        file,
                        published: false,
                        needed_bytes: 0,
                    })
                }
                // Left by a process of this number that was killed.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(cause) => return Err(Error::write_failed(directory, 0, cause)),
            }
        }
    }

    /// Creates a file beside `path`, to be published there.
    ///
    /// # Errors
    /// Storage; invalid when `path` names no file.
    pub fn create_for(path: &Path) -> Result<Self> {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| Error::Invalid(format!("{} is no file", path.display())))?;
        Self::create_in(directory_of(path), &format!("{name}.tmp"))
    }

    /// Says about how much the file will take.
    #[must_use]
    pub fn needing(mut self, needed_bytes: u64) -> Self {
        self.needed_bytes = needed_bytes;
        self
    }

    /// What a failed write of it is.
    pub fn write_failed(&self, cause: io::Error) -> Error {
        Error::write_failed(&self.path, self.needed_bytes, cause)
    }

    /// Where it is now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, for positioned I/O.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes its bytes durable.
    ///
    /// # Errors
    /// Storage.
    pub fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|cause| self.write_failed(cause))
    }

    /// Gives a synced file its name, durably.
    ///
    /// # Errors
    /// Storage; the file is at one of the two names then.
    pub fn publish(mut self, to: &Path) -> Result<()> {
        fs::rename(&self.path, to).map_err(|cause| Error::write_failed(to, 0, cause))?;
        self.published = true;
        sync_directory_of(to)
    }

    /// Leaves it where it is.
    pub fn keep(mut self) {
        self.published = true;
    }

    /// What writing this file through a format reported: its own I/O, or a limit of the format.
    pub fn error(&self, error: FormatError) -> Error {
        match error {
            FormatError::Io(cause) => {
                let cause = WriteFailed::unmark(cause).unwrap_or_else(|other| other);
                self.write_failed(cause)
            }
            limit => Error::Invalid(limit.to_string()),
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.published {
            // Nothing better can be done about a failure here: what failed before is being
            // reported.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Write for &NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&self.file).write(bytes).map_err(WriteFailed::mark)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for &NewFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        (&self.file).seek(to).map_err(WriteFailed::mark)
    }
}

/// Marks an I/O error as one of writing, where one call reads one file and writes another.
#[derive(Debug)]
pub(crate) struct WriteFailed(pub(crate) io::Error);

impl WriteFailed {
    fn mark(error: io::Error) -> io::Error {
        if error.kind() == io::ErrorKind::Interrupted {
            return error;
        }
        io::Error::new(error.kind(), Self(error))
    }

    /// The unmarked error, if `error` was one of writing.
    pub(crate) fn unmark(error: io::Error) -> std::result::Result<io::Error, io::Error> {
        error.downcast::<Self>().map(|marked| marked.0)
    }
}

impl std::fmt::Display for WriteFailed {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(to)
    }
}

impl std::error::Error for WriteFailed {}

fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Makes the names in the directory of `path` durable.
///
/// # Errors
/// Storage.
pub fn sync_directory_of(path: &Path) -> Result<()> {
    let directory = directory_of(path);
    let synced = File::open(directory).and_then(|opened| opened.sync_all());
    synced.map_err(|cause| Error::write_failed(directory, 0, cause))
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// BLAKE3-256 of a file, streamed.
///
/// # Errors
/// Missing, damaged (unreadable), storage.
pub fn digest_file(path: &Path) -> Result<diapause_format::Digest> {
    let name = path.display().to_string();
    let mut file = File::open(path).map_err(|cause| Error::read_failed(&name, path, cause))?;
    let mut hash = blake3::Hasher::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(*hash.finalize().as_bytes()),
            Ok(length) => hash.update(&chunk[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(cause) => return Err(Error::read_failed(&name, path, cause)),
        };
    }
}
