//! Who reads a file from first to last: READs that follow each other are a run.
//!
//! Of a run that goes on over a medium with latency, what comes next is asked for ahead: a window
//! is on its way while the one before it is read. From a local medium nothing is: tried, with
//! frames that other threads verified ahead and with pages stored ahead, it cost the processors
//! more than it saved, for reading, verifying and copying is all that a READ does. Nothing is
//! given to the kernel that it did not ask for: a READ says where the reader is, a run that ends
//! costs one window, and a trace records what it did without this.
//!
//! Nobody comes back to the frames of a run: they are kept no longer than until they were read, and
//! leave their place to what guests touch here and there.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Runs of one file that are told apart: as many readers of it at once have one each.
const RUNS: usize = 8;
/// Bytes and READs of a run before it counts as one: what guests touch has many that are shorter.
const RUN_BYTES: u64 = 1 << 20;
const RUN_READS: u32 = 3;
/// READs of one reader are answered by several threads, and may be seen in another order.
const SLACK_BYTES: u64 = 2 << 20;
/// How far back it is looked whether a run is dense.
const SPAN_BYTES: u64 = 8 << 20;
/// The first window ahead of a run; each next is twice as large.
const WINDOW_FIRST: u64 = 2 << 20;
/// All windows together: what is fetched ahead must not be gone before it is read, and of the
/// frames that are kept a half is for what was not used yet.
const WINDOWS_BYTES: u64 = 8 << 20;
/// A run that was not seen for so long has no part of the windows.
const RECENT: Duration = Duration::from_millis(500);

static NUMBERS: AtomicU64 = AtomicU64::new(0);
static RECENT_RUNS: LazyLock<Mutex<HashMap<u64, Instant>>> = LazyLock::new(Mutex::default);

/// READs that follow each other.
#[derive(Debug, Clone)]
struct Run {
    number: u64,
    start: u64,
    /// Where the reader is.
    end: u64,
    reads: u32,
    /// Of the last `span` bytes up to `end`, how many were read.
    span: u64,
    bytes: u64,
    window: u64,
    /// Up to where was asked for ahead; 0 where nothing was.
    ahead: u64,
}

/// The runs of one file, the one that was seen last at the end.
#[derive(Debug, Clone, Default)]
pub struct Streams(Vec<Run>);

impl Streams {
    /// A READ of these bytes came, of a file of `size_bytes`. Where it belongs to a run that is
    /// long and dense: what is to be asked for ahead of it now, which may be nothing, with a
    /// window of at most what `most` says of the run's number.
    pub fn note(
        &mut self,
        offset: u64,
        length: u64,
        size_bytes: u64,
        most: impl FnOnce(u64) -> u64,
    ) -> Option<Range<u64>> {
        let found = self.0.iter().rposition(|run| run.takes(offset, length));
        let mut run = match found {
            Some(at) => self.0.remove(at),
            None => Run::new(offset),
        };
        run.add(offset, length);
        let number = run.number;
        let flows = run.flows();
        let planned = flows.then(|| run.plan(size_bytes, most(number)));
        if self.0.len() >= RUNS {
            self.0.remove(0);
        }
        self.0.push(run);
        planned
    }
}

impl Run {
    fn new(start: u64) -> Self {
        Self {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            start,
            end: start,
            reads: 0,
            span: 0,
            bytes: 0,
            window: WINDOW_FIRST,
            ahead: 0,
        }
    }

    /// Whether a READ goes on with it: at its end, a little before that, or one READ further.
    fn takes(&self, offset: u64, length: u64) -> bool {
        let back = self.start.max(self.end.saturating_sub(SLACK_BYTES));
        (back..=self.end.saturating_add(length)).contains(&offset)
    }

    fn add(&mut self, offset: u64, length: u64) {
        let end = self.end.max(offset.saturating_add(length));
        self.reads = self.reads.saturating_add(1);
        self.span += end - self.end;
        self.bytes = self.span.min(self.bytes + length);
        self.end = end;
        while self.span > SPAN_BYTES {
            (self.span, self.bytes) = (self.span / 2, self.bytes / 2);
        }
    }

    /// Whether it is long, and nearly nothing was left out.
    fn flows(&self) -> bool {
        let long = self.reads >= RUN_READS && self.end - self.start >= RUN_BYTES;
        long && self.bytes >= self.span / 4 * 3
    }

    /// The next window, where less than half of the last one is left; else nothing.
    fn plan(&mut self, size_bytes: u64, most: u64) -> Range<u64> {
        let from = self.end.max(self.ahead);
        if (from - self.end) * 2 > self.window.min(most) {
            return from..from;
        }
        if self.ahead > 0 {
            self.window *= 2;
        }
        self.window = self.window.min(most);
        let to = size_bytes.min(self.end.saturating_add(self.window));
        self.ahead = to.max(from);
        from..self.ahead
    }
}

/// The window of a run among all that were seen lately.
pub fn share(number: u64) -> u64 {
    let mut recent = RECENT_RUNS.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    recent.insert(number, now);
    recent.retain(|_, seen| now.duration_since(*seen) < RECENT);
    WINDOWS_BYTES / recent.len() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    const SIZE: u64 = 1 << 30;
    const MOST: u64 = 8 * MIB;

    /// What is asked for ahead when these READs of so many bytes come.
    fn planned(reads: impl IntoIterator<Item = u64>, length: u64) -> Vec<(u64, Range<u64>)> {
        let mut streams = Streams::default();
        let mut all = Vec::new();
        for offset in reads {
            let plan = streams.note(offset, length, SIZE, |_| MOST);
            all.extend(
                plan.filter(|range| !range.is_empty())
                    .map(|range| (offset, range)),
            );
        }
        all
    }

    #[test]
    fn a_window_follows_a_mib_and_doubles_up_to_the_most() {
        let plans = planned((0..512).map(|at| at * 128 * KIB), 128 * KIB);
        assert_eq!(plans[0], (896 * KIB, MIB..3 * MIB));
        let mut end = MIB;
        for (offset, range) in &plans {
            assert_eq!(range.start, end, "what was asked for once is not again");
            end = range.end;
            assert!(range.end - offset <= MOST + 128 * KIB);
        }
        let (last, range) = plans.last().unwrap();
        assert_eq!(range.end - last, MOST + 128 * KIB);
    }

    #[test]
    fn nothing_is_asked_for_beyond_the_end() {
        let mut streams = Streams::default();
        let size = 3 * MIB + 4096;
        let mut asked = 0;
        for offset in (0..size).step_by(128 << 10) {
            let plan = streams.note(offset, 128 * KIB, size, |_| MOST);
            let range = plan.filter(|range| !range.is_empty());
            asked = range.map_or(asked, |range| range.end.max(asked));
        }
        assert_eq!(asked, size);
    }

    #[test]
    fn who_reads_backward_or_in_strides_has_nothing_asked_for() {
        let length = 128 * KIB;
        assert_eq!(planned((0..800).rev().map(|at| at * length), length), []);
        for stride in 2..40 {
            assert_eq!(planned((0..800).map(|at| at * stride * length), length), []);
        }
    }

    #[test]
    fn readers_of_one_file_have_a_run_each_whatever_lies_between() {
        let mut dice = 1u64;
        let mut reads = Vec::new();
        for at in 0..32 {
            reads.extend((0..4).map(|reader| reader * 100 * MIB + at * 128 * KIB));
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            reads.push(500 * MIB + (dice >> 40) * 16);
        }
        let plans = planned(reads, 128 * KIB);
        for reader in 0..4 {
            let start = reader * 100 * MIB + MIB;
            assert!(
                plans.iter().any(|(_, range)| range.start == start),
                "{reader}"
            );
        }
        assert!(plans.iter().all(|(_, range)| range.end < 500 * MIB));
    }

    proptest! {
        #[test]
        fn reads_that_are_seen_in_another_order_are_one_run(swaps in any::<u64>()) {
            let mut reads: Vec<u64> = (0..64).map(|at| at * 128 * KIB).collect();
            for at in (0..62).step_by(2) {
                if swaps >> at & 1 == 1 {
                    reads.swap(at, at + 1);
                }
            }
            let plans = planned(reads, 128 * KIB);
            prop_assert!(plans.len() > 1);
            for pair in plans.windows(2) {
                prop_assert!(pair[0].1.end <= pair[1].1.start);
            }
        }

        #[test]
        fn what_is_touched_at_random_has_nothing_asked_for(
            reads in proptest::collection::vec(0u64..8192, 0..400)
        ) {
            prop_assert_eq!(planned(reads.iter().map(|at| at * 128 * KIB), 128 * KIB), []);
        }
    }
}
