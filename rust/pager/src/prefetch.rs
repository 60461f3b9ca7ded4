//! Gives the kernel what a guest will ask for, before it does: what guests before it asked for
//! first, verified as every page is, into the page cache that all clones share.
//!
//! It goes before no guest: from a local medium a piece waits while reads are being answered; over
//! one with latency it leaves most of the requests to them. It is a hint to the end: what can't be
//! read is left to the read that will be held for it.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use crate::device::Device;
use crate::nodes::Node;
use crate::server::{slices, Server};
use crate::trace::{Trace, GRANULE};
use crate::workers::Workers;

/// Bytes that are stored at once.
const PIECE: u64 = 1 << 20;
/// Granules of a trace that are sorted by their place before they are read: their order among
/// themselves matters less than reads that are whole.
const SORTED: usize = 64;
/// Pieces that are under way at once, of all files, and of one file whose medium has latency.
const AT_ONCE: usize = 8;
const REMOTE_AT_ONCE: usize = 4;
/// How long a piece waits for reads of guests at most.
const YIELD: Duration = Duration::from_millis(5);
const YIELD_STEP: Duration = Duration::from_micros(100);

static WORKERS: LazyLock<Workers> = LazyLock::new(|| Workers::new(AT_ONCE));

/// One file that is being brought.
struct Job {
    server: Arc<Server>,
    node: Arc<Node>,
    device: Arc<Device>,
    pieces: Vec<(u64, u64)>,
    next: AtomicUsize,
}

/// Begins to bring a file's trace, at most so many bytes; returns how many will be.
///
/// # Errors
/// There is no trace, or it is damaged; the file can't be read.
pub fn begin(
    server: &Arc<Server>,
    node: &Arc<Node>,
    trace: &Path,
    budget_bytes: u64,
) -> io::Result<u64> {
    let trace = Trace::read(trace, node.size_bytes)?;
    let device = node.device(&server.open).map_err(io::Error::other)?;
    let pieces = plan(node, &trace, budget_bytes);
    let bytes = pieces.iter().map(|(_, length)| length).sum();
    let at_once = match device.has_latency() {
        true => REMOTE_AT_ONCE,
        false => 1,
    };
    let job = Arc::new(Job {
        server: server.clone(),
        node: node.clone(),
        device,
        pieces,
        next: AtomicUsize::new(0),
    });
    for _ in 0..at_once.min(job.pieces.len()) {
        let job = job.clone();
        WORKERS.run(Box::new(move || job.run()));
    }
    Ok(bytes)
}

/// What is to be brought, as bytes of the file, in order; nobody else brings it from now on.
fn plan(node: &Node, trace: &Trace, budget_bytes: u64) -> Vec<(u64, u64)> {
    let most = usize::try_from(budget_bytes / GRANULE).unwrap_or(usize::MAX);
    let mut wanted: Vec<u32> = node.with_given(|given| {
        let numbers = trace.granules.iter().map(|one| one.number);
        numbers
            .filter(|number| given.take(*number))
            .take(most)
            .collect()
    });
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    for some in wanted.chunks_mut(SORTED) {
        some.sort_unstable();
        for number in some {
            let start = u64::from(*number) * GRANULE;
            let length = GRANULE.min(node.size_bytes - start);
            match pieces.last_mut() {
                Some((first, so_far)) if *first + *so_far == start && *so_far < PIECE => {
                    *so_far += length;
                }
                _ => pieces.push((start, length)),
            }
        }
    }
    pieces
}

impl Job {
    fn run(&self) {
        loop {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            let Some((offset, length)) = self.pieces.get(at) else {
                return;
            };
            if !self.device.has_latency() {
                self.step_aside();
            }
            if let Err(error) = self.store(*offset, *length) {
                eprintln!(
                    "{}: no more of it is brought ahead: {error}",
                    self.node.name
                );
                self.next.fetch_add(self.pieces.len(), Ordering::Relaxed);
            }
        }
    }

    /// Lets reads of guests go first, for a while.
    fn step_aside(&self) {
        let until = Instant::now() + YIELD;
        while self.server.is_reading() && Instant::now() < until {
            std::thread::sleep(YIELD_STEP);
        }
    }

    fn store(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut parts = Vec::new();
        let read = self.device.read(offset, length as usize, &mut parts);
        read.map_err(io::Error::other)?;
        let fuse = &self.server.fuse;
        fuse.store(self.node.number, offset, &slices(&parts))?;
        self.server.seen.stored(&self.node.name, length);
        Ok(())
    }
}
