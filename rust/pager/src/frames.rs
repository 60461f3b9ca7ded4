//! Verified pages in memory: recycled buffers, a bounded cache, and who is fetching what.
//!
//! Decoded frames are kept for a while: a window of a device rarely begins and ends with one. The
//! budget of the whole process follows from the constants here: what is kept, what lies ready to be
//! used again, and what readers hold while they answer.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use diapause_format::FRAME_BYTES;
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};

use crate::build::Unreadable;
use crate::flight::{Claim, Flights};

/// Bytes of decoded frames that are kept.
pub const FRAMES_BYTES_MAX: u64 = 16 << 20;
/// Buffers of a whole frame that lie ready to be used again: 2 MiB.
const SPARE_MAX: usize = 32;
/// Few, so that one window of a slow medium fits wherever its frames happen to go.
const SHARDS: usize = 2;
/// At most half for what was used again: the rest has room for a whole window of a slow medium,
/// which must not be gone before it was used once.
const HOT: f64 = 0.5;

/// Buffers that a frame was in. One list for the process: where a buffer was filled says nothing
/// about where the next is needed.
static SPARE: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

/// Has the allocator give back what it does not need: to be called once, before there are threads.
///
/// glibc keeps what was freed in an arena of each thread, for frames that come and go that is
/// several times what is in use. Frames of their own mappings go back when they are dropped; those
/// that are wanted again at once wait in the spare list.
pub fn bound_malloc() {
    let settings = [
        (libc::M_ARENA_MAX, 2),
        (libc::M_MMAP_THRESHOLD, FRAME_BYTES as i32),
        (libc::M_TRIM_THRESHOLD, 4 * FRAME_BYTES as i32),
    ];
    for (name, value) in settings {
        // SAFETY: sets a number of the allocator; no memory of ours is involved.
        let set = unsafe { libc::mallopt(name, value) };
        debug_assert_eq!(set, 1, "mallopt {name}");
    }
}

/// Memory for the pages of one frame, to be filled.
pub struct Pages(Box<[u8]>);

/// Verified pages; cheap to clone, never written again.
#[derive(Clone)]
pub struct Frame(Arc<Pages>);

impl Pages {
    /// Memory of so many bytes; they are whatever they were.
    pub fn new(length: usize) -> Self {
        let spare = || SPARE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let used = (length == FRAME_BYTES).then(spare).flatten();
        Self(used.unwrap_or_else(|| vec![0; length].into_boxed_slice()))
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.0.len() != FRAME_BYTES {
            return;
        }
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE_MAX {
            spare.push(std::mem::take(&mut self.0));
        }
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl From<Pages> for Frame {
    /// Whoever calls it has verified them.
    fn from(pages: Pages) -> Self {
        Self(Arc::new(pages))
    }
}

impl From<Vec<u8>> for Frame {
    /// Whoever calls it has verified them.
    fn from(pages: Vec<u8>) -> Self {
        Pages(pages.into_boxed_slice()).into()
    }
}

impl Deref for Frame {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "Frame of {} bytes", self.len())
    }
}

/// A frame among all: number of the build, number of the frame.
pub(crate) type Key = (u64, u64);
pub(crate) type FrameClaim = Claim<Key, Frame, Unreadable>;

/// Decoded frames of all builds, and the fetches under way.
#[derive(Debug)]
pub struct Frames {
    kept: Cache<Key, Frame, Bytes>,
    under_way: Flights<Key, Frame, Unreadable>,
    next_build: AtomicU64,
}

#[derive(Debug, Clone)]
struct Bytes;

impl Weighter<Key, Frame> for Bytes {
    fn weight(&self, _: &Key, frame: &Frame) -> u64 {
        frame.len() as u64
    }
}

impl Default for Frames {
    fn default() -> Self {
        Self::of(FRAMES_BYTES_MAX)
    }
}

impl Frames {
    /// Keeps at most so many bytes.
    pub fn of(bytes_max: u64) -> Self {
        let items = (bytes_max as usize / FRAME_BYTES).max(1);
        let options = OptionsBuilder::new()
            .estimated_items_capacity(items)
            .weight_capacity(bytes_max)
            .shards(SHARDS)
            .hot_allocation(HOT)
            .build()
            .expect("capacities are set");
        Self {
            kept: Cache::with_options(
                options,
                Bytes,
                DefaultHashBuilder::default(),
                DefaultLifecycle::default(),
            ),
            under_way: Flights::default(),
            next_build: AtomicU64::new(0),
        }
    }

    /// Bytes that are kept now.
    pub fn kept_bytes(&self) -> u64 {
        self.kept.weight()
    }

    /// A number that no build had before.
    pub(crate) fn number_build(&self) -> u64 {
        self.next_build.fetch_add(1, Ordering::Relaxed)
    }

    /// Asks for a frame.
    pub(crate) fn claim(&self, key: Key) -> FrameClaim {
        self.under_way.claim(key, || self.kept.get(&key))
    }

    /// Keeps a frame no longer.
    pub(crate) fn let_go(&self, key: Key) {
        self.kept.remove(&key);
    }

    /// Keeps a frame; before its flight lands.
    pub(crate) fn keep(&self, key: Key, frame: &Frame) {
        self.kept.insert(key, frame.clone());
    }
}
