//! What was counted of each file: reads by where they came from, how long they took, stalls.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::device::Origin;

/// Buckets of latencies: bucket n is of those below 2^n microseconds.
const BUCKETS: usize = 32;

/// Reads of one origin.
#[derive(Debug, Clone, Default)]
struct Reads {
    count: u64,
    bytes: u64,
    sum_us: u64,
    latencies: [u64; BUCKETS],
}

/// What is said of reads of one origin; latencies are upper bounds, within a factor of two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReadsSeen {
    /// How many.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Half of them took no longer.
    pub p50_us: u64,
    /// All but one of a hundred took no longer.
    pub p99_us: u64,
}

/// All reads of one origin since this pager began, for whoever adds them up over time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReadsTotal {
    /// How many.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How long they took together.
    pub sum_us: u64,
    /// How many took less than 2^n microseconds and not less than half of that, by n.
    pub below_us: Vec<u64>,
}

/// What is said of all files together, also of those that are gone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Reads by the slowest place that they touched.
    pub reads: HashMap<&'static str, ReadsTotal>,
    /// Reads that had to wait for a blob.
    pub stalls: u64,
    /// Bytes that were given to a guest before it asked for them.
    pub stored_bytes: u64,
    /// Those of them that a guest was seen to have touched, by granules.
    pub used_bytes: u64,
}

/// What is said of one file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FileSeen {
    /// Reads by the slowest place that they touched.
    pub reads: HashMap<&'static str, ReadsSeen>,
    /// Reads that had to wait for a blob.
    pub stalls: u64,
    /// Bytes that the kernel was given before it asked for them.
    pub stored_bytes: u64,
    /// Bytes of frames that were asked for ahead of whoever reads it from first to last.
    pub ahead_bytes: u64,
}

#[derive(Debug, Clone, Default)]
struct File {
    reads: [Reads; 5],
    stalls: u64,
    stored_bytes: u64,
    used_bytes: u64,
    ahead_bytes: u64,
}

/// All that was counted.
#[derive(Debug, Default)]
pub struct Seen(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    files: HashMap<String, File>,
    /// What was counted of files that are gone: a total never falls.
    gone: File,
}

const ORIGINS: [(Origin, &str); 5] = [
    (Origin::Zero, "zero"),
    (Origin::Kept, "kept"),
    (Origin::Capture, "capture"),
    (Origin::Local, "local"),
    (Origin::Remote, "remote"),
];

impl Seen {
    /// A read was answered.
    pub fn served(&self, file: &str, origin: Origin, bytes: u64, took: Duration) {
        self.change(file, |of| {
            let reads = &mut of.reads[origin as usize];
            reads.count += 1;
            reads.bytes += bytes;
            reads.sum_us += took.as_micros() as u64;
            let us = took.as_micros().max(1).ilog2() as usize + 1;
            reads.latencies[us.min(BUCKETS - 1)] += 1;
        });
    }

    /// A read has to wait.
    pub fn stalled(&self, file: &str) {
        self.change(file, |of| of.stalls += 1);
    }

    /// Bytes were given to the kernel ahead.
    pub fn stored(&self, file: &str, bytes: u64) {
        self.change(file, |of| of.stored_bytes += bytes);
    }

    /// Bytes that were given ahead were touched.
    pub fn used(&self, file: &str, bytes: u64) {
        self.change(file, |of| of.used_bytes += bytes);
    }

    /// Frames were asked for ahead.
    pub fn ahead(&self, file: &str, bytes: u64) {
        self.change(file, |of| of.ahead_bytes += bytes);
    }

    /// What was counted of a file.
    pub fn of(&self, file: &str) -> FileSeen {
        let counts = self.lock();
        let Some(of) = counts.files.get(file) else {
            return FileSeen::default();
        };
        let reads = ORIGINS.iter().filter_map(|(origin, name)| {
            let reads = &of.reads[*origin as usize];
            (reads.count > 0).then(|| (*name, reads.seen()))
        });
        FileSeen {
            reads: reads.collect(),
            stalls: of.stalls,
            stored_bytes: of.stored_bytes,
            ahead_bytes: of.ahead_bytes,
        }
    }

    /// What was counted of all files.
    pub fn totals(&self) -> Totals {
        let mut all = File::default();
        {
            let counts = self.lock();
            all.add(&counts.gone);
            counts.files.values().for_each(|file| all.add(file));
        }
        let reads = ORIGINS.iter().map(|(origin, name)| {
            let reads = &all.reads[*origin as usize];
            (*name, reads.total())
        });
        Totals {
            reads: reads.collect(),
            stalls: all.stalls,
            stored_bytes: all.stored_bytes,
            used_bytes: all.used_bytes,
        }
    }

    /// Forgets a file.
    pub fn forget(&self, file: &str) {
        let mut counts = self.lock();
        if let Some(of) = counts.files.remove(file) {
            counts.gone.add(&of);
        }
    }

    fn change(&self, file: &str, change: impl FnOnce(&mut File)) {
        let mut counts = self.lock();
        if let Some(of) = counts.files.get_mut(file) {
            return change(of);
        }
        change(counts.files.entry(file.to_owned()).or_default());
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl File {
    fn add(&mut self, other: &Self) {
        self.stalls += other.stalls;
        self.stored_bytes += other.stored_bytes;
        self.used_bytes += other.used_bytes;
        for (ours, theirs) in self.reads.iter_mut().zip(&other.reads) {
            ours.count += theirs.count;
            ours.bytes += theirs.bytes;
            ours.sum_us += theirs.sum_us;
            for (ours, theirs) in ours.latencies.iter_mut().zip(&theirs.latencies) {
                *ours += theirs;
            }
        }
    }
}

impl Reads {
    fn total(&self) -> ReadsTotal {
        ReadsTotal {
            count: self.count,
            bytes: self.bytes,
            sum_us: self.sum_us,
            below_us: self.latencies.to_vec(),
        }
    }

    fn seen(&self) -> ReadsSeen {
        ReadsSeen {
            count: self.count,
            bytes: self.bytes,
            p50_us: self.quantile_us(50),
            p99_us: self.quantile_us(99),
        }
    }

    fn quantile_us(&self, percent: u64) -> u64 {
        let wanted = (self.count * percent).div_ceil(100);
        let mut below = 0;
        for (bucket, count) in self.latencies.iter().enumerate() {
            below += count;
            if below >= wanted {
                return 1 << bucket;
            }
        }
        u64::MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_upper_bounds_and_totals_never_fall() {
        let seen = Seen::default();
        for us in 1..=1000 {
            seen.served("a", Origin::Local, 4096, Duration::from_micros(us));
        }
        seen.stalled("a");
        seen.stored("a", 8192);
        seen.used("a", 4096);
        let of = seen.of("a");
        assert_eq!(of.stalls, 1);
        let local = &of.reads["local"];
        assert_eq!((local.count, local.bytes), (1000, 4096 * 1000));
        assert_eq!((local.p50_us, local.p99_us), (512, 1024));
        seen.served("b", Origin::Local, 8192, Duration::from_micros(3));
        seen.forget("a");
        assert_eq!(seen.of("a"), FileSeen::default());
        let totals = seen.totals();
        assert_eq!((totals.stalls, totals.reads["zero"].count), (1, 0));
        assert_eq!((totals.stored_bytes, totals.used_bytes), (8192, 4096));
        let local = &totals.reads["local"];
        assert_eq!((local.count, local.bytes), (1001, 4096 * 1000 + 8192));
        assert_eq!(local.sum_us, 500_500 + 3);
        assert_eq!(local.below_us.iter().sum::<u64>(), 1001);
        assert_eq!(local.below_us[2], 3, "2, 3 and 3 us");
    }
}
