//! Gives the kernel what a guest will ask for, before it does: what guests before it asked for
//! first, verified as every page is, into the page cache that all clones share.
//!
//! It goes before no guest: from a local medium a piece waits while reads are being answered; over
//! one with latency some requests are left to them. It is a hint to the end: what can't be read is
//! left to the read that will be held for it.
//!
//! Who fetches never stores. A store waits for a page that is being read, and that read may wait
//! for a frame of any other fetch: fetches wait for nobody.

use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use crate::ahead::{self, Span};
use crate::build::{Unreadable, AHEAD_MAX};
use crate::device::{Device, Part};
use crate::nodes::Node;
use crate::server::{slices, Server};
use crate::trace::{pieces, Trace, GRANULE};
use crate::workers::Workers;

/// How a medium is read ahead of guests.
struct Pace {
    /// Bytes that are read at once.
    piece: u64,
    /// Granules of a trace that are sorted by their place before they are read: their order among
    /// themselves matters less than reads that are whole.
    sorted: usize,
}

const LOCAL: Pace = Pace {
    piece: 1 << 20,
    sorted: 64,
};
/// Pieces are made requests of by where they are stored.
const REMOTE: Pace = Pace {
    piece: 4 << 20,
    sorted: 1024,
};
/// Bytes and slices that are stored at once: the kernel takes 1,024 slices.
const STORED_BYTES: usize = 1 << 20;
const STORED_SLICES: usize = 512;
/// The same of what comes over a medium with latency: what has come waits for no more of it.
const STORED_BYTES_REMOTE: u64 = 256 << 10;
/// Files that are brought at once from local media.
const LOCAL_AT_ONCE: usize = 8;
/// How long a piece waits for reads of guests at most.
const YIELD: Duration = Duration::from_millis(5);
const YIELD_STEP: Duration = Duration::from_micros(100);

/// What threads are called that store. Where one waits for a page, a signal does not end it: a
/// pager that is killed lives on in such threads alone, until its successor answers the read.
pub const STORES: &str = "store";

/// One kind of medium does not wait for the other.
static LOCAL_WORKERS: LazyLock<Workers> = LazyLock::new(|| Workers::named(STORES, LOCAL_AT_ONCE));
static REMOTE_WORKERS: LazyLock<Workers> = LazyLock::new(|| Workers::named(STORES, AHEAD_MAX));

/// One file that is being brought.
struct Job {
    server: Arc<Server>,
    node: Arc<Node>,
    device: Arc<Device>,
    todo: Vec<Todo>,
    next: AtomicUsize,
    /// Threads that are at it.
    at_it: AtomicUsize,
}

/// What is brought at once.
enum Todo {
    /// A piece of the device.
    Piece(u64, u64),
    /// A request, over a medium with latency.
    Span(Span),
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
    if node.passed().is_some() {
        return Ok(0); // nobody would look there
    }
    let device = node.device(&server.open).map_err(io::Error::other)?;
    let pace = match device.has_latency() {
        true => REMOTE,
        false => LOCAL,
    };
    let pieces = plan(node, &trace, budget_bytes, &pace);
    let bytes = pieces.iter().map(|(_, length)| length).sum();
    let (server, node) = (server.clone(), node.clone());
    if device.has_latency() {
        // Builds are opened over it: whoever asks for this does not wait for that.
        REMOTE_WORKERS.run(Box::new(move || match spread(&device, &pieces) {
            Ok(todo) => Job::new(server, node, device, todo).start(),
            Err(error) => given_up(&node, &error.into()),
        }));
    } else {
        let todo = pieces
            .into_iter()
            .map(|(at, length)| Todo::Piece(at, length));
        Job::new(server, node, device, todo.collect()).start();
    }
    Ok(bytes)
}

/// Pieces of a device as requests; first what takes none.
fn spread(device: &Device, pieces: &[(u64, u64)]) -> Result<Vec<Todo>, Unreadable> {
    let (spans, others) = ahead::spans(device, pieces)?;
    let others = others
        .into_iter()
        .map(|(at, length)| Todo::Piece(at, length));
    Ok(others.chain(spans.into_iter().map(Todo::Span)).collect())
}

fn given_up(node: &Node, error: &io::Error) {
    eprintln!("{}: no more of it is brought ahead: {error}", node.name);
}

/// What is to be brought, as bytes of the file, in order; nobody else brings it from now on.
fn plan(node: &Node, trace: &Trace, budget_bytes: u64, pace: &Pace) -> Vec<(u64, u64)> {
    let most = usize::try_from(budget_bytes / GRANULE).unwrap_or(usize::MAX);
    let mut wanted: Vec<u32> = node.with_given(|given| {
        let numbers = trace.granules.iter().map(|one| one.number);
        numbers
            .filter(|number| given.take(*number))
            .take(most)
            .collect()
    });
    pieces(&mut wanted, node.size_bytes, pace.piece, pace.sorted)
}

impl Job {
    fn new(server: Arc<Server>, node: Arc<Node>, device: Arc<Device>, todo: Vec<Todo>) -> Self {
        Self {
            server,
            node,
            device,
            todo,
            next: AtomicUsize::new(0),
            at_it: AtomicUsize::new(0),
        }
    }

    fn start(self) {
        Arc::new(self).join();
    }

    /// How many threads may be at it now.
    fn at_once(&self) -> usize {
        match self.device.has_latency() {
            true => self.device.builds().bears.now(),
            false => 1,
        }
    }

    /// Has as many threads at it as may be, and have something to do.
    fn join(self: &Arc<Self>) {
        let left = self
            .todo
            .len()
            .saturating_sub(self.next.load(Ordering::Relaxed));
        let most = self.at_once();
        for _ in 0..left {
            if self.at_it.fetch_add(1, Ordering::Relaxed) >= most {
                self.at_it.fetch_sub(1, Ordering::Relaxed);
                return;
            }
            let job = self.clone();
            let workers = match self.device.has_latency() {
                true => &REMOTE_WORKERS,
                false => &LOCAL_WORKERS,
            };
            workers.run(Box::new(move || job.run()));
        }
    }

    /// Takes a thread away where more are at it than may be: never the last.
    fn leave(&self) -> bool {
        let most = self.at_once();
        let fewer = |now: usize| (now > most).then(|| now - 1);
        let relaxed = Ordering::Relaxed;
        self.at_it.fetch_update(relaxed, relaxed, fewer).is_ok()
    }

    fn run(self: &Arc<Self>) {
        while !self.leave() {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(todo) = self.todo.get(at) else {
                self.at_it.fetch_sub(1, Ordering::Relaxed);
                return;
            };
            if !self.device.has_latency() {
                self.step_aside();
            }
            let began = Instant::now();
            if let Err(error) = self.bring(todo) {
                given_up(&self.node, &error);
                self.next.fetch_add(self.todo.len(), Ordering::Relaxed);
            } else if let Todo::Span(_) = todo {
                self.device.builds().bears.answered(began.elapsed());
                self.join();
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

    fn bring(&self, todo: &Todo) -> io::Result<()> {
        match todo {
            Todo::Piece(offset, length) => {
                let mut parts = Vec::new();
                self.device.read(*offset, *length as usize, &mut parts)?;
                self.store(*offset, &parts)
            }
            Todo::Span(span) => {
                let give = |(offset, parts): ahead::Pages| self.store(offset, &parts);
                span.bring(&self.device, STORED_BYTES_REMOTE, give)
            }
        }
    }

    fn store(&self, offset: u64, parts: &[Part]) -> io::Result<()> {
        let slices = slices(parts);
        let (mut rest, mut at) = (&slices[..], offset);
        while !rest.is_empty() {
            let (some, bytes) = head_of(rest);
            self.server
                .fuse
                .store(self.node.number, at, &rest[..some])?;
            (rest, at) = (&rest[some..], at + bytes);
            self.server.seen.stored(&self.node.name, bytes);
        }
        Ok(())
    }
}

/// How many of the first slices are stored at once, and their bytes.
fn head_of(slices: &[IoSlice]) -> (usize, u64) {
    let (mut count, mut bytes) = (0, 0);
    while count < slices.len().min(STORED_SLICES) && bytes < STORED_BYTES {
        bytes += slices[count].len();
        count += 1;
    }
    (count, bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nodes::Nodes;
    use crate::spec::{BlobsSpec, DeviceSpec};

    const PACE: Pace = Pace {
        piece: 2 * GRANULE,
        sorted: 4,
    };

    fn node(size_bytes: u64) -> Arc<Node> {
        let nodes = Nodes::take_up(std::iter::empty(), 0);
        let spec = DeviceSpec {
            size_bytes,
            header: "nowhere".into(),
            header_digest: "0".repeat(64),
            blobs: BlobsSpec::directory("/nowhere"),
            captures: Vec::new(),
        };
        nodes.put("a", nodes.plan("a", &spec).unwrap());
        nodes.find("a").unwrap()
    }

    fn planned(node: &Node, wanted: &[u32], budget: u64) -> Vec<(u64, u64)> {
        let trace = Trace::empty(node.size_bytes).with(wanted, &{
            let mut all = wanted.to_vec();
            all.sort_unstable();
            all
        });
        let pieces = plan(node, &trace, budget * GRANULE, &PACE);
        let granules = |bytes: u64| bytes / GRANULE;
        let of = |(at, length): &(u64, u64)| (granules(*at), granules(*length));
        pieces.iter().map(of).collect()
    }

    #[test]
    fn neighbours_are_read_as_one_up_to_a_piece_and_groups_keep_their_order() {
        let node = node(100 * GRANULE);
        let found = planned(&node, &[9, 8, 7, 1, 30, 2, 29], 99);
        assert_eq!(found, [(1, 1), (7, 2), (9, 1), (2, 1), (29, 2)]);
        assert_eq!(planned(&node, &[9, 50], 99), [(50, 1)]);
    }

    #[test]
    fn the_budget_is_taken_from_the_front() {
        let node = node(100 * GRANULE);
        assert_eq!(planned(&node, &[9, 3, 5], 2), [(3, 1), (9, 1)]);
        assert_eq!(planned(&node, &[9, 3, 5], 2), [(5, 1)]);
    }

    #[test]
    fn the_last_granule_of_a_file_may_be_short() {
        let node = node(3 * GRANULE - 4096);
        let trace = Trace::empty(node.size_bytes).with(&[], &[2]);
        let pieces = plan(&node, &trace, GRANULE, &PACE);
        assert_eq!(pieces, [(2 * GRANULE, GRANULE - 4096)]);
    }

    #[test]
    fn no_more_is_stored_at_once_than_the_kernel_takes() {
        let (small, large) = ([0; 8], vec![0; STORED_BYTES]);
        let many: Vec<IoSlice> = (0..2000).map(|_| IoSlice::new(&small)).collect();
        assert_eq!(head_of(&many), (STORED_SLICES, STORED_SLICES as u64 * 8));
        let few = [IoSlice::new(&large), IoSlice::new(&small)];
        assert_eq!(head_of(&few), (1, STORED_BYTES as u64));
    }
}
