//! Packs what a capture took: drops zero and unchanged pages, stores the others in a new build, and
//! writes the header that maps to it.
//!
//! Two passes over the source's runs. The first reads the pages in bounded batches, compares them
//! with the parent's, writes the build and keeps two bits for each page; the second, which knows
//! the build's id, merges those fates with the parent's header as a stream. Both files are whole
//! and synced before either has its name; the build gets its own first, so that a header never
//! names what is not there.

use std::io::Read;
use std::path::Path;

use diapause_format::{
    hex, BuildKind, BuildRef, BuildSummary, BuildWriter, Encoder, Extent, FormatError,
    HeaderReader, HeaderSummary, Target, FRAME_BYTES, NEW_BUILD, PAGE_SIZE,
};

use crate::blob::NewFile;
use crate::builds::Builds;
use crate::compare::{judge, Fate, Fates};
use crate::error::{Error, Result};
use crate::fetch::{Captures, Fetcher};
use crate::headers::{check_device, header_bytes, write_over, zero_header, HeaderFile};
use crate::parent::{ParentFlat, ParentPages, ParentThroughBuilds};
use crate::source::{PageSource, SourceRun};
use crate::threads::for_each_part;

/// Threads that compare and compress.
const THREADS: usize = 2;
/// Captured pages that are read and compared at once: 4 MiB, and as much of the parent.
const BATCH_PAGES: u64 = 1024;
/// Frames that are compressed at once.
const FRAMES_AT_ONCE: usize = 32;

/// Where a pack writes.
#[derive(Debug, Clone, Copy)]
pub struct Places<'a> {
    /// Builds, named by their id: the parent's and the new one.
    pub builds: &'a Path,
    /// Files that are not whole yet, on the same file system.
    pub tmp: &'a Path,
    /// The new header.
    pub header_out: &'a Path,
}

/// What a pack stored.
#[derive(Debug, Clone)]
pub struct Packed {
    /// The new build, unless nothing had to be stored.
    pub build: Option<BuildSummary>,
    /// The new header.
    pub header: HeaderSummary,
    /// Captured pages that were zero.
    pub zero_pages: u64,
    /// Captured pages that were the parent's.
    pub unchanged_pages: u64,
}

/// Told (pages done, pages in all) between batches; false stops the work.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// Packs `source` over `parent`; the parent's bytes come from `flat`, a plain file, or through its
/// builds.
///
/// # Errors
/// Missing, damaged, storage, invalid, stopped. No file of it is left then, except the new build
/// where only giving the header its name failed.
pub fn pack(
    source: &PageSource,
    parent: HeaderFile<'_>,
    flat: Option<&Path>,
    places: Places<'_>,
    progress: Progress<'_>,
) -> Result<Packed> {
    let mut reader = parent.open()?;
    check_device(source, reader.page_count())?;
    let mut pages = match flat {
        Some(path) => ParentPages::Flat(ParentFlat::open(path, source.device_pages())?),
        None => {
            let fetcher = Fetcher::new(Builds::new(places.builds), Captures::new(), THREADS);
            ParentPages::Builds(Box::new(ParentThroughBuilds::new(
                parent,
                parent.open()?,
                fetcher,
            )))
        }
    };
    pack_over(source, &mut reader, &mut pages, places, progress, |error| {
        parent.error(error)
    })
}

/// Packs a plain file as a device that has no parent; its holes cost nothing.
///
/// # Errors
/// As [`pack`].
pub fn pack_file(
    path: &Path,
    page_count: u64,
    places: Places<'_>,
    progress: Progress<'_>,
) -> Result<Packed> {
    let source = PageSource::plain(path, page_count)?;
    let invalid = |error: FormatError| Error::Invalid(error.to_string());
    let mut header = Vec::new();
    zero_header(&mut header, page_count).map_err(invalid)?;
    let mut reader = HeaderReader::new(&header[..], None).map_err(invalid)?;
    pack_over(
        &source,
        &mut reader,
        &mut ParentPages::Zero,
        places,
        progress,
        invalid,
    )
}

fn pack_over<R: Read>(
    source: &PageSource,
    parent: &mut HeaderReader<R>,
    parent_pages: &mut ParentPages<'_>,
    places: Places<'_>,
    progress: Progress<'_>,
    damaged: impl Fn(FormatError) -> Error,
) -> Result<Packed> {
    let build_file = NewFile::create_in(places.tmp, "build")?;
    let build_file = build_file.needing(source.data_pages() * PAGE_SIZE as u64);
    let mut packer = Packer::new(&build_file)?;
    let mut done = 0;
    for batch in batches(source.runs()) {
        if !progress(done, source.captured_pages()) {
            return Err(Error::Stopped);
        }
        packer.add_batch(source, &batch, parent_pages)?;
        done += batch.iter().map(|run| run.pages).sum::<u64>();
    }
    assert_eq!(done, source.captured_pages());
    let (build, fates) = packer.finish()?;
    let header_file = NewFile::create_in(places.tmp, "header")?.needing(header_bytes(source));
    let build_ref = BuildRef {
        id: build.id,
        pages: build.page_count,
        kind: BuildKind::Packed,
    };
    let over = over(source.runs(), &fates);
    let header = write_over(parent, over, build_ref, &header_file, damaged)?;
    let not_packed = header
        .builds
        .iter()
        .find(|build| build.kind == BuildKind::Capture);
    if let Some(capture) = not_packed {
        let name = hex(&capture.id);
        return Err(Error::Invalid(format!(
            "the parent maps to capture {name}: pack that first"
        )));
    }
    header_file.sync()?;
    if build.page_count > 0 {
        build_file.sync()?;
        build_file.publish(&places.builds.join(hex(&build.id)))?;
    }
    header_file.publish(places.header_out)?;
    progress(done, done);
    let count = |fate| (0..fates.len()).filter(|at| fates.get(*at) == fate).count() as u64;
    Ok(Packed {
        zero_pages: count(Fate::Zero),
        unchanged_pages: count(Fate::Unchanged),
        build: (build.page_count > 0).then_some(build),
        header,
    })
}

/// The runs in groups of at most `BATCH_PAGES` pages, cut where that has to be.
fn batches(runs: &[SourceRun]) -> impl Iterator<Item = Vec<SourceRun>> + '_ {
    let mut runs = runs.iter().copied();
    let mut rest: Option<SourceRun> = None;
    std::iter::from_fn(move || {
        let (mut batch, mut room) = (Vec::new(), BATCH_PAGES);
        while let Some(run) = rest.take().or_else(|| runs.next()) {
            let (now, later) = split_run(run, room);
            room -= now.map_or(0, |run| run.pages);
            batch.extend(now);
            rest = later;
            if room == 0 {
                break;
            }
        }
        (!batch.is_empty()).then_some(batch)
    })
}

/// The first `pages` of a run, and what is left.
fn split_run(run: SourceRun, pages: u64) -> (Option<SourceRun>, Option<SourceRun>) {
    let front = run.pages.min(pages);
    let after = |step| SourceRun {
        page: run.page + step,
        pages: run.pages - step,
        position: run.position.map(|position| position + step),
    };
    let now = (front > 0).then_some(SourceRun {
        pages: front,
        ..run
    });
    (now, (front < run.pages).then(|| after(front)))
}

/// What the first pass keeps between batches.
struct Packer<'a> {
    file: &'a NewFile,
    writer: BuildWriter<&'a NewFile>,
    encoders: Vec<Encoder>,
    fates: Fates,
    captured: Vec<u8>,
    parent: Vec<u8>,
    /// Pages to store that are not in a frame yet.
    pending: Vec<u8>,
}

impl<'a> Packer<'a> {
    fn new(file: &'a NewFile) -> Result<Self> {
        let encoders = (0..THREADS)
            .map(|_| Encoder::new())
            .collect::<std::result::Result<_, _>>();
        Ok(Self {
            file,
            writer: BuildWriter::new(file).map_err(|error| file.error(error))?,
            encoders: encoders.map_err(|error| file.error(error))?,
            fates: Fates::default(),
            captured: Vec::new(),
            parent: Vec::new(),
            pending: Vec::new(),
        })
    }

    fn add_batch(
        &mut self,
        source: &PageSource,
        batch: &[SourceRun],
        parent: &mut ParentPages<'_>,
    ) -> Result<()> {
        let data: Vec<SourceRun> = batch
            .iter()
            .copied()
            .filter(|run| run.position.is_some())
            .collect();
        let bytes = data.iter().map(|run| run.pages as usize * PAGE_SIZE).sum();
        self.captured.resize(bytes, 0);
        self.parent.resize(bytes, 0);
        parent.prepare(&data, &mut self.parent)?;
        let judged = self.judge_data(source, &data, parent)?;
        let mut judged = judged.iter().zip(self.captured.chunks_exact(PAGE_SIZE));
        for run in batch {
            for _ in 0..run.pages {
                let (fate, page) = match run.position.and_then(|_| judged.next()) {
                    Some((fate, page)) => (*fate, page),
                    None => (Fate::Zero, &[][..]),
                };
                self.fates.push(fate);
                if fate == Fate::Stored {
                    self.pending.extend_from_slice(page);
                }
            }
        }
        self.encode_full_frames()
    }

    /// Reads and judges the pages of data runs, each thread its share.
    fn judge_data(
        &mut self,
        source: &PageSource,
        data: &[SourceRun],
        parent: &ParentPages<'_>,
    ) -> Result<Vec<Fate>> {
        let shares = share_runs(data, THREADS);
        let mut parts = Vec::new();
        let (mut captured, mut parents) = (&mut self.captured[..], &mut self.parent[..]);
        for share in &shares {
            let bytes = share.iter().map(|run| run.pages as usize * PAGE_SIZE).sum();
            let (now, later) = captured.split_at_mut(bytes);
            let (parent_now, parent_later) = parents.split_at_mut(bytes);
            (captured, parents) = (later, parent_later);
            parts.push((share, now, parent_now));
        }
        let judged = for_each_part(parts, |(runs, captured, parents)| {
            read_and_judge(source, runs, captured, parent, parents)
        });
        Ok(judged.into_iter().collect::<Result<Vec<_>>>()?.concat())
    }

    fn encode_full_frames(&mut self) -> Result<()> {
        let at_once = FRAMES_AT_ONCE * FRAME_BYTES;
        let full = self.pending.len() / at_once * at_once;
        if full > 0 {
            self.encode(full)?;
            self.pending.drain(..full);
        }
        Ok(())
    }

    /// Compresses the first `bytes` of what is pending and writes the frames in order.
    fn encode(&mut self, bytes: usize) -> Result<()> {
        for group in self.pending[..bytes].chunks(FRAMES_AT_ONCE * FRAME_BYTES) {
            let frames = group.len().div_ceil(FRAME_BYTES);
            let share = frames.div_ceil(self.encoders.len()) * FRAME_BYTES;
            let parts = group.chunks(share).zip(self.encoders.iter_mut());
            let encoded = for_each_part(parts, |(pages, encoder)| {
                pages
                    .chunks(FRAME_BYTES)
                    .map(|raw| encoder.encode(raw))
                    .collect::<Vec<_>>()
            });
            for frame in encoded.into_iter().flatten() {
                let written = frame.and_then(|frame| self.writer.push(&frame));
                written.map_err(|error| self.file.error(error))?;
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(BuildSummary, Fates)> {
        self.encode(self.pending.len())?;
        let (build, _) = self
            .writer
            .finish()
            .map_err(|error| self.file.error(error))?;
        Ok((build, self.fates))
    }
}

/// Divides runs into shares of about as many pages each.
fn share_runs(runs: &[SourceRun], shares: usize) -> Vec<Vec<SourceRun>> {
    let pages: u64 = runs.iter().map(|run| run.pages).sum();
    let each = pages.div_ceil(shares as u64).max(64);
    let mut divided = vec![Vec::new()];
    let mut room = each;
    for run in runs {
        let mut rest = Some(*run);
        while let Some(run) = rest.take() {
            if room == 0 {
                divided.push(Vec::new());
                room = each;
            }
            let (now, later) = split_run(run, room);
            room -= now.map_or(0, |run| run.pages);
            if let Some(last) = divided.last_mut() {
                last.extend(now);
            }
            rest = later;
        }
    }
    divided
}

fn read_and_judge(
    source: &PageSource,
    runs: &[SourceRun],
    captured: &mut [u8],
    parent: &ParentPages<'_>,
    parents: &mut [u8],
) -> Result<Vec<Fate>> {
    let mut at = 0;
    for run in runs.iter().filter(|run| run.position.is_some()) {
        let end = at + run.pages as usize * PAGE_SIZE;
        source.read(run.position.unwrap_or_default(), &mut captured[at..end])?;
        parent.read(run, &mut parents[at..end])?;
        at = end;
    }
    let pages = captured
        .chunks_exact(PAGE_SIZE)
        .zip(parents.chunks_exact(PAGE_SIZE));
    Ok(pages.map(|(page, parent)| judge(page, parent)).collect())
}

/// The extents that the fates of a capture's pages make: zero or stored, merged.
fn over<'a>(runs: &'a [SourceRun], fates: &'a Fates) -> impl Iterator<Item = Extent> + 'a {
    let mut stored = 0;
    let pages = runs
        .iter()
        .flat_map(|run| run.page..run.page + run.pages)
        .enumerate();
    pages.filter_map(move |(at, page)| {
        let target = match fates.get(at) {
            Fate::Unchanged => return None,
            Fate::Zero => Target::ZERO,
            Fate::Stored => {
                stored += 1;
                Target {
                    build: NEW_BUILD,
                    position: stored - 1,
                }
            }
        };
        Some(Extent {
            page,
            length: 1,
            target,
        })
    })
}
