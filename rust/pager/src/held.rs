//! Reads that can't be answered: they wait, and are tried again, until they can be or the bound
//! has come. Then the VMM is killed first and the read fails second: an error must never reach a
//! guest that goes on.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::build::Unreadable;

/// How often a held read is tried again.
pub const AGAIN: Duration = Duration::from_millis(500);
/// Reads that are held at once; beyond that the oldest fails early.
pub const HELD_MAX: usize = 1024;

/// A read that waits.
#[derive(Debug, Clone)]
pub struct HeldRead {
    /// The end of the connection that it came from.
    pub end: usize,
    /// Its name there.
    pub unique: u64,
    /// The file.
    pub node: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub size: usize,
    /// The thread that waits.
    pub pid: u32,
    /// Since when.
    pub since: Instant,
    /// What is in the way.
    pub why: Unreadable,
}

/// All reads that wait.
#[derive(Debug, Default)]
pub struct Held {
    reads: Mutex<VecDeque<HeldRead>>,
    more: Condvar,
}

impl Held {
    /// Holds a read; returns one that has to fail now, where there are too many.
    pub fn add(&self, read: HeldRead) -> Option<HeldRead> {
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        reads.push_back(read);
        self.more.notify_all();
        (reads.len() > HELD_MAX)
            .then(|| reads.pop_front())
            .flatten()
    }

    /// Takes all of them for another try, once there are some; waits between two tries.
    pub fn take(&self) -> Vec<HeldRead> {
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        while reads.is_empty() {
            reads = self
                .more
                .wait(reads)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(reads);
        std::thread::sleep(AGAIN);
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        reads.drain(..).collect()
    }

    /// What the reads of a file wait for, and since when the first does.
    pub fn of(&self, node: u64) -> Option<(Unreadable, Duration)> {
        let reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        let first = reads
            .iter()
            .filter(|read| read.node == node)
            .min_by_key(|read| read.since)?;
        Some((first.why.clone(), first.since.elapsed()))
    }
}
