//! One fetch for whoever wants the same thing at the same time.
//!
//! Who asks first gets a [`Landing`]: the duty to say how it ended. The others wait for it. What
//! was fetched is kept *before* the flight ends, so that nobody finds neither; a failed flight
//! fails for all that wait, and the next to ask begins another. A landing that is dropped, by a
//! panic too, ends its flight: nobody waits for what will never come.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::sync::{Arc, Condvar, Mutex};

/// What is under way, by what it is for; a clone is the same table.
#[derive(Clone)]
pub struct Flights<K, V, E>(Table<K, V, E>);

type Table<K, V, E> = Arc<Mutex<HashMap<K, Arc<Flight<V, E>>>>>;

struct Flight<V, E> {
    ended: Mutex<Option<Result<V, Missed<E>>>>,
    told: Condvar,
}

/// Why waiting for a flight brought nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Missed<E> {
    /// It failed.
    Failed(E),
    /// It was given up without a word.
    Lost,
    /// It did not end in time.
    Late,
}

/// What asking brought.
pub enum Claim<K: Eq + Hash + Clone, V: Clone, E: Clone> {
    /// It was there.
    Kept(V),
    /// It is the caller's to fetch.
    Mine(Landing<K, V, E>),
    /// Another is fetching it.
    Theirs(Waiter<V, E>),
}

/// The duty to say how a flight ended.
pub struct Landing<K: Eq + Hash + Clone, V: Clone, E: Clone> {
    under_way: Table<K, V, E>,
    key: K,
    flight: Arc<Flight<V, E>>,
    landed: bool,
}

/// A place to wait for the end of a flight.
pub struct Waiter<V, E>(Arc<Flight<V, E>>);

impl<K, V, E> Default for Flights<K, V, E> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(HashMap::new())))
    }
}

impl<K, V, E> fmt::Debug for Flights<K, V, E> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("Flights")
    }
}

impl<K: Eq + Hash + Clone, V: Clone, E: Clone> Flights<K, V, E> {
    /// Asks for `key`; `kept` says whether it is there already, and must not wait for anything.
    pub fn claim(&self, key: K, kept: impl FnOnce() -> Option<V>) -> Claim<K, V, E> {
        let under_way = self.0.lock();
        let mut under_way = under_way.unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = under_way.get(&key) {
            return Claim::Theirs(Waiter(flight.clone()));
        }
        // Under the lock: a flight keeps what it brought before it leaves the table.
        if let Some(there) = kept() {
            return Claim::Kept(there);
        }
        let flight = Arc::new(Flight {
            ended: Mutex::new(None),
            told: Condvar::new(),
        });
        under_way.insert(key.clone(), flight.clone());
        drop(under_way);
        Claim::Mine(Landing {
            under_way: self.0.clone(),
            key,
            flight,
            landed: false,
        })
    }
}

impl<K: Eq + Hash + Clone, V: Clone, E: Clone> Landing<K, V, E> {
    /// What it is for.
    pub fn key(&self) -> &K {
        &self.key
    }

    /// A place to wait for this flight, where another thread lands it.
    pub fn waiter(&self) -> Waiter<V, E> {
        Waiter(self.flight.clone())
    }

    /// Ends the flight; the caller has kept what it brought.
    pub fn land(mut self, end: Result<V, E>) {
        self.end(end.map_err(Missed::Failed));
    }

    fn end(&mut self, end: Result<V, Missed<E>>) {
        if self.landed {
            return;
        }
        self.landed = true;
        // First off the table: who has heard of a failure and asks again finds no flight.
        let under_way = self.under_way.lock();
        let mut under_way = under_way.unwrap_or_else(PoisonError::into_inner);
        under_way.remove(&self.key);
        drop(under_way);
        let ended = self.flight.ended.lock();
        *ended.unwrap_or_else(PoisonError::into_inner) = Some(end);
        self.flight.told.notify_all();
    }
}

impl<K: Eq + Hash + Clone, V: Clone, E: Clone> Drop for Landing<K, V, E> {
    fn drop(&mut self) {
        self.end(Err(Missed::Lost));
    }
}

impl<V: Clone, E: Clone> Waiter<V, E> {
    /// How the flight ended, waiting at most `bound` for it.
    ///
    /// # Errors
    /// It failed, was lost, or is late.
    pub fn wait(&self, bound: Duration) -> Result<V, Missed<E>> {
        let until = Instant::now() + bound;
        let mut ended = self.0.ended.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(end) = &*ended {
                return end.clone();
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Missed::Late);
            }
            let woken = self.0.told.wait_timeout(ended, left);
            ended = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
