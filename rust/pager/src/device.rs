//! A device as pages to be served: header, builds and captures, each page verified.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use diapause_capture::overlay_map::MAP_BYTES_MAX;
use diapause_capture::{Error, HeaderFile, PageSource};
use diapause_format::{
    hex, parse_hex32, BuildKind, BuildRef, Digest, Extent, HeaderIndex, FRAME_BYTES, PAGE_SIZE,
};

use crate::build::{Build, Builds, Frame, Unreadable};
use crate::fetch::{Asked, Got, Wanted, BATCH_FRAMES};
use crate::frames::Pages;
use crate::spec::{CaptureSpec, DeviceSpec};

const PAGE: u64 = PAGE_SIZE as u64;
const FRAME: u64 = FRAME_BYTES as u64;
/// Pages of captures that are read at once.
const BATCH_PAGES: u64 = 512;

/// Verified bytes that stand for a part of a device.
#[derive(Debug, Clone)]
pub enum Part {
    /// So many zeros.
    Zeros(usize),
    /// A part of verified pages: the pages, the first byte and how many.
    Frame(Frame, usize, usize),
    /// Bytes of their own.
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

/// Bytes of a device that are stored in one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Number of the build in the header.
    pub(crate) build: u32,
    /// Number of the frame.
    pub(crate) frame: u64,
    /// First byte of the frame.
    pub(crate) from: usize,
    /// How many bytes.
    pub(crate) length: usize,
    /// First byte of the device.
    pub(crate) offset: u64,
}

/// A device that was opened.
#[derive(Debug)]
pub struct Device {
    size_bytes: u64,
    index: HeaderIndex,
    builds: Arc<Builds>,
    /// By their numbers in the header.
    captures: HashMap<u32, PageSource>,
    open: RwLock<HashMap<u32, Arc<Build>>>,
}

/// A part of a window, before its bytes are there.
enum Piece {
    Zeros(usize),
    /// Which frame of the batch, first byte, bytes.
    Frame(usize, usize, usize),
    /// Which read of captures, first byte, bytes.
    Capture(usize, usize, usize),
}

/// What is brought at once of a window: all of it, but where that is in very many places.
#[derive(Default)]
struct Batch {
    pieces: Vec<Piece>,
    /// Number of the build and of the frame.
    frames: Vec<(u32, u64)>,
    /// Number of the capture, first position and the position after the last.
    captures: Vec<(u32, u64, u64)>,
    capture_pages: u64,
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
        let captures = open_captures(&spec.captures, &index)?;
        Ok(Self {
            size_bytes: spec.size_bytes,
            index,
            builds,
            captures,
            open: RwLock::default(),
        })
    }

    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether bytes come over a medium with latency.
    pub fn has_latency(&self) -> bool {
        self.builds.medium().has_latency()
    }

    /// What brings its frames.
    pub(crate) fn builds(&self) -> &Builds {
        &self.builds
    }

    /// Where the bytes from `offset` on are stored in builds; what is stored in none of them is
    /// added to `others`, as first byte and bytes.
    pub(crate) fn places(
        &self,
        offset: u64,
        size: u64,
        others: &mut Vec<(u64, u64)>,
    ) -> Vec<Place> {
        let end = self.size_bytes.min(offset.saturating_add(size));
        let mut places = Vec::new();
        for extent in self.index.extents_from(offset / PAGE) {
            let mut first = offset.max(extent.page * PAGE);
            if first >= end {
                break;
            }
            let last = end.min(extent.end() * PAGE);
            let build = extent.target.build;
            if extent.target.is_zero() || self.index.build(build).kind != BuildKind::Packed {
                others.push((first, last - first));
                continue;
            }
            while first < last {
                let at = extent.target.position * PAGE + (first - extent.page * PAGE);
                let length = (last - first).min(FRAME - at % FRAME);
                places.push(Place {
                    build,
                    frame: at / FRAME,
                    from: (at % FRAME) as usize,
                    length: length as usize,
                    offset: first,
                });
                first += length;
            }
        }
        places
    }

    /// Has the frames of these bytes fetched, and does not wait for them: whoever reads them soon
    /// finds them kept or on their way. Of a part that is in very many places only the first are.
    /// Returns the bytes of those that were not there.
    ///
    /// # Errors
    /// A build can't be opened.
    pub fn ask_ahead(&self, bytes: Range<u64>) -> Result<u64, Unreadable> {
        let length = bytes.end.saturating_sub(bytes.start);
        let places = self.places(bytes.start, length, &mut Vec::new());
        let mut frames: Vec<(u32, u64)> = places.iter().map(|at| (at.build, at.frame)).collect();
        frames.dedup();
        frames.truncate(2 * (length / FRAME) as usize + 2);
        let mut coming = 0;
        for some in frames.chunks(BATCH_FRAMES) {
            let asked = self.builds.ask(&self.wanted(some)?, false);
            let new = asked.iter().filter(|one| matches!(one, Asked::Coming(_)));
            coming += new.count() as u64 * FRAME;
        }
        Ok(coming)
    }

    /// Keeps no longer the frames that end within these bytes: whoever reads on does not come back.
    pub fn let_go(&self, bytes: Range<u64>) {
        let length = bytes.end.saturating_sub(bytes.start);
        let places = self.places(bytes.start, length, &mut Vec::new());
        let frames: Vec<(u32, u64)> = places.iter().map(|at| (at.build, at.frame)).collect();
        let Ok(wanted) = self.wanted(&frames) else {
            return; // what can't be opened again keeps what it has until others need the place
        };
        for (place, (build, number)) in places.iter().zip(&wanted) {
            if place.from + place.length == build.table().frame_bytes(*number) {
                self.builds.frames.let_go((build.number, *number));
            }
        }
    }

    /// Builds by their numbers, all opened at once, in their order.
    ///
    /// # Errors
    /// Damaged, not available: the first that is.
    pub(crate) fn open_builds(&self, numbers: &[u32]) -> Result<Vec<Arc<Build>>, Unreadable> {
        let first: Vec<(u32, u64)> = numbers.iter().map(|number| (*number, 0)).collect();
        let wanted = self.wanted(&first)?;
        Ok(wanted.into_iter().map(|(build, _)| build).collect())
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
        let before = parts.len();
        let read = self.read_window(offset, end, parts);
        if read.is_err() {
            parts.truncate(before);
        }
        read
    }

    fn read_window(
        &self,
        offset: u64,
        end: u64,
        parts: &mut Vec<Part>,
    ) -> Result<Origin, Unreadable> {
        let (mut batch, mut origin, mut whole) = (Batch::default(), Origin::Zero, true);
        for extent in self.index.extents_from(offset / PAGE) {
            let mut first = offset.max(extent.page * PAGE);
            if first >= end {
                break;
            }
            let last = end.min(extent.end() * PAGE);
            while first < last {
                if batch.is_full() {
                    // Copies from here on: so many frames must not stay for a few bytes of each.
                    whole = false;
                    origin = origin.max(self.bring(&batch, whole, parts)?);
                    batch = Batch::default();
                }
                first += self.plan(&extent, first, last, &mut batch);
            }
        }
        Ok(origin.max(self.bring(&batch, whole, parts)?))
    }

    /// Adds the next piece of an extent to the batch: bytes `first` of the device and after it, at
    /// most to `last`. Returns how many bytes it has.
    fn plan(&self, extent: &Extent, first: u64, last: u64, batch: &mut Batch) -> u64 {
        let number = extent.target.build;
        if extent.target.is_zero() {
            batch.pieces.push(Piece::Zeros((last - first) as usize));
            return last - first;
        }
        let at = extent.target.position * PAGE + (first - extent.page * PAGE);
        match self.index.build(number).kind {
            BuildKind::Packed => batch.add_frame(number, at, last - first),
            BuildKind::Capture => batch.add_capture(number, at, last - first),
        }
    }

    /// Brings a batch and adds its parts: whole frames, or copies of what is wanted of them.
    fn bring(
        &self,
        batch: &Batch,
        whole: bool,
        parts: &mut Vec<Part>,
    ) -> Result<Origin, Unreadable> {
        let mut origin = Origin::Zero;
        let wanted = self.wanted(&batch.frames)?;
        let frames = self.builds.fetch(&wanted)?;
        for (got, (build, _)) in frames.iter().zip(&wanted) {
            origin = origin.max(origin_of(got, build));
        }
        let mut captures = Vec::with_capacity(batch.captures.len());
        for (number, start, end) in &batch.captures {
            captures.push(self.read_capture(*number, *start, *end)?);
            origin = origin.max(Origin::Capture);
        }
        parts.extend(batch.pieces.iter().map(|piece| match *piece {
            Piece::Zeros(length) => Part::Zeros(length),
            Piece::Frame(at, from, length) => part(&frames[at].frame, from, length, whole),
            Piece::Capture(at, from, length) => part(&captures[at], from, length, whole),
        }));
        Ok(origin)
    }

    /// The builds of the frames of a batch, open.
    fn wanted(&self, frames: &[(u32, u64)]) -> Result<Vec<Wanted>, Unreadable> {
        let mut closed: Vec<u32> = Vec::new();
        {
            let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
            let there = |number| open.get(number).filter(|build| !build.is_stale()).cloned();
            let mut wanted = Vec::with_capacity(frames.len());
            for (number, frame) in frames {
                match there(number) {
                    Some(build) => wanted.push((build, *frame)),
                    None if !closed.contains(number) => closed.push(*number),
                    None => {}
                }
            }
            if closed.is_empty() {
                return Ok(wanted);
            }
        }
        let refs: Vec<&BuildRef> = closed.iter().map(|at| self.index.build(*at)).collect();
        let opened = self.builds.get(&refs)?;
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        open.extend(closed.into_iter().zip(opened));
        Ok(frames
            .iter()
            .filter_map(|(number, frame)| Some((open.get(number)?.clone(), *frame)))
            .collect())
    }

    /// Pages `start..end` of a capture, verified where it has sums.
    fn read_capture(&self, number: u32, start: u64, end: u64) -> Result<Frame, Unreadable> {
        let mut pages = Pages::new(((end - start) * PAGE) as usize);
        self.captures[&number]
            .read(start, &mut pages)
            .map_err(|error| unreadable(&hex(&self.index.build(number).id), &error))?;
        Ok(pages.into())
    }
}

impl Batch {
    fn is_full(&self) -> bool {
        self.frames.len() >= BATCH_FRAMES || self.capture_pages >= BATCH_PAGES
    }

    /// Bytes from `at` of a build on, as far as its frame goes; returns how many.
    fn add_frame(&mut self, number: u32, at: u64, length: u64) -> u64 {
        let wanted = (number, at / FRAME);
        if self.frames.last() != Some(&wanted) {
            self.frames.push(wanted);
        }
        let (from, length) = (at % FRAME, length.min(FRAME - at % FRAME));
        let frame = self.frames.len() - 1;
        self.pieces
            .push(Piece::Frame(frame, from as usize, length as usize));
        length
    }

    /// Bytes from `at` of a capture on; returns how many. What follows in the capture is read as
    /// one, also where zeros or other pages are between on the device.
    fn add_capture(&mut self, number: u32, at: u64, length: u64) -> u64 {
        let length = length.min((BATCH_PAGES * PAGE) - at % PAGE);
        let (start, end) = (at / PAGE, (at + length).div_ceil(PAGE));
        self.capture_pages += end - start;
        let first = match self.captures.last_mut() {
            Some((last, first, goes_to)) if *last == number && *goes_to == start => {
                *goes_to = end;
                *first
            }
            _ => {
                self.captures.push((number, start, end));
                start
            }
        };
        let read = self.captures.len() - 1;
        let from = (at - first * PAGE) as usize;
        self.pieces
            .push(Piece::Capture(read, from, length as usize));
        length
    }
}

fn part(pages: &Frame, from: usize, length: usize, whole: bool) -> Part {
    if whole {
        Part::Frame(pages.clone(), from, length)
    } else {
        Part::Bytes(pages[from..from + length].to_vec())
    }
}

fn origin_of(got: &Got, build: &Build) -> Origin {
    match got.kept {
        true => Origin::Kept,
        false if build.medium().has_latency() => Origin::Remote,
        false => Origin::Local,
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

/// The captures that the header maps to, by their numbers in it.
fn open_captures(
    specs: &[CaptureSpec],
    index: &HeaderIndex,
) -> Result<HashMap<u32, PageSource>, Unreadable> {
    let mut by_id: HashMap<Digest, &CaptureSpec> = HashMap::new();
    for spec in specs {
        let wrong = || Unreadable::damaged(spec.path.display().to_string(), "its id is none");
        by_id.insert(parse_hex32(&spec.id).ok_or_else(wrong)?, spec);
    }
    let mut captures = HashMap::new();
    for (number, build) in (1..).zip(&index.summary().builds) {
        if build.kind == BuildKind::Packed {
            continue;
        }
        let missing = || Unreadable::away(hex(&build.id), "no such capture");
        let spec = by_id.get(&build.id).ok_or_else(missing)?;
        let source = open_capture(spec, index.summary().page_count)?;
        if source.data_pages() != build.pages {
            let (found, said) = (source.data_pages(), build.pages);
            let cause = format!("it has {found} pages; the header says {said}");
            return Err(Unreadable::damaged(spec.path.display().to_string(), cause));
        }
        captures.insert(number, source);
    }
    Ok(captures)
}

fn open_capture(spec: &CaptureSpec, pages: u64) -> Result<PageSource, Unreadable> {
    let name = spec.path.display().to_string();
    let source = match &spec.map {
        Some(map) => {
            let map = read_map(map).map_err(|error| Unreadable::away(&name, error))?;
            PageSource::overlay(&spec.path, &map, pages)
        }
        None => PageSource::capture(&spec.path, spec.spill.as_deref().map(Path::new)),
    };
    source.map_err(|error| unreadable(&name, &error))
}

fn read_map(path: &Path) -> io::Result<Vec<u8>> {
    let mut map = Vec::new();
    let most = MAP_BYTES_MAX as u64 + 1;
    // One byte too many is refused by whoever parses it.
    File::open(path)?.take(most).read_to_end(&mut map)?;
    Ok(map)
}

fn unreadable(name: &str, error: &Error) -> Unreadable {
    match error {
        Error::Damaged { cause, .. } => Unreadable::damaged(name, cause),
        other => Unreadable::away(name, other),
    }
}
