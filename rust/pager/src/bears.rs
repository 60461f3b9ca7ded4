//! How many requests at once a medium bears.
//!
//! Many requests over a line that is slow share it, and a guest that waits for the last of them
//! waits for all: in the end as long as for a peer that says nothing. So there are few at first,
//! more when they are answered soon, and half as many when they are not.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const FIRST: usize = 6;
const LEAST: usize = 2;
/// An answer that took no longer lets so many more requests be made.
const SOON: Duration = Duration::from_millis(500);
const MORE: usize = 2;
/// One that took longer halves them: far below the bound at which a VMM is killed.
const LATE: Duration = Duration::from_secs(1);

/// How many requests at once one medium was seen to answer in good time.
#[derive(Debug)]
pub(crate) struct Bears {
    now: AtomicUsize,
    most: usize,
}

impl Bears {
    /// Nothing was seen yet; never more than `most`.
    pub(crate) fn new(most: usize) -> Self {
        let now = AtomicUsize::new(FIRST.min(most));
        Self { now, most }
    }

    /// As many as it bears now.
    pub(crate) fn now(&self) -> usize {
        self.now.load(Ordering::Relaxed)
    }

    /// A request of full size was answered to its end in so much time.
    pub(crate) fn answered(&self, took: Duration) {
        let change = |now: usize| match took {
            soon if soon <= SOON => Some((now + MORE).min(self.most)),
            late if late > LATE => Some((now / 2).max(LEAST.min(self.most))),
            _ => None,
        };
        // None leaves it as it is.
        let _ = self
            .now
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_while_answers_come_soon_and_halves_when_they_are_late() {
        let bears = Bears::new(9);
        assert_eq!(bears.now(), 6);
        let mut after = |took| {
            bears.answered(took);
            bears.now()
        };
        let steps = [SOON, SOON, SOON, LATE, LATE * 2, LATE * 2, LATE * 2, SOON];
        assert_eq!(steps.map(&mut after), [8, 9, 9, 9, 4, 2, 2, 4]);
        assert_eq!(Bears::new(1).now(), 1);
    }
}
