//! Brings frames from their media, each fetched once however many want it.
//!
//! A reader claims what nobody has and nobody is fetching. Runs of a local build it reads itself,
//! each with one read, for that costs no more than handing it over. From a medium with latency all
//! runs are fetched at once, by threads of their own, each widened to what one request should
//! bring; frames are handed on as they arrive, so a reader need not wait for the end of a window.
//! Only when everything it claimed is under way does a reader wait for anybody: readers can't wait
//! for each other in a circle.
//!
//! Every frame is compared with its digest each time it is read, in memory that nobody else writes.
//! (Frames that are stored as they are could be served from a mapping of the file, verified once:
//! but the kernel may drop such a page and read it again, from a disk that has gone bad since.)

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io::{IoSliceMut, Read};
use std::sync::Arc;
use std::time::Instant;

use diapause_format::{digest16, Decoder, FormatError, FrameEntry, FRAME_BYTES};

use crate::blobs::BlobError;
use crate::build::{Build, Builds, Unreadable};
use crate::flight::{Claim, Landing, Missed, Waiter};
use crate::frames::{Frame, Frames, Key, Pages};

/// Frames that are fetched for one reader at once: what it holds beside what is kept, 2 MiB.
pub(crate) const BATCH_FRAMES: usize = 32;
/// Stored bytes that a thread keeps room for.
const STORED_KEPT: usize = 1 << 20;

/// A frame that is wanted.
pub(crate) type Wanted = (Arc<Build>, u64);
type FrameLanding = Landing<Key, Frame, Unreadable>;

/// A frame that was asked for.
pub(crate) enum Asked {
    /// It was kept.
    Here(Frame),
    /// It is under way.
    Coming(Waiter<Frame, Unreadable>),
}

/// A frame, and whether it was kept.
pub(crate) struct Got {
    pub(crate) frame: Frame,
    pub(crate) kept: bool,
}

/// Consecutive frames of one build to fetch.
struct Run {
    build: Arc<Build>,
    first: u64,
    landings: VecDeque<FrameLanding>,
}

/// What one thread needs to decode.
struct Scratch {
    decoder: Decoder,
    stored: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Option<Scratch>> = const { RefCell::new(None) };
}

impl Builds {
    /// The frames that are wanted, at most [`BATCH_FRAMES`], in their order.
    ///
    /// # Errors
    /// Damaged, not available: the first that is; what can't be read is opened anew by the next.
    pub(crate) fn fetch(&self, wanted: &[Wanted]) -> Result<Vec<Got>, Unreadable> {
        let asked = self.ask(wanted, true);
        let until = Instant::now() + self.wait_max;
        let got: Vec<_> = asked
            .into_iter()
            .zip(wanted)
            .map(|(asked, (build, _))| self.receive(asked, build, until))
            .collect();
        got.into_iter().collect()
    }

    /// Sees to it that frames are there or on their way: at most [`BATCH_FRAMES`], in their order.
    /// With `widened`, a slow medium brings more than is wanted.
    pub(crate) fn ask(&self, wanted: &[Wanted], widened: bool) -> Vec<Asked> {
        let mut mine = BTreeMap::new();
        let asked = wanted
            .iter()
            .map(
                |(build, number)| match self.frames.claim((build.number, *number)) {
                    Claim::Kept(frame) => Asked::Here(frame),
                    Claim::Theirs(waiter) => Asked::Coming(waiter),
                    Claim::Mine(landing) => {
                        let waiter = landing.waiter();
                        mine.insert(*landing.key(), (build.clone(), landing));
                        Asked::Coming(waiter)
                    }
                },
            )
            .collect();
        if !mine.is_empty() {
            self.bring(mine, widened);
        }
        asked
    }

    /// A frame that was asked for, waiting for it at most until then.
    ///
    /// # Errors
    /// Damaged, not available: the build is opened anew by the next; not there by then.
    pub(crate) fn receive(
        &self,
        asked: Asked,
        build: &Build,
        until: Instant,
    ) -> Result<Got, Unreadable> {
        let waiter = match asked {
            Asked::Here(frame) => return Ok(Got { frame, kept: true }),
            Asked::Coming(waiter) => waiter,
        };
        let came = waiter.wait(until.saturating_duration_since(Instant::now()));
        came.map(|frame| Got { frame, kept: false })
            .map_err(|missed| {
                if missed != Missed::Late {
                    self.forget(build);
                }
                self.missed(&build.name(), missed)
            })
    }

    /// Reads local runs; has the others fetched.
    fn bring(&self, mut mine: BTreeMap<Key, (Arc<Build>, FrameLanding)>, widened: bool) {
        let mut ends = Vec::new();
        for (key, (build, _)) in &mine {
            if build.medium().has_latency() && !mine.contains_key(&(key.0, key.1 + 1)) {
                ends.push(*key);
            }
        }
        let mut local = Vec::new();
        while let Some((key, (build, landing))) = mine.pop_first() {
            let medium = build.medium();
            let mut run = Run {
                first: key.1,
                build,
                landings: VecDeque::from([landing]),
            };
            while let Some((_, next)) = mine.remove(&run.next()) {
                run.landings.push_back(next);
            }
            if medium.has_latency() {
                if widened {
                    let bytes = medium.window_bytes / ends.len().max(1) as u64;
                    self.widen(&mut run, bytes, &mut mine);
                }
                let frames = self.frames.clone();
                self.workers.run(Box::new(move || run.stream(&frames)));
            } else {
                local.push(run);
            }
        }
        for run in local.iter().skip(1) {
            let (offset, length) = run.stored();
            run.build.blob.will_need(offset, length);
        }
        for run in local {
            run.read(&self.frames);
        }
    }

    /// Makes a run longer, up to so many bytes of pages, by frames that nobody has yet.
    fn widen(
        &self,
        run: &mut Run,
        bytes: u64,
        mine: &mut BTreeMap<Key, (Arc<Build>, FrameLanding)>,
    ) {
        let most = (bytes / FRAME_BYTES as u64) as usize;
        let end = run.build.table().frame_count();
        while run.landings.len() < most && run.next().1 < end {
            let next = run.next();
            let landing = match mine.remove(&next) {
                Some((_, landing)) => landing,
                None => match self.frames.claim(next) {
                    Claim::Mine(landing) => landing,
                    _ => return,
                },
            };
            run.landings.push_back(landing);
        }
    }
}

impl Run {
    /// The frame after its last.
    fn next(&self) -> Key {
        (self.build.number, self.first + self.landings.len() as u64)
    }

    /// Where its stored bytes begin, and how many there are.
    fn stored(&self) -> (u64, u64) {
        let table = self.build.table();
        let (first, last) = (table.frame(self.first), table.frame(self.next().1 - 1));
        let end = last.offset + u64::from(last.length);
        (first.offset, end - first.offset)
    }

    /// Keeps a frame and lands its flight, or lands it with what went wrong.
    fn land(&mut self, frames: &Frames, end: Result<Frame, Unreadable>) {
        let Some(landing) = self.landings.pop_front() else {
            return;
        };
        self.first += 1;
        if let Ok(frame) = &end {
            frames.keep(*landing.key(), frame);
        }
        landing.land(end);
    }

    fn fail(&mut self, frames: &Frames, error: &Unreadable) {
        while !self.landings.is_empty() {
            self.land(frames, Err(error.clone()));
        }
    }

    /// Reads it with one read: frames that are stored as they are straight into their places.
    fn read(mut self, frames: &Frames) {
        let result = with_scratch(|scratch| {
            let build = self.build.clone();
            let table = build.table();
            let numbers = self.first..self.next().1;
            let entries: Vec<&FrameEntry> = numbers.clone().map(|at| table.frame(at)).collect();
            let mut pages: Vec<Pages> = numbers
                .clone()
                .map(|number| Pages::new(table.frame_bytes(number)))
                .collect();
            let compressed = entries.iter().filter(|entry| entry.compressed);
            let stored_bytes = compressed.map(|entry| entry.length as usize).sum();
            scratch.room(stored_bytes);
            let (mut into, mut rest) = (Vec::new(), &mut scratch.stored[..stored_bytes]);
            for (entry, pages) in entries.iter().zip(&mut pages) {
                if entry.compressed {
                    let (here, later) = rest.split_at_mut(entry.length as usize);
                    into.push(IoSliceMut::new(here));
                    rest = later;
                } else {
                    into.push(IoSliceMut::new(pages));
                }
            }
            let read = build.blob.read_into(entries[0].offset, &mut into);
            read.map_err(|error| build.failed(&error))?;
            let mut at = 0;
            for ((number, entry), mut pages) in numbers.zip(entries).zip(pages) {
                let end = if entry.compressed {
                    let stored = &scratch.stored[at..at + entry.length as usize];
                    at += stored.len();
                    scratch.decoder.decode(number, entry, stored, &mut pages)
                } else {
                    verify(number, entry, &pages)
                };
                let end = end.map(|()| pages.into());
                self.land(frames, end.map_err(|error| build.wrong(error)));
            }
            Ok(())
        });
        if let Err(error) = result {
            self.fail(frames, &error);
        }
    }

    /// Fetches it as a stream and hands on each frame when it is there. A frame that is wrong fails
    /// alone: the others may be what somebody waits for.
    fn stream(mut self, frames: &Frames) {
        let result = with_scratch(|scratch| {
            let build = self.build.clone();
            let table = build.table();
            let (offset, length) = self.stored();
            let stream = build.blob.stream(offset, length);
            let mut stream = stream.map_err(|error| build.failed(&error))?;
            for number in self.first..self.next().1 {
                let entry = table.frame(number);
                let mut pages = Pages::new(table.frame_bytes(number));
                scratch.room(entry.length as usize);
                let Scratch { decoder, stored } = scratch;
                let stored = &mut stored[..entry.length as usize];
                let place = match entry.compressed {
                    true => &mut *stored,
                    false => &mut pages,
                };
                let read = stream.read_exact(place).map_err(BlobError::from);
                read.map_err(|error| build.failed(&error))?;
                let end = match entry.compressed {
                    true => decoder.decode(number, entry, stored, &mut pages),
                    false => verify(number, entry, &pages),
                };
                let end = end.map(|()| pages.into());
                self.land(frames, end.map_err(|error| build.wrong(error)));
            }
            Ok(())
        });
        if let Err(error) = result {
            self.fail(frames, &error);
        }
    }
}

impl Scratch {
    /// Makes room for so many stored bytes.
    fn room(&mut self, stored_bytes: usize) {
        if self.stored.len() < stored_bytes {
            self.stored.resize(stored_bytes, 0);
        }
    }
}

fn with_scratch<T>(
    work: impl FnOnce(&mut Scratch) -> Result<T, Unreadable>,
) -> Result<T, Unreadable> {
    SCRATCH.with_borrow_mut(|kept| {
        let mut scratch = match kept.take() {
            Some(scratch) => scratch,
            None => Scratch {
                decoder: Decoder::new().map_err(|error| Unreadable::away("zstd", error))?,
                stored: Vec::new(),
            },
        };
        let done = work(&mut scratch);
        if scratch.stored.len() > STORED_KEPT {
            scratch.stored = Vec::new();
        }
        *kept = Some(scratch);
        done
    })
}

/// A frame that is stored as it is, where it lies.
fn verify(number: u64, entry: &FrameEntry, pages: &[u8]) -> Result<(), FormatError> {
    if digest16(pages) == entry.digest {
        return Ok(());
    }
    Err(FormatError::BadFrame { frame: number })
}
