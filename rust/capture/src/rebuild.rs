//! Makes a damaged or missing build again, from its own frames that are whole and from plain files
//! of devices that have its pages.
//!
//! A build is named by what its frames are, so nothing that is made here has to be believed: what
//! comes out is the build or it is not, and only the build gets its name. Frames whose stored bytes
//! are right are taken over as they are; the pages of the others are collected in a temporary file
//! by their position, and packed again.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use diapause_format::{
    hex, BuildWriter, Digest, EncodedFrame, Encoder, Extent, FormatError, FRAME_BYTES, FRAME_PAGES,
    PAGE_SIZE,
};

use crate::blob::NewFile;
use crate::builds::{check_frames, OpenBuild};
use crate::error::{Error, Result};
use crate::headers::HeaderFile;
use crate::sums::{digest_pages, FlatSums, CHUNK_BYTES, CHUNK_PAGES};

/// A plain file of a device, and the header that says which pages of which build it has.
#[derive(Debug, Clone)]
pub struct FlatPages {
    /// The device's header, and its digest.
    pub header: (PathBuf, Digest),
    /// The plain file.
    pub flat: PathBuf,
    /// Its digests, where there are any: a chunk that is not what they say gives nothing.
    pub sums: Option<PathBuf>,
}

/// What a build was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rebuilt {
    /// Frames that were whole.
    pub kept_frames: u64,
    /// Frames that were packed again.
    pub packed_frames: u64,
    /// Size of the file.
    pub size_bytes: u64,
}

/// Makes build `id` again in `builds`, and verifies all of it before it has its name.
///
/// # Errors
/// Damaged where what is there is not enough or gives another build; storage. What was there stays.
pub fn rebuild(id: &Digest, from: &[FlatPages], builds: &Path, tmp: &Path) -> Result<Rebuilt> {
    let name = hex(id);
    let damaged = |cause: String| Error::Damaged {
        blob: name.clone(),
        cause,
    };
    let place = builds.join(&name);
    let old = OpenBuild::open(&place, id).ok();
    let page_count = match &old {
        Some(old) => Some(old.table().page_count()),
        None => from.iter().find_map(|flat| page_count_of(id, flat)),
    };
    let page_count =
        page_count.ok_or_else(|| damaged("no header that is whole maps to it".to_owned()))?;
    let pages = NewFile::create_in(tmp, "pages")?.needing(page_count * PAGE_SIZE as u64);
    let mut collected = Collected::new(&pages, page_count);
    if let Some(old) = &old {
        for frame in (0..old.table().frame_count()).filter(|at| old.stored_frame(*at).is_some()) {
            collected.keep_frame(frame);
        }
    }
    for flat in from {
        match collected.take_from(id, flat) {
            // A source that can't be read gives what it has given; the others may have the rest.
            Ok(()) | Err(Error::Damaged { .. } | Error::Missing { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let missing = collected.missing();
    if missing > 0 {
        return Err(damaged(format!(
            "{missing} of its {page_count} pages lie in no other file that is whole"
        )));
    }
    let out = NewFile::create_in(tmp, "build")?.needing(page_count * PAGE_SIZE as u64);
    let (found, rebuilt) = write(&out, &collected, old.as_ref())?;
    if found != *id {
        return Err(damaged(
            "its pages, packed again, are another build".to_owned(),
        ));
    }
    out.sync()?;
    check_frames(&OpenBuild::open(out.path(), id)?, 1)?;
    out.publish(&place)?;
    Ok(rebuilt)
}

/// How many pages a header says that the build has.
fn page_count_of(id: &Digest, flat: &FlatPages) -> Option<u64> {
    let header = HeaderFile {
        path: &flat.header.0,
        digest: &flat.header.1,
    };
    let mut reader = header.open().ok()?;
    while reader.next_extent().ok()?.is_some() {}
    let found = reader.builds().iter().find(|build| build.id == *id);
    found.map(|build| build.pages)
}

fn write(
    out: &NewFile,
    collected: &Collected<'_>,
    old: Option<&OpenBuild>,
) -> Result<(Digest, Rebuilt)> {
    let failed = |error: FormatError| out.error(error);
    let mut writer = BuildWriter::new(out).map_err(failed)?;
    let mut encoder = Encoder::new().map_err(failed)?;
    let (mut kept_frames, mut packed_frames) = (0, 0);
    for frame in 0..collected.page_count.div_ceil(FRAME_PAGES as u64) {
        let whole = old.and_then(|old| Some((old, old.stored_frame(frame)?)));
        let encoded = match whole {
            Some((old, bytes)) => {
                kept_frames += 1;
                let entry = old.table().frame(frame);
                EncodedFrame {
                    bytes,
                    pages: old.table().frame_bytes(frame) / PAGE_SIZE,
                    compressed: entry.compressed,
                    digest: entry.digest,
                }
            }
            None => {
                packed_frames += 1;
                encoder.encode(&collected.frame(frame)?).map_err(failed)?
            }
        };
        writer.push(&encoded).map_err(failed)?;
    }
    let (summary, _) = writer.finish().map_err(failed)?;
    let size_bytes = summary.size_bytes;
    let rebuilt = Rebuilt {
        kept_frames,
        packed_frames,
        size_bytes,
    };
    Ok((summary.id, rebuilt))
}

/// Pages of the build, each at its position in a temporary file.
struct Collected<'a> {
    file: &'a NewFile,
    page_count: u64,
    /// A bit for each page that is there, or lies in a frame that is whole.
    have: Vec<u64>,
}

impl<'a> Collected<'a> {
    fn new(file: &'a NewFile, page_count: u64) -> Self {
        let have = vec![0; page_count.div_ceil(64) as usize];
        Self {
            file,
            page_count,
            have,
        }
    }

    fn has(&self, position: u64) -> bool {
        self.have[(position / 64) as usize] >> (position % 64) & 1 == 1
    }

    fn set(&mut self, position: u64) {
        self.have[(position / 64) as usize] |= 1 << (position % 64);
    }

    fn missing(&self) -> u64 {
        let have: u64 = self
            .have
            .iter()
            .map(|bits| u64::from(bits.count_ones()))
            .sum();
        self.page_count - have
    }

    fn keep_frame(&mut self, frame: u64) {
        let first = frame * FRAME_PAGES as u64;
        (first..self.page_count.min(first + FRAME_PAGES as u64)).for_each(|at| self.set(at));
    }

    fn frame(&self, frame: u64) -> Result<Vec<u8>> {
        let offset = frame * FRAME_BYTES as u64;
        let left = self.page_count * PAGE_SIZE as u64 - offset;
        let mut bytes = vec![0; left.min(FRAME_BYTES as u64) as usize];
        let read = self.file.file().read_exact_at(&mut bytes, offset);
        read.map_err(|cause| {
            let path = self.file.path();
            Error::read_failed(&path.display().to_string(), path, cause)
        })?;
        Ok(bytes)
    }

    /// Takes the pages of build `id` that are not there yet from a device's plain file.
    fn take_from(&mut self, id: &Digest, from: &FlatPages) -> Result<()> {
        let header = HeaderFile {
            path: &from.header.0,
            digest: &from.header.1,
        };
        let mut reader = header.open()?;
        let mut chunks = Chunks::open(from, reader.page_count())?;
        while let Some(extent) = reader.next_extent().map_err(|error| header.error(error))? {
            let build = extent.target.build as usize;
            if extent.target.is_zero() || reader.builds()[build - 1].id != *id {
                continue;
            }
            self.take(extent, &mut chunks)?;
        }
        Ok(())
    }

    fn take(&mut self, extent: Extent, chunks: &mut Chunks) -> Result<()> {
        for step in 0..extent.length {
            let position = extent.target.position + step;
            if position >= self.page_count || self.has(position) {
                continue;
            }
            let Some(bytes) = chunks.page(extent.page + step)? else {
                continue;
            };
            let wrote = self
                .file
                .file()
                .write_all_at(bytes, position * PAGE_SIZE as u64);
            wrote.map_err(|cause| self.file.write_failed(cause))?;
            self.set(position);
        }
        Ok(())
    }
}

/// A plain file, read chunk by chunk; a chunk that is not what its digest says has no pages.
struct Chunks {
    path: PathBuf,
    file: File,
    page_count: u64,
    sums: Option<FlatSums>,
    now: Option<u64>,
    bytes: Vec<u8>,
    good: bool,
    scratch: Vec<u8>,
}

impl Chunks {
    fn open(from: &FlatPages, page_count: u64) -> Result<Self> {
        let name = from.flat.display().to_string();
        let failed = |cause| Error::read_failed(&name, &from.flat, cause);
        let file = File::open(&from.flat).map_err(failed)?;
        let sums = from.sums.as_deref().map(FlatSums::read).transpose()?;
        let same = sums
            .as_ref()
            .is_none_or(|sums| sums.page_count() == page_count);
        let size_bytes = file.metadata().map_err(failed)?.len();
        if size_bytes != page_count * PAGE_SIZE as u64 || !same {
            return Err(Error::Damaged {
                blob: name,
                cause: "it is of another size than its header says".to_owned(),
            });
        }
        Ok(Self {
            path: from.flat.clone(),
            file,
            page_count,
            sums,
            now: None,
            bytes: Vec::new(),
            good: false,
            scratch: Vec::new(),
        })
    }

    fn page(&mut self, page: u64) -> Result<Option<&[u8]>> {
        let chunk = page / CHUNK_PAGES;
        if self.now != Some(chunk) {
            self.load(chunk)?;
        }
        let at = (page % CHUNK_PAGES) as usize * PAGE_SIZE;
        Ok(self.good.then(|| &self.bytes[at..at + PAGE_SIZE]))
    }

    fn load(&mut self, chunk: u64) -> Result<()> {
        self.now = Some(chunk);
        let pages = (self.page_count - chunk * CHUNK_PAGES).min(CHUNK_PAGES);
        self.bytes.resize(pages as usize * PAGE_SIZE, 0);
        let read = self
            .file
            .read_exact_at(&mut self.bytes, chunk * CHUNK_BYTES);
        self.good = match read {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => false,
            Err(cause) => {
                let name = self.path.display().to_string();
                return Err(Error::read_failed(&name, &self.path, cause));
            }
            Ok(()) => match &self.sums {
                Some(sums) => {
                    digest_pages(&self.bytes, &mut self.scratch) == sums.chunks()[chunk as usize]
                }
                None => true,
            },
        };
        Ok(())
    }
}
