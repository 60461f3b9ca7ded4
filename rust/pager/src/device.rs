//! A device as pages to be served: header, builds and captures, each page verified.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use diapause_capture::{Error, HeaderFile, PageSource};
use diapause_format::{
    parse_hex32, BuildKind, BuildRef, Digest, Extent, HeaderIndex, FRAME_PAGES, PAGE_SIZE,
};

use crate::build::{Build, Builds, Frame, Unreadable};
use crate::spec::{CaptureSpec, DeviceSpec};

const PAGE: u64 = PAGE_SIZE as u64;

/// Verified bytes that stand for a part of a device.
#[derive(Debug, Clone)]
pub enum Part {
    /// So many zeros.
    Zeros(usize),
    /// A part of a frame: its pages, the first byte and how many.
    Frame(Frame, usize, usize),
    /// Bytes of a capture.
    Bytes(Vec<u8>),
}

impl Part {
    /// How many bytes it stands for.
    pub fn len(&self) -> usize {
        match self {
            Self::Zeros(length) | Self::Frame(_, _, length) => *length,
            Self::Bytes(bytes) => bytes.len(),
        }
    }

    /// Whether it stands for none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies it to `into`, which has its length.
    pub fn copy_to(&self, into: &mut [u8]) {
        match self {
            Self::Zeros(_) => into.fill(0),
            Self::Frame(frame, from, length) => into.copy_from_slice(&frame[*from..from + length]),
            Self::Bytes(bytes) => into.copy_from_slice(bytes),
        }
    }
}

/// Where bytes came from: the slowest place of a window is its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nothing stores zeros.
    Zero,
    /// Frames that were decoded before.
    Kept,
    /// A capture that is not packed yet.
    Capture,
    /// A build of the local directory.
    Local,
    /// A build on another medium.
    Remote,
}

/// A device that was opened.
#[derive(Debug)]
pub struct Device {
    size_bytes: u64,
    index: HeaderIndex,
    builds: Arc<Builds>,
    captures: HashMap<Digest, Arc<PageSource>>,
    open: Mutex<HashMap<u32, Arc<Build>>>,
}

impl Device {
    /// Reads and verifies its header, and opens the captures that it maps to. Builds are opened
    /// when their first page is wanted.
    ///
    /// # Errors
    /// Missing, damaged, not available.
    pub fn open(spec: &DeviceSpec, builds: Arc<Builds>) -> Result<Self, Unreadable> {
        let index = open_header(spec)?;
        let pages = index.summary().page_count;
        if pages * PAGE != spec.size_bytes {
            let cause = format!("it is of {pages} pages, the device of {}", spec.size_bytes);
            return Err(Unreadable::damaged(&spec.header_digest, cause));
        }
        let captures = spec
            .captures
            .iter()
            .map(|capture| open_capture(capture, pages))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            size_bytes: spec.size_bytes,
            index,
            builds,
            captures,
            open: Mutex::new(HashMap::new()),
        })
    }

    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The totals of its header.
    pub fn mapped_pages(&self) -> u64 {
        self.index.summary().mapped_pages
    }

    /// The bytes from `offset` on, at most `size` of them and none beyond the end, as parts in
    /// order; and where they came from. Leaves `parts` as it was where it fails.
    ///
    /// # Errors
    /// Damaged, not available: not one byte is known then.
    pub fn read(
        &self,
        offset: u64,
        size: usize,
        parts: &mut Vec<Part>,
    ) -> Result<Origin, Unreadable> {
        let end = self.size_bytes.min(offset.saturating_add(size as u64));
        let (before, mut origin) = (parts.len(), Origin::Zero);
        for extent in self.index.extents_from(offset / PAGE) {
            let first = offset.max(extent.page * PAGE);
            if first >= end {
                break;
            }
            let last = end.min(extent.end() * PAGE);
            match self.read_extent(&extent, first, last, parts) {
                Ok(from) => origin = origin.max(from),
                Err(error) => {
                    parts.truncate(before);
                    return Err(error);
                }
            }
        }
        Ok(origin)
    }

    /// Bytes `first..last` of the device, all in one extent.
    fn read_extent(
        &self,
        extent: &Extent,
        first: u64,
        last: u64,
        parts: &mut Vec<Part>,
    ) -> Result<Origin, Unreadable> {
        let length = (last - first) as usize;
        if extent.target.is_zero() {
            parts.push(Part::Zeros(length));
            return Ok(Origin::Zero);
        }
        let inside = first - extent.page * PAGE;
        let at = extent.target.position * PAGE + inside;
        let build = self.index.build(extent.target.build);
        match build.kind {
            BuildKind::Packed => self.read_build(extent.target.build, build, at, length, parts),
            BuildKind::Capture => self.read_capture(build, at, length, parts),
        }
    }

    fn read_build(
        &self,
        number: u32,
        build: &BuildRef,
        at: u64,
        length: usize,
        parts: &mut Vec<Part>,
    ) -> Result<Origin, Unreadable> {
        const FRAME: u64 = FRAME_PAGES as u64 * PAGE;
        let open = self.build(number, build)?;
        let (mut at, end, mut origin) = (at, at + length as u64, Origin::Kept);
        while at < end {
            let (frame, kept) = self
                .builds
                .frame(&open, at / FRAME)
                .inspect_err(|_| self.close(number, &build.id))?;
            let from = (at % FRAME) as usize;
            let taken = (frame.len() - from).min((end - at) as usize);
            parts.push(Part::Frame(frame, from, taken));
            at += taken as u64;
            if !kept {
                origin = if open.medium() == "local" {
                    origin.max(Origin::Local)
                } else {
                    Origin::Remote
                };
            }
        }
        Ok(origin)
    }

    /// A build of the header, open.
    fn build(&self, number: u32, wanted: &BuildRef) -> Result<Arc<Build>, Unreadable> {
        let lock = || self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = lock().get(&number) {
            return Ok(open.clone());
        }
        let open = self.builds.get(&wanted.id)?;
        let pages = open.table().page_count();
        if pages != wanted.pages {
            let cause = format!("it has {pages} pages; the header says {}", wanted.pages);
            return Err(Unreadable::damaged(open.name(), cause));
        }
        lock().insert(number, open.clone());
        Ok(open)
    }

    /// The next reader opens it again: it may have been mended meanwhile.
    fn close(&self, number: u32, id: &Digest) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.remove(&number);
        self.builds.forget(id);
    }

    fn read_capture(
        &self,
        build: &BuildRef,
        at: u64,
        length: usize,
        parts: &mut Vec<Part>,
    ) -> Result<Origin, Unreadable> {
        let name = diapause_format::hex(&build.id);
        let source = self
            .captures
            .get(&build.id)
            .ok_or_else(|| Unreadable::away(&name, "no such capture"))?;
        // Pages are verified whole, also where only a part of one is asked for.
        let (start, end) = (at / PAGE, (at + length as u64).div_ceil(PAGE));
        let mut bytes = vec![0; ((end - start) * PAGE) as usize];
        source
            .read(start, &mut bytes)
            .map_err(|error| unreadable(&name, &error))?;
        let from = (at - start * PAGE) as usize;
        bytes.drain(..from);
        bytes.truncate(length);
        parts.push(Part::Bytes(bytes));
        Ok(Origin::Capture)
    }
}

fn open_header(spec: &DeviceSpec) -> Result<HeaderIndex, Unreadable> {
    let name = spec.header.display().to_string();
    let wrong = || Unreadable::damaged(&name, "its digest is none");
    let digest = parse_hex32(&spec.header_digest).ok_or_else(wrong)?;
    let file = HeaderFile {
        path: &spec.header,
        digest: &digest,
    };
    let reader = file.open().map_err(|error| unreadable(&name, &error))?;
    HeaderIndex::load(reader).map_err(|error| unreadable(&name, &file.error(error)))
}

fn open_capture(spec: &CaptureSpec, pages: u64) -> Result<(Digest, Arc<PageSource>), Unreadable> {
    let name = spec.path.display().to_string();
    let wrong = || Unreadable::damaged(&name, "its id is none");
    let id = parse_hex32(&spec.id).ok_or_else(wrong)?;
    let source = match &spec.map {
        Some(map) => {
            let map = fs::read(map).map_err(|error| Unreadable::away(&name, error))?;
            PageSource::overlay(&spec.path, &map, pages)
        }
        None => PageSource::capture(&spec.path, spec.spill.as_deref().map(Path::new)),
    };
    let source = source.map_err(|error| unreadable(&name, &error))?;
    Ok((id, Arc::new(source)))
}

fn unreadable(name: &str, error: &Error) -> Unreadable {
    match error {
        Error::Damaged { cause, .. } => Unreadable::damaged(name, cause),
        other => Unreadable::away(name, other),
    }
}
