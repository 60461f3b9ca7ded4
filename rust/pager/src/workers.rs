//! Threads for a medium with latency: started when there is work, gone when there is none.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How long a thread waits for more.
const IDLE: Duration = Duration::from_secs(10);
/// Fetching and decoding needs little; 8 MiB would only be address space, but say so.
const STACK_BYTES: usize = 512 << 10;

pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// At most so many threads, and a queue for them.
pub(crate) struct Workers {
    queue: Arc<(Mutex<Queue>, Condvar)>,
    most: usize,
    name: &'static str,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Jobs that were taken on and have not ended.
    under_way: usize,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl fmt::Debug for Workers {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "Workers of {}", self.most)
    }
}

impl Workers {
    pub(crate) fn new(most: usize) -> Self {
        Self::named("fetch", most)
    }

    /// The same, under a name of their own.
    pub(crate) fn named(name: &'static str, most: usize) -> Self {
        Self {
            queue: Arc::default(),
            most: most.max(1),
            name,
        }
    }

    /// Has a job done by one of the threads; by the caller where no thread can be had.
    pub(crate) fn run(&self, job: Job) {
        self.take_on(self.lock(), job);
    }

    /// The same where a thread has nothing else to do or can be started: no job waits for another.
    /// Else it is given back.
    pub(crate) fn run_at_once(&self, job: Job) -> Result<(), Job> {
        let queue = self.lock();
        if queue.under_way >= self.most {
            return Err(job);
        }
        self.take_on(queue, job);
        Ok(())
    }

    fn take_on(&self, mut queue: MutexGuard<'_, Queue>, job: Job) {
        queue.jobs.push_back(job);
        queue.under_way += 1;
        if queue.idle >= queue.jobs.len() || queue.threads >= self.most {
            drop(queue);
            self.queue.1.notify_one();
            return;
        }
        queue.threads += 1;
        drop(queue);
        let shared = self.queue.clone();
        let named = thread::Builder::new().name(self.name.into());
        let started = named.stack_size(STACK_BYTES).spawn(move || work(&shared));
        if started.is_err() {
            let mut queue = self.lock();
            queue.threads -= 1;
            let left = match queue.threads {
                0 => std::mem::take(&mut queue.jobs),
                _ => VecDeque::new(),
            };
            queue.under_way -= left.len();
            drop(queue);
            left.into_iter().for_each(|job| job());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Workers {
    /// What waits in the queue is given up: whoever waits for it hears so.
    fn drop(&mut self) {
        let mut queue = self.lock();
        queue.closed = true;
        let left = std::mem::take(&mut queue.jobs);
        drop(queue);
        self.queue.1.notify_all();
        drop(left);
    }
}

fn work(shared: &(Mutex<Queue>, Condvar)) {
    let mut queue = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(job) = queue.jobs.pop_front() {
            drop(queue);
            // A job that panics has dropped what it was to land; the next job is another's.
            let _ = catch_unwind(AssertUnwindSafe(job));
            queue = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
            queue.under_way -= 1;
            continue;
        }
        if queue.closed {
            break;
        }
        queue.idle += 1;
        let woken = shared.1.wait_timeout(queue, IDLE);
        let (woken, late) = woken.unwrap_or_else(PoisonError::into_inner);
        queue = woken;
        queue.idle -= 1;
        if late.timed_out() && queue.jobs.is_empty() {
            break;
        }
    }
    queue.threads -= 1;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn jobs_run_at_once_up_to_the_bound_and_all_in_the_end() {
        let workers = Workers::new(3);
        let (started, starts) = channel();
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        for job in 0..7 {
            let (started, gate) = (started.clone(), gate.clone());
            workers.run(Box::new(move || {
                started.send(job).unwrap();
                let open = gate.0.lock().unwrap();
                drop(gate.1.wait_while(open, |open| !*open).unwrap());
            }));
        }
        let mut ran: Vec<i32> = (0..3).map(|_| starts.recv().unwrap()).collect();
        assert!(starts.recv_timeout(Duration::from_millis(50)).is_err());
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
        ran.extend((0..4).map(|_| starts.recv().unwrap()));
        ran.sort_unstable();
        assert_eq!(ran, [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn what_would_have_to_wait_is_given_back() {
        let workers = Workers::new(2);
        let (held, holds) = channel::<()>();
        let holds = Arc::new(Mutex::new(holds));
        for _ in 0..2 {
            let holds = holds.clone();
            let job = move || assert!(holds.lock().unwrap().recv().is_err());
            assert!(workers.run_at_once(Box::new(job)).is_ok());
        }
        let (done, dones) = channel();
        let job = move || done.send(()).unwrap();
        let job = workers.run_at_once(Box::new(job)).err().unwrap();
        drop(held);
        while workers.lock().under_way > 0 {
            thread::yield_now();
        }
        assert!(workers.run_at_once(job).is_ok());
        dones.recv().unwrap();
    }

    #[test]
    fn a_job_that_panics_costs_no_other() {
        let workers = Workers::new(1);
        let (done, dones) = channel();
        for job in 0..4 {
            let done = done.clone();
            workers.run(Box::new(move || {
                done.send(job).unwrap();
                assert!(job % 2 == 1, "on purpose");
            }));
        }
        let ran: Vec<i32> = (0..4).map(|_| dones.recv().unwrap()).collect();
        assert_eq!(ran, [0, 1, 2, 3]);
    }

    #[test]
    fn jobs_in_the_queue_of_workers_that_end_are_dropped() {
        let workers = Workers::new(1);
        let (held, holds) = channel::<()>();
        let (done, dones) = channel();
        let (started, starts) = channel();
        workers.run(Box::new(move || {
            started.send(()).unwrap();
            holds.recv().unwrap();
        }));
        starts.recv().unwrap();
        workers.run(Box::new(move || done.send(()).unwrap()));
        drop(workers);
        assert!(dones.recv().is_err());
        held.send(()).unwrap();
    }
}
