//! Writes a stream: POSIX tar with extended headers, sparse files as GNU tar 1.0.

use std::io::Write;

use tar::{EntryType, Header};

use crate::entry::{Entry, Kind};
use crate::error::{Error, Result};
use crate::meta::Instant;

pub(crate) const BLOCK: usize = 512;
pub(crate) const TOTAL: &str = "DIAPAUSE.total";
const SHORT_NAME: usize = 100;
/// The largest owner's number that fits the field as octal digits, which every reader knows.
const OCTAL_ID_MAX: u64 = 0o777_7777;
const OCTAL_SIZE_MAX: u64 = 0o777_7777_7777;

/// Writes entries, one after the other; the data of a file follows its entry.
pub struct Writer<W: Write> {
    out: W,
    owed: u64,
    padding: usize,
}

impl<W: Write> Writer<W> {
    /// Begins a stream; `total` is the sum of all files' data, for whoever shows progress.
    pub fn new(out: W, total: u64) -> Result<Self> {
        let mut writer = Self {
            out,
            owed: 0,
            padding: 0,
        };
        if total > 0 {
            let mut records = Vec::new();
            record(&mut records, TOTAL, total.to_string().as_bytes());
            writer.extended(EntryType::XGlobalHeader, &records)?;
        }
        Ok(writer)
    }

    /// Writes an entry. All the data of the one before must have been written.
    pub fn entry(&mut self, entry: &Entry) -> Result<()> {
        assert_eq!(self.owed, 0, "the entry before is not whole");
        let mut header = Header::new_ustar();
        let mut records = Vec::new();
        name(
            &mut header.as_old_mut().name,
            &entry.path,
            "path",
            &mut records,
        );
        header.set_mode(entry.meta.mode & 0o7777);
        number(entry.meta.uid, OCTAL_ID_MAX, "uid", &mut records, |n| {
            header.set_uid(n)
        });
        number(entry.meta.gid, OCTAL_ID_MAX, "gid", &mut records, |n| {
            header.set_gid(n)
        });
        instant(&mut records, "mtime", entry.meta.modified);
        instant(&mut records, "atime", entry.meta.accessed);
        header.set_mtime(u64::try_from(entry.meta.modified.0).unwrap_or(0) & OCTAL_SIZE_MAX);
        let mut front = Vec::new();
        match &entry.kind {
            Kind::Directory => header.set_entry_type(EntryType::Directory),
            Kind::File { size, map } => {
                header.set_entry_type(EntryType::Regular);
                if let Some(map) = map {
                    record(&mut records, "GNU.sparse.major", b"1");
                    record(&mut records, "GNU.sparse.minor", b"0");
                    record(&mut records, "GNU.sparse.name", &entry.path);
                    record(
                        &mut records,
                        "GNU.sparse.realsize",
                        size.to_string().as_bytes(),
                    );
                    front = padded(map.encode());
                }
            }
            Kind::Symlink(target) => {
                header.set_entry_type(EntryType::Symlink);
                name(
                    &mut header.as_old_mut().linkname,
                    target,
                    "linkpath",
                    &mut records,
                );
            }
            Kind::Hardlink(target) => {
                header.set_entry_type(EntryType::Link);
                name(
                    &mut header.as_old_mut().linkname,
                    target,
                    "linkpath",
                    &mut records,
                );
            }
            Kind::Special(_) => return Err(Error::refused(&entry.path, "it is no file")),
        }
        self.owed = entry.data_bytes();
        let size = self.owed + front.len() as u64;
        number(size, OCTAL_SIZE_MAX, "size", &mut records, |n| {
            header.set_size(n)
        });
        self.extended(EntryType::XHeader, &records)?;
        header.set_cksum();
        self.put(header.as_bytes())?;
        self.put(&front)?;
        self.padding = (BLOCK - (size % BLOCK as u64) as usize) % BLOCK;
        self.pad_if_whole()
    }

    /// Writes data of the last entry, no more than it declared.
    pub fn data(&mut self, bytes: &[u8]) -> Result<()> {
        self.owed = (self.owed.checked_sub(bytes.len() as u64)).expect("more data than declared");
        self.put(bytes)?;
        self.pad_if_whole()
    }

    /// Ends the stream: one without its end is refused.
    pub fn finish(mut self) -> Result<()> {
        assert_eq!(self.owed, 0, "the last entry is not whole");
        self.put(&[0; 2 * BLOCK])?;
        self.out.flush().map_err(Error::Stream)
    }

    fn pad_if_whole(&mut self) -> Result<()> {
        if self.owed > 0 {
            return Ok(());
        }
        let padding = std::mem::take(&mut self.padding);
        self.put(&[0; BLOCK][..padding])
    }

    fn extended(&mut self, kind: EntryType, records: &[u8]) -> Result<()> {
        let mut header = Header::new_ustar();
        header.as_old_mut().name[..12].copy_from_slice(b"@PaxHeader@@");
        header.set_entry_type(kind);
        header.set_mode(0o600);
        header.set_size(records.len() as u64);
        header.set_cksum();
        self.put(header.as_bytes())?;
        self.put(&padded(records.to_vec()))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(Error::Stream)
    }
}

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().div_ceil(BLOCK) * BLOCK, 0);
    bytes
}

/// A name that fits its field stands there; any other in the extended header, the field cut.
fn name(field: &mut [u8; SHORT_NAME], value: &[u8], key: &str, records: &mut Vec<u8>) {
    let short = &value[..value.len().min(SHORT_NAME)];
    field[..short.len()].copy_from_slice(short);
    if value.len() > SHORT_NAME || !value.is_ascii() {
        if std::str::from_utf8(value).is_err() {
            // Readers that decode names would refuse the whole stream.
            record(records, "hdrcharset", b"BINARY");
        }
        record(records, key, value);
    }
}

fn number(value: u64, octal_max: u64, key: &str, records: &mut Vec<u8>, set: impl FnOnce(u64)) {
    set(value.min(octal_max));
    if value > octal_max {
        record(records, key, value.to_string().as_bytes());
    }
}

fn instant(records: &mut Vec<u8>, key: &str, (seconds, nanoseconds): Instant) {
    // Before 1970 the fraction still counts upwards for the kernel, but not as a decimal number.
    let text = match (seconds, nanoseconds) {
        (_, 0) => format!("{seconds}"),
        (0.., _) => format!("{seconds}.{nanoseconds:09}"),
        (-1, _) => format!("-0.{:09}", 1_000_000_000 - nanoseconds),
        _ => format!("{}.{:09}", seconds + 1, 1_000_000_000 - nanoseconds),
    };
    record(records, key, text.as_bytes());
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3; // the space, the equals sign, the line end
    let mut length = rest;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} {key}=").as_bytes());
    records.extend_from_slice(value);
    records.push(b'\n');
}
