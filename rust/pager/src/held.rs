//! Reads that can't be answered: they wait, and are tried again, until they can be or the bound
//! has come. Then the VMM is killed first and the read fails second: an error must never reach a
//! guest that goes on.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
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
    reads: Mutex<Reads>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Reads {
    waiting: VecDeque<HeldRead>,
    /// Those that are tried once more right now, which may take as long as their medium does.
    trying: Vec<HeldRead>,
}

impl Reads {
    fn all(&self) -> impl Iterator<Item = &HeldRead> {
        self.waiting.iter().chain(&self.trying)
    }

    fn forget(&mut self, end: usize, unique: u64) {
        self.trying
            .retain(|read| (read.end, read.unique) != (end, unique));
    }
}

impl Held {
    /// Holds a read, anew where it was taken; returns one that has to fail now, where there are too
    /// many.
    pub fn add(&self, read: HeldRead) -> Option<HeldRead> {
        let mut reads = self.lock();
        reads.forget(read.end, read.unique);
        reads.waiting.push_back(read);
        self.more.notify_all();
        let many = reads.waiting.len() > HELD_MAX;
        many.then(|| reads.waiting.pop_front()).flatten()
    }

    /// Takes all of them for another try, once there are some; waits between two tries.
    pub fn take(&self) -> Vec<HeldRead> {
        let mut reads = self.lock();
        while reads.waiting.is_empty() {
            reads = self
                .more
                .wait(reads)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(reads);
        std::thread::sleep(AGAIN);
        let mut reads = self.lock();
        let taken: Vec<HeldRead> = reads.waiting.drain(..).collect();
        reads.trying.extend(taken.iter().cloned());
        taken
    }

    /// A read that was taken is answered.
    pub fn answered(&self, end: usize, unique: u64) {
        self.lock().forget(end, unique);
    }

    /// What the reads of a file wait for, and since when the first does.
    pub fn of(&self, node: u64) -> Option<(Unreadable, Duration)> {
        let reads = self.lock();
        let first = reads
            .all()
            .filter(|read| read.node == node)
            .min_by_key(|read| read.since)?;
        Some((first.why.clone(), first.since.elapsed()))
    }

    /// All that have waited so long, the first of them first.
    pub fn since(&self, waited: Duration) -> Vec<HeldRead> {
        let reads = self.lock();
        let late = reads.all().filter(|read| read.since.elapsed() >= waited);
        let mut late: Vec<HeldRead> = late.cloned().collect();
        late.sort_by_key(|read| read.since);
        late
    }

    /// Waits until something is held.
    pub fn wait_for_some(&self) {
        let mut reads = self.lock();
        while reads.all().next().is_none() {
            reads = self
                .more
                .wait(reads)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Reads> {
        self.reads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(unique: u64, node: u64) -> HeldRead {
        HeldRead {
            end: 0,
            unique,
            node,
            offset: 0,
            size: 4096,
            pid: 1,
            since: Instant::now(),
            why: Unreadable::away("blob", "gone"),
        }
    }

    #[test]
    fn a_read_that_is_tried_again_still_waits() {
        let held = Held::default();
        for (unique, node) in [(1, 7), (2, 7), (3, 8)] {
            assert!(held.add(read(unique, node)).is_none());
        }
        held.wait_for_some();
        let names = |reads: &[HeldRead]| reads.iter().map(|read| read.unique).collect::<Vec<_>>();
        let taken = held.take();
        assert_eq!(names(&taken), [1, 2, 3]);
        assert_eq!(names(&held.since(Duration::ZERO)), [1, 2, 3]);
        assert!(held.since(Duration::from_secs(600)).is_empty());
        assert_eq!(held.of(7).unwrap().0.blob, "blob");
        held.answered(0, 1);
        held.add(taken[1].clone());
        held.answered(0, 3);
        assert_eq!(names(&held.since(Duration::ZERO)), [2]);
        assert!(held.of(7).is_some() && held.of(8).is_none());
    }

    #[test]
    fn beyond_the_most_the_oldest_fails() {
        let held = Held::default();
        for unique in 0..HELD_MAX as u64 {
            assert!(held.add(read(unique, 7)).is_none());
        }
        assert_eq!(held.add(read(5000, 7)).unwrap().unique, 0);
    }
}
