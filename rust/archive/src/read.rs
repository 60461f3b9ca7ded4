//! Reads a stream that anybody may have written.
//!
//! Understood: POSIX tar with extended headers, GNU's long names and its sparse format 1.0. Refused
//! by name: devices and pipes outside of images, every other kind, and whatever exceeds `limits`.

use std::io::{ErrorKind, Read};

use tar::{EntryType, Header};

use crate::entry::{Entry, Kind, Special};
use crate::error::{Error, Result};
use crate::limits::{
    ENTRIES_MAX, EXTENDED_BYTES_MAX, FILE_BYTES_MAX, LINK_MAX, PADDING_BYTES_MAX, PATH_MAX,
    STREAM_BYTES_MAX,
};
use crate::meta::{Instant, Meta};
use crate::sparse::MapParser;
use crate::write::{BLOCK, TOTAL};

const ATTRIBUTE: &[u8] = b"SCHILY.xattr.";

/// An extended attribute: its name and its value.
pub type Attribute = (Vec<u8>, Vec<u8>);

/// What the extended headers before an entry say of it.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    modified: Option<Instant>,
    accessed: Option<Instant>,
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    sparse_major: Option<u64>,
    other_sparse: bool,
    attributes: Vec<Attribute>,
    seen: bool,
}

/// Reads entries, one after the other; the data of a file is read before the next entry.
pub struct Reader<R: Read> {
    input: R,
    owed: u64,
    padding: usize,
    entries: u64,
    bytes: u64,
    total: u64,
    name: Vec<u8>,
    ended: bool,
    of_image: bool,
    attributes: Vec<Attribute>,
}

impl<R: Read> Reader<R> {
    /// Begins to read.
    pub fn new(input: R) -> Self {
        Self {
            input,
            owed: 0,
            padding: 0,
            entries: 0,
            bytes: 0,
            total: 0,
            name: Vec::new(),
            ended: false,
            of_image: false,
            attributes: Vec::new(),
        }
    }

    /// Begins to read a root file system, which may hold devices and extended attributes.
    pub fn of_image(input: R) -> Self {
        Self {
            of_image: true,
            ..Self::new(input)
        }
    }

    /// The extended attributes of the last entry, of an image.
    pub fn attributes(&mut self) -> Vec<Attribute> {
        std::mem::take(&mut self.attributes)
    }

    /// What the stream says that its data comes to; it may lie. 0: it does not say.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The next entry; None at the stream's end, after which there is nothing.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        if self.ended {
            return Ok(None);
        }
        assert_eq!(self.owed, 0, "the entry before was not read");
        self.skip_padding()?;
        let mut extended = Extended::default();
        loop {
            let Some(header) = self.header()? else {
                if extended.seen {
                    return Err(self.refuse("an extended header stands before the end"));
                }
                self.end()?;
                return Ok(None);
            };
            let kind = header.entry_type();
            match kind {
                EntryType::XGlobalHeader => {
                    let records = self.records(&header)?;
                    self.take_global(&records)?;
                }
                EntryType::XHeader => {
                    let records = self.records(&header)?;
                    extended.seen = true;
                    self.take_records(&records, &mut extended)?;
                }
                EntryType::GNULongName | EntryType::GNULongLink => {
                    let mut text = self.records(&header)?;
                    text.truncate(text.iter().position(|b| *b == 0).unwrap_or(text.len()));
                    extended.seen = true;
                    if kind == EntryType::GNULongName {
                        extended.path = Some(text);
                    } else {
                        extended.link = Some(text);
                    }
                }
                _ => return self.entry(&header, extended).map(Some),
            }
        }
    }

    /// Reads data of the last entry into `buffer`; 0 once there is no more.
    pub fn data(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let want = buffer
            .len()
            .min(usize::try_from(self.owed).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        loop {
            match self.input.read(&mut buffer[..want]) {
                Ok(0) => return Err(self.truncated()),
                Ok(count) => {
                    self.owed -= count as u64;
                    return Ok(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Stream(error)),
            }
        }
    }

    // One entry from its header.

    fn entry(&mut self, header: &Header, mut extended: Extended) -> Result<Entry> {
        self.attributes = std::mem::take(&mut extended.attributes);
        let plain = header.path_bytes().into_owned();
        self.name = extended
            .sparse_name
            .clone()
            .or(extended.path.clone())
            .unwrap_or(plain);
        if self.name.len() > PATH_MAX {
            return Err(self.refuse(&format!("its name is longer than {PATH_MAX} bytes")));
        }
        self.entries += 1;
        if self.entries > ENTRIES_MAX {
            return Err(self.refuse(&format!("there are more than {ENTRIES_MAX} entries")));
        }
        let size = match extended.size {
            Some(size) => size,
            None => self.number(header.entry_size(), "size")?,
        };
        let meta = self.meta(header, &extended)?;
        let kind = self.kind(header, &extended, size)?;
        let entry = Entry {
            path: self.name.clone(),
            kind,
            meta,
        };
        self.bytes = self.bytes.saturating_add(entry.data_bytes());
        if self.bytes > STREAM_BYTES_MAX {
            return Err(self.refuse(&format!("there are more than {STREAM_BYTES_MAX} bytes")));
        }
        Ok(entry)
    }

    fn kind(&mut self, header: &Header, extended: &Extended, size: u64) -> Result<Kind> {
        let link = extended.link.clone();
        let target = || {
            let found = link
                .clone()
                .or(header.link_name_bytes().map(|name| name.into_owned()));
            let found = found.unwrap_or_default();
            if found.is_empty() || found.len() > LINK_MAX || found.contains(&0) {
                return Err(self.refuse("the target of the link can't be one"));
            }
            Ok(found)
        };
        let kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous => return self.file(extended, size),
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink(target()?),
            EntryType::Link => Kind::Hardlink(target()?),
            EntryType::Block | EntryType::Char | EntryType::Fifo if self.of_image => {
                Kind::Special(self.special(header)?)
            }
            EntryType::Block | EntryType::Char => return Err(self.refuse("it is a device")),
            EntryType::Fifo => return Err(self.refuse("it is a named pipe")),
            EntryType::GNUSparse => return Err(self.refuse("it is sparse in a way not known here")),
            other => {
                let cause = format!("its kind, {:?}, is not known here", other.as_byte());
                return Err(self.refuse(&cause));
            }
        };
        if size != 0 {
            return Err(self.refuse("it has data and is no file"));
        }
        self.padding = 0;
        Ok(kind)
    }

    fn special(&self, header: &Header) -> Result<Special> {
        if header.entry_type() == EntryType::Fifo {
            return Ok(Special::Pipe);
        }
        // What the kernel's own numbers can hold.
        let part = |field: std::io::Result<Option<u32>>, bits: u32| match field {
            Ok(Some(number)) if number >> bits == 0 => Ok(number),
            _ => Err(self.refuse("its device numbers can't be ones")),
        };
        let major = part(header.device_major(), 12)?;
        let minor = part(header.device_minor(), 20)?;
        Ok(match header.entry_type() {
            EntryType::Char => Special::Character(major, minor),
            _ => Special::Block(major, minor),
        })
    }

    fn file(&mut self, extended: &Extended, stored: u64) -> Result<Kind> {
        let real = extended.sparse_size.unwrap_or(stored);
        if stored > FILE_BYTES_MAX || real > FILE_BYTES_MAX {
            return Err(self.refuse(&format!("it is larger than {FILE_BYTES_MAX} bytes")));
        }
        self.owed = stored;
        self.padding = padding(stored);
        let is_sparse = extended.sparse_major == Some(1) && extended.sparse_size.is_some();
        if !is_sparse {
            if extended.other_sparse || extended.sparse_major.is_some() {
                return Err(self.refuse("it is sparse in a way not known here"));
            }
            return Ok(Kind::File {
                size: stored,
                map: None,
            });
        }
        let mut parser = MapParser::default();
        let mut done = false;
        while !done {
            let mut block = [0; BLOCK];
            let mut filled = 0;
            while filled < BLOCK {
                match self.data(&mut block[filled..])? {
                    0 => return Err(self.refuse("its map of holes is cut off")),
                    count => filled += count,
                }
            }
            for byte in block {
                if parser.take(byte).map_err(|cause| self.refuse(cause))? {
                    done = true;
                    break;
                }
            }
        }
        let map = parser.finish(real).map_err(|cause| self.refuse(cause))?;
        if map.data_bytes() != self.owed {
            return Err(self.refuse("its map of holes contradicts its size"));
        }
        Ok(Kind::File {
            size: real,
            map: Some(map),
        })
    }

    fn meta(&self, header: &Header, extended: &Extended) -> Result<Meta> {
        let pick = |given: Option<u64>, field, what| match given {
            Some(number) => Ok(number),
            None => self.number(field, what),
        };
        let seconds = self.number(header.mtime(), "time")?;
        let seconds = i64::try_from(seconds).map_err(|_| self.refuse("its time can't be one"))?;
        let modified = extended.modified.unwrap_or((seconds, 0));
        Ok(Meta {
            mode: header
                .mode()
                .map_err(|_| self.refuse("its mode is no number"))?
                & 0o7777,
            uid: self.id(pick(extended.uid, header.uid(), "owner")?)?,
            gid: self.id(pick(extended.gid, header.gid(), "group")?)?,
            modified,
            accessed: extended.accessed.unwrap_or(modified),
        })
    }

    fn id(&self, number: u64) -> Result<u64> {
        if number >= u64::from(u32::MAX) {
            return Err(self.refuse("its owner can't be one"));
        }
        Ok(number)
    }

    fn number(&self, field: std::io::Result<u64>, what: &str) -> Result<u64> {
        field.map_err(|_| self.refuse(&format!("its {what} is no number")))
    }

    // Extended headers.

    fn records(&mut self, header: &Header) -> Result<Vec<u8>> {
        let size = self.number(header.entry_size(), "extended header's size")?;
        if size > EXTENDED_BYTES_MAX {
            let cause = format!("an extended header is larger than {EXTENDED_BYTES_MAX} bytes");
            return Err(self.refuse(&cause));
        }
        let mut records = vec![0; size as usize + padding(size)];
        self.fill(&mut records)?;
        records.truncate(size as usize);
        Ok(records)
    }

    fn take_global(&mut self, records: &[u8]) -> Result<()> {
        for (key, value) in split_records(records).map_err(|cause| self.refuse(cause))? {
            match key {
                key if key == TOTAL.as_bytes() && !self.of_image => {
                    self.total = decimal(value).unwrap_or(0);
                }
                // One that changes all that follows would make each entry lie.
                b"path" | b"linkpath" | b"size" | b"uid" | b"gid" => {
                    return Err(self.refuse("a global header sets what belongs to an entry"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn take_records(&mut self, records: &[u8], to: &mut Extended) -> Result<()> {
        for (key, value) in split_records(records).map_err(|cause| self.refuse(cause))? {
            let wrong = || self.refuse("an extended header holds what is no number");
            let number = || decimal(value).ok_or_else(wrong).map(Some);
            let time = || parse_instant(value).ok_or_else(wrong).map(Some);
            match key {
                b"path" => to.path = Some(value.to_vec()),
                b"linkpath" => to.link = Some(value.to_vec()),
                b"size" => to.size = number()?,
                b"uid" => to.uid = number()?,
                b"gid" => to.gid = number()?,
                b"mtime" => to.modified = time()?,
                b"atime" => to.accessed = time()?,
                b"GNU.sparse.name" => to.sparse_name = Some(value.to_vec()),
                b"GNU.sparse.realsize" => to.sparse_size = number()?,
                b"GNU.sparse.major" => to.sparse_major = number()?,
                b"GNU.sparse.minor" => {}
                key if key.starts_with(b"GNU.sparse.") => to.other_sparse = true,
                key if self.of_image && key.starts_with(ATTRIBUTE) => {
                    let name = key[ATTRIBUTE.len()..].to_vec();
                    to.attributes.push((name, value.to_vec()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    // Blocks.

    /// The next header; None for the first of the two zero blocks at the end.
    fn header(&mut self) -> Result<Option<Header>> {
        let mut block = [0; BLOCK];
        self.fill(&mut block)?;
        if block == [0; BLOCK] {
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block).clone();
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        let field: u32 = block[148..156].iter().map(|byte| u32::from(*byte)).sum();
        if header.cksum().ok() != Some(sum - field + 8 * 32) {
            return Err(self.refuse("what follows it is no tar header"));
        }
        Ok(Some(header))
    }

    /// Nothing but zeros may stand behind the end.
    fn end(&mut self) -> Result<()> {
        self.ended = true;
        let mut block = [0; BLOCK];
        self.fill(&mut block)?;
        let mut left = PADDING_BYTES_MAX;
        loop {
            if block.iter().any(|byte| *byte != 0) || left == 0 {
                return Err(self.refuse("something stands behind the end of the stream"));
            }
            match self.input.read(&mut block) {
                Ok(0) => return Ok(()),
                Ok(count) => {
                    left = left.saturating_sub(count as u64);
                    block[count..].fill(0);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Stream(error)),
            }
        }
    }

    fn skip_padding(&mut self) -> Result<()> {
        let padding = std::mem::take(&mut self.padding);
        self.fill(&mut [0; BLOCK][..padding])
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.input
            .read_exact(buffer)
            .map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => self.truncated(),
                _ => Error::Stream(error),
            })
    }

    fn refuse(&self, cause: &str) -> Error {
        Error::refused(&self.name, cause)
    }

    fn truncated(&self) -> Error {
        self.refuse("the stream ends before its end")
    }
}

fn padding(size: u64) -> usize {
    (BLOCK - (size % BLOCK as u64) as usize) % BLOCK
}

type Record<'a> = (&'a [u8], &'a [u8]);

fn split_records(mut records: &[u8]) -> std::result::Result<Vec<Record<'_>>, &'static str> {
    const WRONG: &str = "an extended header is malformed";
    let mut found = Vec::new();
    while !records.is_empty() {
        let space = records.iter().position(|b| *b == b' ').ok_or(WRONG)?;
        let length = decimal(&records[..space]).ok_or(WRONG)?;
        let length = usize::try_from(length).map_err(|_| WRONG)?;
        if length <= space + 1 || length > records.len() || records[length - 1] != b'\n' {
            return Err(WRONG);
        }
        let record = &records[space + 1..length - 1];
        let equals = record.iter().position(|b| *b == b'=').ok_or(WRONG)?;
        found.push((&record[..equals], &record[equals + 1..]));
        records = &records[length..];
    }
    Ok(found)
}

fn decimal(text: &[u8]) -> Option<u64> {
    let is_number = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    is_number.then(|| std::str::from_utf8(text).ok()?.parse().ok())?
}

/// Seconds with a fraction, as an instant whose nanoseconds count upwards.
fn parse_instant(text: &[u8]) -> Option<Instant> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let point = text.iter().position(|b| *b == b'.').unwrap_or(text.len());
    let seconds = i64::try_from(decimal(&text[..point])?).ok()?;
    let fraction = text.get(point + 1..).unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let mut nanoseconds = 0;
    for place in 0..9 {
        nanoseconds = nanoseconds * 10 + u32::from(fraction.get(place).map_or(0, |b| b - b'0'));
    }
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}
