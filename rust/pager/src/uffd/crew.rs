//! The threads that serve all VMMs of a process, and what they share.
//!
//! One worker at a time, the *lead*, waits for the descriptors of all VMMs. It reads the messages
//! of the one that is ready and answers them itself: a fault costs what it costs a bare loop, and
//! an idle core is not woken for each (a second waiter would be, while the first is on its way
//! back: 2 us). Other workers are parked, and come in where there is something to do in parallel:
//! - several VMMs are ready at once, or one has several faults: the lead calls for help;
//! - a VMM whose answers are slow: the lead resigns before it serves it;
//! - the lead does not come back: it is deposed by the watch.
//!
//! Where nobody is parked for a while, one more worker is made; it leaves when it is not needed.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::host::{Host, Why};
use super::serve::Scratch;
use super::session::Session;

/// What the server may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long a peer may take for its handshake.
    pub handshake_max: Duration,
    /// Peers in their handshake at once; who waits longest goes first.
    pub handshakes: usize,
    /// VMMs at once.
    pub vmms: usize,
    /// Threads that serve, always.
    pub threads_min: usize,
    /// Threads that serve, at most.
    pub threads_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self {
            handshake_max: Duration::from_secs(10),
            handshakes: 64,
            vmms: 1024,
            threads_min: (cores + 1).min(8),
            threads_max: 32,
        }
    }
}

/// How long a worker that is one too many stays.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// How long work waits for a worker before there is one more.
const GROW_AFTER: Duration = Duration::from_millis(5);
/// How often the bounds are looked at.
pub const WATCH: Duration = Duration::from_millis(100);
/// Frames are decoded on the heap; nothing here is deep.
const STACK_BYTES: usize = 256 << 10;
/// VMMs that are ready at once.
const READY_MAX: usize = 8;
/// What wakes the lead at the end. A VMM has twice its name, and one more for its own end.
const BELL: u64 = u64::MAX;

/// A socket and who stands behind it.
pub type Listening = (Arc<UnixListener>, Arc<dyn Host>);
/// The same with its name.
pub type Named = (u64, Listening);

/// Workers and what they work at.
#[derive(Debug)]
pub struct Crew {
    limits: Limits,
    epoll: Epoll,
    sessions: RwLock<HashMap<u64, Arc<Session>>>,
    last_id: AtomicU64,
    /// Wakes the thread at the door, and at the end the lead.
    bell: EventFd,
    listeners: Mutex<HashMap<u64, Listening>>,
    work: Mutex<Work>,
    parked: Condvar,
    /// Which lead it is: another number, another lead. Changed under `work`.
    reign: AtomicU64,
    /// Odd while the lead serves.
    lead_turns: AtomicU64,
    over: AtomicBool,
}

#[derive(Debug, Default)]
struct Work {
    called: VecDeque<Arc<Session>>,
    /// Whether somebody leads.
    led: bool,
    parked: usize,
    workers: usize,
    /// What the watch saw last: turns of the lead, and since when work waits.
    seen_turns: u64,
    waits_since: Option<Instant>,
}

/// What a worker does next.
enum Next {
    Serve(Arc<Session>),
    Lead(u64),
    Leave,
}

impl Crew {
    /// Nobody yet.
    ///
    /// # Errors
    /// Where there are no descriptors.
    pub fn new(limits: Limits) -> io::Result<Arc<Self>> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Arc::new(Self {
            limits,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            sessions: RwLock::default(),
            last_id: AtomicU64::new(0),
            bell,
            listeners: Mutex::default(),
            work: Mutex::default(),
            parked: Condvar::new(),
            reign: AtomicU64::new(0),
            lead_turns: AtomicU64::new(0),
            over: AtomicBool::new(false),
        }))
    }

    /// The first workers.
    ///
    /// # Errors
    /// Where there are no threads.
    pub fn man(self: &Arc<Self>) -> io::Result<()> {
        (0..self.limits.threads_min.max(1)).try_for_each(|_| self.grow())
    }

    /// Ends all VMMs and sends the workers home; those VMMs.
    pub fn end(&self) -> Vec<Arc<Session>> {
        self.over.store(true, Ordering::Release);
        let left = self.all();
        left.iter().for_each(|session| session.kill(Why::Asked));
        // Nobody reads the bell any more, so it wakes whoever leads.
        let _ = self
            .epoll
            .add(&self.bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL));
        self.ring();
        drop(self.lock());
        self.parked.notify_all();
        left
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// What may be taken.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// A name that nobody had.
    pub fn next_id(&self) -> u64 {
        self.last_id.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// One more socket; its name.
    pub fn listen(&self, listener: UnixListener, host: Arc<dyn Host>) -> u64 {
        let id = self.next_id();
        lock(&self.listeners).insert(id, (Arc::new(listener), host));
        self.ring();
        id
    }

    /// One less: nobody is taken in there when this has returned.
    pub fn stop_listening(&self, id: u64) {
        lock(&self.listeners).remove(&id);
        self.ring();
    }

    /// All sockets.
    pub fn listeners(&self) -> Vec<Named> {
        let listeners = lock(&self.listeners);
        let all = listeners.iter().map(|(id, one)| (*id, one.clone()));
        all.collect()
    }

    /// Who waits at a socket; none where it is not listened at any more: whoever listens there now
    /// takes him in.
    pub fn accept(&self, id: u64) -> Option<UnixStream> {
        let listeners = lock(&self.listeners);
        let (listener, _) = listeners.get(&id)?;
        Some(listener.accept().ok()?.0)
    }

    /// What wakes the thread at the door.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Wakes it.
    pub fn ring(&self) {
        // A bell that rings already is as good.
        let _ = self.bell.write(1);
    }

    /// It is awake.
    pub fn hush(&self) {
        if !self.is_over() {
            let _ = self.bell.read();
        }
    }

    /// How many VMMs are served.
    pub fn count(&self) -> usize {
        self.read().len()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Session>> {
        self.read().values().cloned().collect()
    }

    /// One of them.
    pub fn session(&self, id: u64) -> Option<Arc<Session>> {
        self.read().get(&id).cloned()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, HashMap<u64, Arc<Session>>> {
        self.sessions.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<u64, Arc<Session>>> {
        self.sessions
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to serve a VMM. Where that fails it dies with `session`.
    ///
    /// # Errors
    /// Where the kernel has no room for it.
    pub fn enrol(&self, session: Session) -> io::Result<()> {
        let (id, session) = (session.id(), Arc::new(session));
        self.write().insert(id, session.clone());
        // Each message wakes the lead once, which reads until there is none. A descriptor that is
        // ready already is reported when it is added.
        let edges = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        let (memory, end) = (session.vmm().uffd(), session.vmm().process());
        let added = self.epoll.add(memory, EpollEvent::new(edges, id * 2));
        let added = added.and_then(|()| self.epoll.add(end, EpollEvent::new(edges, id * 2 + 1)));
        if added.is_err() || self.is_over() {
            self.strike(&session);
        }
        self.ring();
        Ok(added?)
    }

    /// Ends the service of a VMM that is gone.
    pub fn strike(&self, session: &Arc<Session>) {
        let removed = self.write().remove(&session.id());
        if removed.is_some() {
            let _ = self.epoll.delete(session.vmm().uffd());
            let _ = self.epoll.delete(session.vmm().process());
            session.gone();
        }
    }

    /// Has so many parked workers serve a session.
    fn call(&self, session: &Arc<Session>, helpers: usize) {
        if helpers > 0 {
            let mut work = self.lock();
            // More than there are workers can do nothing.
            let helpers = helpers.min(work.parked.max(1));
            work.called.extend((0..helpers).map(|_| session.clone()));
            work.waits_since.get_or_insert_with(Instant::now);
            let starved = work.parked == 0;
            drop(work);
            (0..helpers).for_each(|_| self.parked.notify_one());
            if starved {
                self.ring();
            }
        }
    }

    /// One more worker.
    fn grow(self: &Arc<Self>) -> io::Result<()> {
        let crew = self.clone();
        self.lock().workers += 1;
        let spawned = spawn("uffd", move || crew.live());
        if spawned.is_err() {
            self.lock().workers -= 1;
        }
        spawned.map(drop)
    }

    /// A worker's life.
    fn live(&self) {
        let mut scratch = Scratch::default();
        loop {
            match self.next() {
                Next::Serve(session) => session.work(&mut scratch),
                Next::Lead(reign) => {
                    let led = catch_unwind(AssertUnwindSafe(|| self.lead(reign, &mut scratch)));
                    if led.is_err() {
                        self.depose(reign);
                    }
                }
                Next::Leave => return,
            }
        }
    }

    fn next(&self) -> Next {
        let mut work = self.lock();
        loop {
            if self.is_over() {
                work.workers -= 1;
                return Next::Leave;
            }
            // Without a lead nobody hears anything.
            if !work.led {
                work.led = true;
                return Next::Lead(self.reign.load(Ordering::Acquire));
            }
            if let Some(session) = work.called.pop_front() {
                work.waits_since = (!work.called.is_empty()).then(Instant::now);
                return Next::Serve(session);
            }
            work.parked += 1;
            let (guard, waited) = self
                .parked
                .wait_timeout(work, IDLE_MAX)
                .unwrap_or_else(PoisonError::into_inner);
            work = guard;
            work.parked -= 1;
            let idle = waited.timed_out() && work.led && work.called.is_empty();
            if idle && work.workers > self.limits.threads_min.max(1) {
                work.workers -= 1;
                return Next::Leave;
            }
        }
    }

    /// Leads until somebody else does.
    fn lead(&self, reign: u64, scratch: &mut Scratch) {
        let mut events = [EpollEvent::empty(); READY_MAX];
        while self.reign.load(Ordering::Acquire) == reign && !self.is_over() {
            let Ok(ready) = self.epoll.wait(&mut events, EpollTimeout::NONE) else {
                continue;
            };
            self.lead_turns.fetch_add(1, Ordering::AcqRel);
            for (number, event) in events[..ready].iter().enumerate() {
                let last = number + 1 == ready;
                self.handle(event.data(), reign, last, scratch);
            }
            // Deposed meanwhile: the turns are another's.
            if self.reign.load(Ordering::Acquire) == reign {
                self.lead_turns.fetch_add(1, Ordering::AcqRel);
            }
        }
        if self.is_over() {
            self.depose(reign);
        }
    }

    fn handle(&self, token: u64, reign: u64, last: bool, scratch: &mut Scratch) {
        let Some(session) = self.session(token / 2) else {
            return;
        };
        if token % 2 == 1 {
            self.strike(&session);
            return;
        }
        let Ok(faults) = catch_unwind(AssertUnwindSafe(|| session.ready())) else {
            session.kill(Why::Panicked);
            return;
        };
        // The last is the lead's own, and the others' where nobody is free.
        let own = last || (!session.is_slow() && self.lock().parked == 0);
        self.call(&session, faults.saturating_sub(usize::from(own)));
        if own && faults > 0 {
            if session.is_slow() {
                self.depose(reign);
            }
            session.work(scratch);
        }
    }

    /// Somebody else is to lead.
    fn depose(&self, reign: u64) {
        let mut work = self.lock();
        if self.reign.load(Ordering::Acquire) == reign {
            self.reign.store(reign + 1, Ordering::Release);
            work.led = false;
            self.lead_turns.store(0, Ordering::Release);
            work.waits_since.get_or_insert_with(Instant::now);
            let starved = work.parked == 0;
            drop(work);
            self.parked.notify_one();
            if starved {
                self.ring();
            }
        }
    }

    /// Looks after all sessions and workers; when to do so again.
    pub fn watch(self: &Arc<Self>) -> Instant {
        let now = Instant::now();
        let mut next = now + WATCH;
        for session in self.all() {
            let (work, again) = session.tend(now);
            self.call(&session, usize::from(work));
            next = next.min(again.unwrap_or(next));
        }
        let (stuck, grow, waits) = self.look_at_workers(now);
        if stuck {
            self.depose(self.reign.load(Ordering::Acquire));
        }
        if grow {
            // Without one more they do what they can.
            let _ = self.grow();
        }
        if waits {
            self.parked.notify_one();
            next = next.min(now + GROW_AFTER);
        }
        next
    }

    /// Whether the lead does not come back, whether one more worker is wanted, and whether work
    /// waits.
    fn look_at_workers(&self, now: Instant) -> (bool, bool, bool) {
        let mut work = self.lock();
        let turns = self.lead_turns.load(Ordering::Acquire);
        let stuck = turns % 2 == 1 && turns == work.seen_turns;
        work.seen_turns = turns;
        let waits = !work.called.is_empty() || !work.led;
        if !waits {
            work.waits_since = None;
            return (stuck, false, false);
        }
        let since = *work.waits_since.get_or_insert(now);
        let grow = work.parked == 0
            && work.workers < self.limits.threads_max
            && now.saturating_duration_since(since) >= GROW_AFTER;
        if grow {
            work.waits_since = Some(now);
        }
        (stuck, grow, waits)
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        lock(&self.work)
    }
}

/// A thread of ours.
///
/// # Errors
/// Where there are too many.
pub fn spawn(name: &str, life: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let builder = thread::Builder::new().name(name.into());
    builder.stack_size(STACK_BYTES).spawn(life)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
