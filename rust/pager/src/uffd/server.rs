//! The threads that serve all VMMs of a process.
//!
//! Workers wait in one epoll for the descriptors of all VMMs; whoever is woken reads the messages
//! and answers them itself, so a fault costs what it costs a bare loop. Descriptors are
//! edge-triggered: one message wakes one worker, and the worker reads until there is nothing.
//! Faults that one worker need not do alone are called out ([`Shared::call`]). While all workers
//! are busy for long, more are made; they leave when they have nothing to do.
//!
//! One more thread lets peers in, wakes what is stalled and watches the bounds ([`super::host`]).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::handshake::{Offer, Pending, Refusal};
use super::host::{Guest, Host, Kept, Why};
use super::ioctl::Uffd;
use super::ledger::Ledger;
use super::regions::Regions;
use super::session::{Scratch, Session, State};
use super::vmm::{Process, Vmm};

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

/// How long a thread that is one too many stays.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// How long all workers are busy before there is one more.
const GROW_AFTER: Duration = Duration::from_millis(5);
/// How often bounds are looked at.
const WATCH: Duration = Duration::from_millis(250);
/// Frames are decoded on the heap; nothing here is deep.
const STACK_BYTES: usize = 256 << 10;

/// Tokens: twice the name of a VMM for its memory, one more for its end.
const CALLED: u64 = u64::MAX;

/// Serves VMMs until it is dropped, which kills those that are left.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    limits: Limits,
    epoll: Epoll,
    sessions: RwLock<HashMap<u64, Arc<Session>>>,
    next_id: AtomicU64,
    /// Counts what is in `called`.
    calls: EventFd,
    called: Mutex<VecDeque<Arc<Session>>>,
    /// Wakes the thread that lets peers in.
    bell: EventFd,
    listeners: Mutex<Vec<Listening>>,
    idle: AtomicUsize,
    threads: AtomicUsize,
    starved: AtomicBool,
    over: AtomicBool,
}

#[derive(Debug)]
struct Listening {
    id: u64,
    listener: Arc<UnixListener>,
    host: Arc<dyn Host>,
}

impl Server {
    /// Starts its threads.
    ///
    /// # Errors
    /// Where there are no descriptors or no threads to be had.
    pub fn start(limits: Limits) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let calls = EventFd::from_flags(flags | EfdFlags::EFD_SEMAPHORE)?;
        epoll.add(&calls, EpollEvent::new(EpollFlags::EPOLLIN, CALLED))?;
        let shared = Arc::new(Shared {
            limits,
            epoll,
            sessions: RwLock::default(),
            next_id: AtomicU64::new(1),
            calls,
            called: Mutex::default(),
            bell: EventFd::from_flags(flags)?,
            listeners: Mutex::default(),
            idle: AtomicUsize::new(0),
            threads: AtomicUsize::new(0),
            starved: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        let mut server = Self {
            shared: shared.clone(),
            keeper: None,
        };
        for _ in 0..limits.threads_min.max(1) {
            shared.grow()?;
        }
        server.keeper = Some(spawn("uffd-door", move || tend(&shared))?);
        Ok(server)
    }

    /// Lets VMMs in that connect to a socket; a name for the listener.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn listen(&self, listener: UnixListener, host: Arc<dyn Host>) -> io::Result<u64> {
        listener.set_nonblocking(true)?;
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let listener = Arc::new(listener);
        lock(&self.shared.listeners).push(Listening { id, listener, host });
        self.shared.ring();
        Ok(id)
    }

    /// Closes a listener. VMMs that were let in are served on.
    pub fn stop_listening(&self, id: u64) {
        lock(&self.shared.listeners).retain(|listening| listening.id != id);
        self.shared.ring();
    }

    /// Serves a VMM that a predecessor served, which must be dead with all of its threads: what it
    /// still copied could be what the VMM gives back now.
    ///
    /// # Errors
    /// Where that can't be: the VMM is dead then.
    pub fn take_up(&self, kept: Kept, guest: Guest) -> io::Result<u64> {
        let wrong = |cause: String| io::Error::new(io::ErrorKind::InvalidData, cause);
        let process = Process::from(kept.vmm);
        let uffd = match Uffd::recognize(kept.uffd) {
            Ok(uffd) => uffd,
            Err(_) => {
                process.kill();
                return Err(wrong("the descriptor is no userfaultfd".into()));
            }
        };
        let vmm = Vmm::new(uffd, process);
        let regions = Regions::new(kept.regions, guest.pages.size_bytes());
        let regions = regions.map_err(|bad| wrong(bad.to_string()))?;
        let ledger = Ledger::open(kept.ledger, regions.pages())?;
        vmm.uffd().set_nonblocking()?;
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let session = Session::new(id, 0, vmm, regions, ledger, None);
        session.equip(guest);
        let taken = session.take_up();
        taken.map_err(|why| wrong(why.to_string()))?;
        self.shared.enrol(session)?;
        Ok(id)
    }

    /// The names of the VMMs that are served.
    pub fn vmms(&self) -> Vec<u64> {
        self.shared.sessions().keys().copied().collect()
    }

    /// What a VMM waits for; None where it is gone.
    pub fn state(&self, id: u64) -> Option<State> {
        Some(self.shared.session(id)?.state())
    }

    /// Ends a VMM.
    pub fn kill(&self, id: u64) {
        if let Some(session) = self.shared.session(id) {
            session.kill(Why::Asked);
        }
    }

    /// Fills pages of a VMM ahead of it, in the calling thread: bytes `offset..end` of the device,
    /// until somebody waits for something. Returns how far it came and how many pages were filled.
    ///
    /// # Errors
    /// Where bytes can't be had.
    pub fn prefill(
        &self,
        id: u64,
        offset: u64,
        end: u64,
        scratch: &mut Scratch,
    ) -> Result<(u64, u64), crate::build::Unreadable> {
        match self.shared.session(id) {
            Some(session) => session.prefill(offset, end, scratch),
            None => Ok((end, 0)),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.over.store(true, Ordering::Release);
        let left: Vec<_> = shared.sessions().values().cloned().collect();
        for session in &left {
            session.kill(Why::Asked);
        }
        // Nobody takes calls any more, so this wakes all of them.
        let _ = shared.calls.write(1);
        shared.ring();
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
        for session in left {
            session.vmm().process().ended(Duration::from_secs(10));
            shared.strike(&session);
        }
    }
}

impl Shared {
    fn sessions(&self) -> std::sync::RwLockReadGuard<'_, HashMap<u64, Arc<Session>>> {
        self.sessions.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn session(&self, id: u64) -> Option<Arc<Session>> {
        self.sessions().get(&id).cloned()
    }

    fn ring(&self) {
        // A bell that rings already is as good.
        let _ = self.bell.write(1);
    }

    /// Begins to serve a VMM. Where that fails it dies with `session`.
    fn enrol(&self, session: Session) -> io::Result<()> {
        let session = Arc::new(session);
        let id = session.id();
        self.sessions
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, session.clone());
        let (memory, end) = (session.vmm().uffd(), session.vmm().process());
        let edges = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        // A descriptor that is ready already is reported once it is added.
        let added = self
            .epoll
            .add(memory, EpollEvent::new(edges, id * 2))
            .and_then(|()| self.epoll.add(end, EpollEvent::new(edges, id * 2 + 1)));
        if let Err(error) = added {
            self.strike(&session);
            return Err(error.into());
        }
        self.ring();
        Ok(())
    }

    /// Ends the service of a VMM that is gone.
    fn strike(&self, session: &Arc<Session>) {
        let removed = self
            .sessions
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&session.id());
        if removed.is_some() {
            let _ = self.epoll.delete(session.vmm().uffd());
            let _ = self.epoll.delete(session.vmm().process());
            session.gone();
        }
    }

    /// Has other workers help a session.
    fn call(&self, session: &Arc<Session>, helpers: usize) {
        let helpers = helpers.min(self.idle.load(Ordering::Relaxed).max(1));
        if helpers > 0 {
            lock(&self.called).extend((0..helpers).map(|_| session.clone()));
            let _ = self.calls.write(helpers as u64);
        }
    }

    /// One more worker.
    fn grow(self: &Arc<Self>) -> io::Result<()> {
        let shared = self.clone();
        self.threads.fetch_add(1, Ordering::Relaxed);
        let spawned = spawn("uffd", move || shared.work());
        if spawned.is_err() {
            self.threads.fetch_sub(1, Ordering::Relaxed);
        }
        spawned.map(drop)
    }

    /// A worker's life.
    fn work(&self) {
        let mut scratch = Scratch::default();
        let timeout = EpollTimeout::try_from(IDLE_MAX).unwrap_or(EpollTimeout::NONE);
        while !self.over.load(Ordering::Acquire) {
            let mut events = [EpollEvent::empty()];
            self.idle.fetch_add(1, Ordering::Relaxed);
            let woken = self.epoll.wait(&mut events, timeout);
            let last = self.idle.fetch_sub(1, Ordering::Relaxed) == 1;
            match woken {
                Ok(0) if self.leaves() => return,
                Ok(1) => {
                    let threads = self.threads.load(Ordering::Relaxed);
                    if last
                        && threads < self.limits.threads_max
                        && !self.starved.swap(true, Ordering::Relaxed)
                    {
                        self.ring();
                    }
                    self.handle(events[0].data(), &mut scratch);
                }
                _ => {}
            }
        }
        self.threads.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether a worker that had nothing to do is one too many.
    fn leaves(&self) -> bool {
        let min = self.limits.threads_min.max(1);
        let fewer = |threads: usize| (threads > min).then(|| threads - 1);
        let order = Ordering::Relaxed;
        self.threads.fetch_update(order, order, fewer).is_ok()
    }

    fn handle(&self, token: u64, scratch: &mut Scratch) {
        if token == CALLED {
            if self.over.load(Ordering::Acquire) || self.calls.read().is_err() {
                return;
            }
            let session = lock(&self.called).pop_front();
            if let Some(session) = session {
                session.work(scratch);
            }
            return;
        }
        let Some(session) = self.session(token / 2) else {
            return;
        };
        if token % 2 == 1 {
            self.strike(&session);
            return;
        }
        let helpers = catch_unwind(AssertUnwindSafe(|| session.ready()));
        match helpers {
            Ok(0) => {}
            Ok(helpers) => self.call(&session, helpers),
            Err(_) => session.kill(Why::Panicked),
        }
        session.work(scratch);
    }

    /// A peer whose handshake is complete: kept, then served.
    fn admit(&self, offer: Offer, host: &dyn Host) -> Result<(), Refusal> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let pid = offer.pid;
        // From here on the VMM dies where anything fails: its memory has nobody else.
        let result = (|| {
            if self.sessions().len() >= self.limits.vmms {
                return Err(Refusal::Full);
            }
            let ledger = Ledger::create(offer.regions.pages())?;
            let Offer { vmm, regions, .. } = offer;
            let session = Session::new(id, pid, vmm, regions, ledger, Some(offer.stream));
            let guest = host.admitted(id, &session.keep());
            session.equip(guest.map_err(Refusal::Unwanted)?);
            Ok(self.enrol(session)?)
        })();
        result.inspect_err(|why| host.refused(pid, why))
    }
}

/// The life of the thread that lets peers in and watches bounds.
fn tend(shared: &Arc<Shared>) {
    let mut pending: Vec<Pending> = Vec::new();
    let mut next = Instant::now() + WATCH;
    while !shared.over.load(Ordering::Acquire) {
        let listeners: Vec<_> = lock(&shared.listeners)
            .iter()
            .map(|listening| (listening.listener.clone(), listening.host.clone()))
            .collect();
        let until = pending.iter().map(Pending::until).fold(next, Instant::min);
        wait(shared, &listeners, &pending, until);
        let _ = shared.bell.read();
        // A fault in here costs the peers that are in their handshake, nobody else.
        let stepped = catch_unwind(AssertUnwindSafe(|| {
            let mut peers = std::mem::take(&mut pending);
            for (listener, host) in &listeners {
                greet(shared, listener, host, &mut peers);
            }
            advance(shared, peers)
        }));
        pending = stepped.unwrap_or_default();
        next = watch(shared);
    }
}

/// Until something happens, or until then.
fn wait(
    shared: &Shared,
    listeners: &[(Arc<UnixListener>, Arc<dyn Host>)],
    pending: &[Pending],
    until: Instant,
) {
    let mut fds = vec![PollFd::new(shared.bell.as_fd(), PollFlags::POLLIN)];
    let listeners = listeners.iter().map(|(listener, _)| listener.as_fd());
    let all = listeners.chain(pending.iter().map(|pending| pending.stream().as_fd()));
    fds.extend(all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
    let left = until.saturating_duration_since(Instant::now());
    // Rounded up, or the last millisecond would be spent in circles.
    let timeout = PollTimeout::try_from(left + Duration::from_millis(1));
    if let Err(error) = poll(&mut fds, timeout.unwrap_or(PollTimeout::ZERO)) {
        debug_assert_eq!(error, Errno::EINTR);
    }
}

/// Takes in who has connected.
fn greet(shared: &Shared, listener: &UnixListener, host: &Arc<dyn Host>, peers: &mut Vec<Pending>) {
    // Not more than there is room for, so that others have their turn.
    for _ in 0..shared.limits.handshakes.max(1) {
        let Ok((stream, _)) = listener.accept() else {
            return;
        };
        if peers.len() >= shared.limits.handshakes.max(1) {
            // A VMM says all it has to say at once: who waits longest is none.
            peers.remove(0).refuse(Refusal::Crowded);
        }
        match Pending::new(stream, host.clone(), shared.limits.handshake_max) {
            Ok(peer) => peers.push(peer),
            Err(why) => host.refused(0, &why),
        }
    }
}

/// Goes on with each handshake; those that are not over.
fn advance(shared: &Shared, peers: Vec<Pending>) -> Vec<Pending> {
    let mut left = Vec::new();
    for mut peer in peers {
        match peer.advance() {
            Ok(Some(list)) => {
                if let Ok((offer, host)) = peer.accept(list) {
                    // The host was told.
                    let _ = shared.admit(offer, &*host);
                }
            }
            Ok(None) if peer.until() <= Instant::now() => {
                let why = peer.late();
                peer.refuse(why);
            }
            Ok(None) => left.push(peer),
            Err(why) => {
                peer.refuse(why);
            }
        }
    }
    left
}

/// Looks after all sessions; when to do so again.
fn watch(shared: &Arc<Shared>) -> Instant {
    let now = Instant::now();
    let mut next = now + WATCH;
    let sessions: Vec<_> = shared.sessions().values().cloned().collect();
    for session in sessions {
        let (work, again) = session.tend(now);
        if work {
            shared.call(&session, 1);
        }
        next = next.min(again.unwrap_or(next));
    }
    if shared.starved.load(Ordering::Relaxed) {
        let threads = shared.threads.load(Ordering::Relaxed);
        let idle = shared.idle.load(Ordering::Relaxed);
        // All were busy a while ago, and are now.
        if idle == 0 && threads < shared.limits.threads_max {
            let _ = shared.grow();
            next = next.min(now + GROW_AFTER);
        } else {
            shared.starved.store(false, Ordering::Relaxed);
        }
    }
    next
}

fn spawn(name: &str, life: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let builder = thread::Builder::new().name(name.into());
    builder.stack_size(STACK_BYTES).spawn(life)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
