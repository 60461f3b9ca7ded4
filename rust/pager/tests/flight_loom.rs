//! Every order in which threads can ask for one thing, bring it, fail, and give up.
#![allow(clippy::unwrap_used, missing_docs)]

/// What the module takes from its crate: loom's here, so that loom decides who goes on.
mod sync {
    pub(crate) use loom::sync::{Arc, Condvar, Mutex};
}
#[path = "../src/flight.rs"]
#[allow(dead_code)]
mod flight;

use std::time::Duration;

use flight::{Claim, Flights, Missed};
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

const BOUND: Duration = Duration::from_secs(600);

/// A source behind flights: what it brought is kept before the flight ends.
struct Source {
    flights: Flights<u8, usize, &'static str>,
    kept: Mutex<Option<usize>>,
    fetches: AtomicUsize,
}

impl Source {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            flights: Flights::default(),
            kept: Mutex::new(None),
            fetches: AtomicUsize::new(0),
        })
    }

    fn get(
        &self,
        fetch: impl FnOnce(usize) -> Option<Result<usize, &'static str>>,
    ) -> Result<usize, Missed<&'static str>> {
        match self.flights.claim(1, || *self.kept.lock().unwrap()) {
            Claim::Kept(value) => Ok(value),
            Claim::Theirs(waiter) => waiter.wait(BOUND),
            Claim::Mine(landing) => {
                let waiter = landing.waiter();
                let number = self.fetches.fetch_add(1, Ordering::SeqCst);
                match fetch(number) {
                    Some(Ok(value)) => {
                        *self.kept.lock().unwrap() = Some(value);
                        landing.land(Ok(value));
                    }
                    Some(failed) => landing.land(failed),
                    None => drop(landing),
                }
                waiter.wait(BOUND)
            }
        }
    }
}

/// All orders in which threads are interrupted at most twice each: three threads have too many.
fn model(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(test);
}

#[test]
fn whoever_asks_at_once_has_it_from_one_fetch() {
    model(|| {
        let source = Source::new();
        let asking: Vec<_> = (0..2)
            .map(|_| {
                let source = source.clone();
                thread::spawn(move || source.get(|number| Some(Ok(number + 70))))
            })
            .collect();
        assert_eq!(source.get(|number| Some(Ok(number + 70))), Ok(70));
        for asked in asking {
            assert_eq!(asked.join().unwrap(), Ok(70));
        }
        assert_eq!(source.fetches.load(Ordering::SeqCst), 1);
    });
}

#[test]
fn a_failure_is_told_to_those_who_wait_and_the_next_tries_again() {
    model(|| {
        let source = Source::new();
        let fetch = |number| match number {
            0 => Some(Err("away")),
            number => Some(Ok(number)),
        };
        let asking = {
            let source = source.clone();
            thread::spawn(move || source.get(fetch))
        };
        let mine = source.get(fetch);
        let theirs = asking.join().unwrap();
        let failed = Err(Missed::Failed("away"));
        // Both waited for the first fetch, or one came after it had failed.
        assert!(mine == failed || theirs == failed);
        assert!([mine, theirs]
            .iter()
            .all(|got| *got == failed || *got == Ok(1)));
        assert_eq!(source.get(fetch), Ok(1));
    });
}

#[test]
fn who_has_heard_of_a_failure_begins_a_new_fetch() {
    model(|| {
        let source = Source::new();
        let fetch = |number| match number {
            0 => Some(Err("away")),
            number => Some(Ok(number)),
        };
        let asking = {
            let source = source.clone();
            thread::spawn(move || {
                let first = source.get(fetch);
                first.or_else(|_| source.get(fetch))
            })
        };
        let mine = source.get(fetch).or_else(|_| source.get(fetch));
        assert_eq!((mine, asking.join().unwrap()), (Ok(1), Ok(1)));
    });
}

#[test]
fn a_fetch_that_is_given_up_leaves_nobody_waiting() {
    model(|| {
        let source = Source::new();
        let asking: Vec<_> = (0..2)
            .map(|_| {
                let source = source.clone();
                thread::spawn(move || source.get(|_| None))
            })
            .collect();
        for asked in asking {
            assert_eq!(asked.join().unwrap(), Err(Missed::Lost));
        }
        assert_eq!(source.get(|_| Some(Ok(9))), Ok(9));
    });
}
