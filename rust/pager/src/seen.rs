//! What was counted of each file: reads by where they came from, how long they took, stalls.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
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

/// What is said of one file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FileSeen {
    /// Reads by the slowest place that they touched.
    pub reads: HashMap<&'static str, ReadsSeen>,
    /// Reads that had to wait for a blob.
    pub stalls: u64,
    /// Bytes that the kernel was given before it asked for them.
    pub stored_bytes: u64,
}

#[derive(Debug, Default)]
struct File {
    reads: [Reads; 5],
    stalls: u64,
    stored_bytes: u64,
}

/// All that was counted.
#[derive(Debug, Default)]
pub struct Seen(Mutex<HashMap<String, File>>);

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

    /// What was counted of a file.
    pub fn of(&self, file: &str) -> FileSeen {
        let files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(of) = files.get(file) else {
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
        }
    }

    /// Forgets a file.
    pub fn forget(&self, file: &str) {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        files.remove(file);
    }

    fn change(&self, file: &str, change: impl FnOnce(&mut File)) {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of) = files.get_mut(file) {
            return change(of);
        }
        change(files.entry(file.to_owned()).or_default());
    }
}

impl Reads {
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
    fn quantiles_are_upper_bounds() {
        let seen = Seen::default();
        for us in 1..=1000 {
            seen.served("a", Origin::Local, 4096, Duration::from_micros(us));
        }
        seen.stalled("a");
        let of = seen.of("a");
        assert_eq!(of.stalls, 1);
        let local = &of.reads["local"];
        assert_eq!((local.count, local.bytes), (1000, 4096 * 1000));
        assert_eq!((local.p50_us, local.p99_us), (512, 1024));
        seen.forget("a");
        assert_eq!(seen.of("a"), FileSeen::default());
    }
}
