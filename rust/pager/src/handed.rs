//! VMMs that hand in their memory as Firecracker does, served from files of the pager.
//!
//! A VMM is announced with the socket that it will connect to, so its process is known before it
//! says anything. What a successor needs is kept before the first fault is answered: `door/SANDBOX`
//! is the socket until the VMM has come, `uffd/SANDBOX` its memory from then on. Where a pager dies
//! between the two, what the VMM had said is lost and it is killed. `ahead/SANDBOX` is what
//! it is to be given before it asks ([`replays`]).

mod replays;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt};
use serde::{Deserialize, Serialize};

use crate::build::Unreadable;
use crate::clients::{Cause, Client};
use crate::device::{Origin, Part};
use crate::held::AGAIN;
use crate::keep::Keep;
use crate::kept::Entry;
use crate::nodes::Node;
use crate::process::Process;
use crate::replay::Came;
use crate::server::Server;
use crate::uffd::{
    self, leash, Guest, Host, Limits, Options, Pages, Refusal, Region, Why, Witness,
};

/// How long a VMM that was killed may take to end.
const END_MAX: Duration = Duration::from_secs(10);

/// What is kept of a socket that a VMM will connect to.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DoorText {
    file: String,
    /// Whether somebody came: what he said may be lost.
    knocked: bool,
}

/// What is kept of a VMM's memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoryText {
    file: String,
    regions: Vec<Region>,
}

/// One VMM.
#[derive(Debug)]
struct Seat {
    watch: Arc<Watch>,
    /// Who stands behind its sockets: one, so that it is known when nobody knocks any more.
    door: Arc<Door>,
    /// Its socket, until it has come.
    listener: Option<u64>,
    /// Its memory, from then on.
    vmm: Option<Vmm>,
}

impl Seat {
    fn session(&self) -> Option<u64> {
        self.vmm.as_ref().map(|vmm| vmm.session)
    }
}

/// A VMM that has come.
#[derive(Debug, Clone)]
struct Vmm {
    /// Its name at the server of page faults, which knows it a moment later than we do and forgets
    /// it a moment earlier.
    session: u64,
    /// Itself: it says whether it lives.
    process: Arc<Process>,
}

/// What is done by a thread of its own: whoever serves must not wait for the keeper.
#[derive(Debug)]
enum Chore {
    /// The VMM has come.
    Came,
    /// It has ended.
    Ended,
}

/// All VMMs that hand in their memory.
pub struct Handed {
    server: Arc<Server>,
    keep: Arc<Keep>,
    seats: Mutex<HashMap<String, Seat>>,
    uffd: Mutex<Option<Arc<uffd::Server>>>,
    chores: Sender<(Arc<Watch>, Chore)>,
    own: Weak<Handed>,
}

impl fmt::Debug for Handed {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "Handed")
    }
}

impl Handed {
    /// Nobody yet.
    ///
    /// # Errors
    /// A thread can't be started.
    pub fn new(server: Arc<Server>, keep: Arc<Keep>) -> io::Result<Arc<Self>> {
        let (chores, receiver) = channel();
        let handed = Arc::new_cyclic(|own| Self {
            server,
            keep,
            seats: Mutex::default(),
            uffd: Mutex::default(),
            chores,
            own: own.clone(),
        });
        let same = handed.clone();
        std::thread::Builder::new()
            .name("handed".to_owned())
            .stack_size(256 << 10)
            .spawn(move || same.work(&receiver))?;
        Ok(handed)
    }

    /// Takes up what a predecessor served, which is dead.
    pub fn take_up(&self) {
        let (memories, doors) = self.keep.with(|kept| {
            let of = |kind| {
                let all = kept.of_kind(kind);
                all.map(|(sandbox, entry)| (sandbox.to_owned(), copy(entry)))
                    .collect::<Vec<_>>()
            };
            (of("uffd"), of("door"))
        });
        for (sandbox, entry) in memories {
            match entry.and_then(|entry| self.take_up_memory(&sandbox, entry)) {
                Ok(()) => self.replay_kept(&sandbox),
                Err(error) => {
                    self.give_up(&sandbox, &format!("its memory can't be taken up: {error}"));
                }
            }
        }
        for (sandbox, entry) in doors {
            if let Err(error) = entry.and_then(|entry| self.take_up_door(&sandbox, entry)) {
                self.give_up(&sandbox, &error.to_string());
            }
        }
    }

    fn take_up_memory(&self, sandbox: &str, entry: Entry) -> io::Result<()> {
        let text: MemoryText = serde_json::from_value(entry.value)?;
        let [uffd, vmm, ledger, _leash]: [OwnedFd; 4] = entry
            .fds
            .try_into()
            .map_err(|_| io::ErrorKind::InvalidData)?;
        let watch = self.watch(sandbox, &text.file, Came::late())?;
        let process = Process::from(vmm.try_clone()?);
        let mut seats = self.lock();
        let kept = uffd::Kept {
            uffd,
            vmm,
            ledger,
            regions: text.regions,
        };
        let session = self.uffd()?.take_up(kept, watch.guest())?;
        let seat = Seat {
            door: Arc::new(Door(watch.clone())),
            watch,
            listener: None,
            vmm: Some(Vmm {
                session,
                process: Arc::new(process),
            }),
        };
        seats.insert(sandbox.to_owned(), seat);
        Ok(())
    }

    fn take_up_door(&self, sandbox: &str, entry: Entry) -> io::Result<()> {
        let text: DoorText = serde_json::from_value(entry.value)?;
        let came = self.lock().contains_key(sandbox);
        if came {
            return self.keep.remove(&format!("door/{sandbox}"));
        }
        if text.knocked {
            return Err(io::Error::other("the pager died while it was let in"));
        }
        let [listener]: [OwnedFd; 1] = entry
            .fds
            .try_into()
            .map_err(|_| io::ErrorKind::InvalidData)?;
        let watch = self.watch(sandbox, &text.file, Came::default())?;
        self.open_door(&mut self.lock(), Arc::new(Door(watch)), listener)
    }

    /// Kills a VMM that can't be served any more, and lets go of it.
    fn give_up(&self, sandbox: &str, cause: &str) {
        eprintln!("{sandbox}: killed, since {cause}");
        if let Some(client) = self.server.clients.get(sandbox) {
            client.kill(&of_pager(cause));
            self.keep_client(&client);
            client.process().ended(END_MAX);
        }
        self.drop_entries(sandbox);
    }

    /// Lets the VMM of a sandbox in at a socket, which is known as a client already.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn listen(&self, sandbox: &str, file: &str, listener: OwnedFd) -> Result<(), String> {
        let words = |error: io::Error| error.to_string();
        if !getsockopt(&listener, sockopt::AcceptConn).unwrap_or(false) {
            return Err("this is no socket that listens".to_owned());
        }
        // Held to the end: who comes meanwhile waits to be admitted.
        let mut seats = self.lock();
        let before = match seats.get(sandbox) {
            Some(seat) if seat.watch.file != file => {
                return Err(format!("{sandbox} is served from {}", seat.watch.file));
            }
            Some(Seat { vmm: Some(vmm), .. }) if !vmm.process.ended(Duration::ZERO) => {
                return Ok(()); // it was asked again, and the VMM has come meanwhile
            }
            Some(Seat {
                vmm: Some(_),
                listener,
                ..
            }) => {
                // Of a VMM that is dead. Its coming may not be noted yet, nor its end.
                if let Some(id) = *listener {
                    self.uffd().map_err(words)?.stop_listening(id);
                }
                seats.remove(sandbox);
                self.drop_entries(sandbox);
                None
            }
            Some(seat) => Some((seat.door.clone(), seat.listener)),
            None => None,
        };
        let text = DoorText {
            file: file.to_owned(),
            knocked: false,
        };
        let same = listener.try_clone().map_err(words)?;
        let key = format!("door/{sandbox}");
        self.keep
            .put(&key, &text, Some(vec![same]))
            .map_err(words)?;
        let (door, old) = match before {
            // Who came to the old socket is the one that is waited for at the new one.
            Some((door, old)) => (door, old),
            None => {
                let watch = self.watch(sandbox, file, Came::default()).map_err(words)?;
                (Arc::new(Door(watch)), None)
            }
        };
        if let Some(id) = old {
            self.uffd().map_err(words)?.stop_listening(id);
        }
        self.open_door(&mut seats, door, listener).map_err(words)
    }

    fn open_door(
        &self,
        seats: &mut HashMap<String, Seat>,
        door: Arc<Door>,
        listener: OwnedFd,
    ) -> io::Result<()> {
        let listener = UnixListener::from(listener);
        let id = self.uffd()?.listen(listener, door.clone())?;
        let sandbox = door.0.sandbox.clone();
        let seat = Seat {
            watch: door.0.clone(),
            door,
            listener: Some(id),
            vmm: None,
        };
        seats.insert(sandbox, seat);
        Ok(())
    }

    /// Lets go of a sandbox: its VMM is dead when this returns.
    ///
    /// # Errors
    /// It can't be ended, and is served on.
    pub fn leave(&self, sandbox: &str) -> Result<(), String> {
        let (listener, vmm) = {
            let mut seats = self.lock();
            let Some(seat) = seats.get_mut(sandbox) else {
                return Ok(());
            };
            let found = (seat.listener.take(), seat.vmm.clone());
            if found.1.is_none() {
                seats.remove(sandbox); // who comes now is not admitted
            }
            found
        };
        let uffd = self.uffd().map_err(|error| error.to_string())?;
        if let Some(id) = listener {
            uffd.stop_listening(id);
        }
        if let Some(Vmm { session, process }) = vmm {
            uffd.kill(session);
            process.kill(); // where the server does not know it yet
            if !process.ended(END_MAX) {
                return Err(format!("{sandbox} can't be ended"));
            }
        }
        self.lock().remove(sandbox);
        self.drop_entries(sandbox);
        Ok(())
    }

    /// What is known of a VMM's memory; None where it hands in none.
    pub fn seen(&self, sandbox: &str) -> Option<serde_json::Value> {
        let (session, watch) = {
            let seats = self.lock();
            let seat = seats.get(sandbox)?;
            (seat.session(), seat.watch.clone())
        };
        let state = session.and_then(|id| self.uffd().ok()?.state(id));
        Some(match state {
            None => {
                let knocked = self.keep.with(|kept| {
                    let door = kept.get(&format!("door/{sandbox}"));
                    door.is_some_and(|door| door.value["knocked"] == true)
                });
                serde_json::json!({ "came": session.is_some(), "knocked": knocked })
            }
            Some(state) => serde_json::json!({
                "came": true, "pages": state.pages, "filled_pages": state.filled_pages,
                "removed_pages": state.removed_pages, "waiting": state.waiting,
                "prefetched_pages": watch.came.ahead_bytes() / 4096,
                "stalled": watch.stalled(&state),
            }),
        })
    }

    /// The server of page faults; there from the first VMM on.
    fn uffd(&self) -> io::Result<Arc<uffd::Server>> {
        let mut uffd = self.uffd.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = &*uffd {
            return Ok(server.clone());
        }
        let server = Arc::new(uffd::Server::start(Limits::default())?);
        *uffd = Some(server.clone());
        Ok(server)
    }

    fn watch(&self, sandbox: &str, file: &str, came: Came) -> io::Result<Arc<Watch>> {
        let node = self.server.nodes.find(file);
        Ok(Arc::new(Watch {
            node: node.ok_or_else(|| io::Error::other(format!("there is no file {file}")))?,
            sandbox: sandbox.to_owned(),
            file: file.to_owned(),
            handed: self.own.clone(),
            server: self.server.clone(),
            came: Arc::new(came),
            stall: Mutex::default(),
        }))
    }

    fn work(&self, chores: &Receiver<(Arc<Watch>, Chore)>) {
        for (watch, chore) in chores {
            let mut seats = self.lock();
            // Another VMM may have come in its place.
            let seat = seats.get_mut(&watch.sandbox);
            let Some(seat) = seat.filter(|seat| Arc::ptr_eq(&seat.watch, &watch)) else {
                continue;
            };
            let came = matches!(chore, Chore::Came);
            let kept = match chore {
                Chore::Came => {
                    if let (Some(id), Ok(uffd)) = (seat.listener.take(), self.uffd()) {
                        uffd.stop_listening(id);
                    }
                    self.keep.remove(&format!("door/{}", watch.sandbox))
                }
                Chore::Ended => {
                    seats.remove(&watch.sandbox);
                    let ahead = self.keep.remove(&format!("ahead/{}", watch.sandbox));
                    ahead.and_then(|()| self.keep.remove(&format!("uffd/{}", watch.sandbox)))
                }
            };
            drop(seats);
            if let Err(error) = kept {
                eprintln!("{}: {error}", watch.sandbox);
            }
            if came {
                self.replay_kept(&watch.sandbox);
            }
        }
    }

    fn keep_client(&self, client: &Client) {
        let key = format!("client/{}", client.sandbox);
        if let Err(error) = self.keep.put(&key, &client.text(), None) {
            eprintln!("{}: why it was killed is not kept: {error}", client.sandbox);
        }
    }

    fn drop_entries(&self, sandbox: &str) {
        for kind in ["door", "uffd", "ahead"] {
            if let Err(error) = self.keep.remove(&format!("{kind}/{sandbox}")) {
                eprintln!("{sandbox}: {error}");
            }
        }
    }

    fn admit(&self, watch: &Arc<Watch>, id: u64, keep: &uffd::Keep<'_>) -> io::Result<Guest> {
        let mut seats = self.lock();
        let seat = seats.get_mut(&watch.sandbox);
        let seat = seat.filter(|seat| Arc::ptr_eq(&seat.watch, watch) && seat.vmm.is_none());
        let seat = seat.ok_or_else(|| io::Error::other("nobody is waited for"))?;
        let client = self.server.clients.get(&watch.sandbox);
        let client = client.ok_or(io::ErrorKind::NotFound)?;
        let announced = client.text().pid;
        let vmm = Process::from(keep.vmm.try_clone_to_owned()?);
        let pid = vmm.pid()?;
        if pid != announced {
            let cause = format!("it is process {pid}, and {announced} was announced");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, cause));
        }
        if client.has_ended() {
            let cause = format!("the process {announced} that was announced is gone");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, cause));
        }
        let stream = keep.stream.ok_or(io::ErrorKind::NotConnected)?;
        // From here on it ends with the last of the two that hold this.
        let leash = leash::fasten(stream, keep.uffd, pid)?;
        if vmm.ended(Duration::ZERO) {
            return Err(io::ErrorKind::NotConnected.into()); // the number may be another's already
        }
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
        let process = Arc::new(vmm.try_clone()?);
        let fds = vec![own(keep.uffd)?, vmm.into(), own(keep.ledger)?, leash];
        let text = MemoryText {
            file: watch.file.clone(),
            regions: keep.regions.to_vec(),
        };
        let key = format!("uffd/{}", watch.sandbox);
        self.keep.put(&key, &text, Some(fds))?;
        seat.vmm = Some(Vmm {
            session: id,
            process,
        });
        let _ = self.chores.send((watch.clone(), Chore::Came));
        Ok(watch.guest())
    }

    /// Keeps whether somebody knocked. Where all were sent away, nothing of the VMM was lost.
    fn knocked(&self, watch: &Arc<Watch>, knocked: bool) -> io::Result<()> {
        let seats = self.lock();
        let seat = seats.get(&watch.sandbox);
        let waits = |seat: &&Seat| Arc::ptr_eq(&seat.watch, watch) && seat.vmm.is_none();
        if seat.filter(waits).is_none() {
            return Ok(()); // nobody is waited for: whoever comes is not admitted
        }
        let text = DoorText {
            file: watch.file.clone(),
            knocked,
        };
        self.keep
            .put(&format!("door/{}", watch.sandbox), &text, None)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Seat>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file that a VMM is served from, and who counts.
struct Watch {
    node: Arc<Node>,
    sandbox: String,
    file: String,
    handed: Weak<Handed>,
    server: Arc<Server>,
    /// What it was given.
    came: Arc<Came>,
    /// What it waits for, and since when.
    stall: Mutex<Option<(Unreadable, Instant)>>,
}

impl fmt::Debug for Watch {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{} on {}", self.sandbox, self.file)
    }
}

impl Watch {
    fn guest(self: &Arc<Self>) -> Guest {
        Guest {
            pages: self.clone(),
            witness: Arc::new(Told(self.clone())),
            options: Options {
                stall_max: self.server.bound,
                retry_after: AGAIN,
                ..Options::default()
            },
        }
    }

    fn stalled(&self, state: &uffd::State) -> Option<serde_json::Value> {
        let stall = self.stall.lock().unwrap_or_else(PoisonError::into_inner);
        let (why, since) = stall.as_ref().filter(|_| state.stalled > 0)?;
        Some(serde_json::json!({
            "blob": why.blob, "cause": why.cause, "waited_ms": since.elapsed().as_millis() as u64,
        }))
    }

    fn set_stall(&self, stall: Option<(Unreadable, Instant)>) {
        *self.stall.lock().unwrap_or_else(PoisonError::into_inner) = stall;
    }
}

impl Pages for Watch {
    fn size_bytes(&self) -> u64 {
        self.node.size_bytes
    }

    fn read(&self, offset: u64, size: usize, parts: &mut Vec<Part>) -> Result<Origin, Unreadable> {
        self.node
            .device(&self.server.open)?
            .read(offset, size, parts)
    }
}

/// Who counts for a VMM.
#[derive(Debug)]
struct Told(Arc<Watch>);

impl Told {
    fn chore(&self, chore: Chore) {
        if let Some(handed) = self.0.handed.upgrade() {
            let _ = handed.chores.send((self.0.clone(), chore));
        }
    }
}

impl Witness for Told {
    fn read(&self, offset: u64, bytes: u64) {
        self.0.came.with(|given| given.read(offset, bytes));
    }

    fn served(&self, served: &uffd::Served) {
        let seen = &self.0.server.seen;
        seen.served(&self.0.file, served.origin, served.bytes, served.latency);
        if served.stalled {
            self.0.set_stall(None);
        }
    }

    fn stalled(&self, why: &Unreadable) {
        eprintln!("{}: {why}", self.0.sandbox);
        self.0.server.seen.stalled(&self.0.file);
        self.0.set_stall(Some((why.clone(), Instant::now())));
    }

    fn killing(&self, why: &Why) {
        let (sandbox, waited) = (&self.0.sandbox, self.0.server.bound.as_millis() as u64);
        let cause = match why {
            Why::Asked => return,
            Why::Unreadable(why) => Cause {
                blob: why.blob.clone(),
                cause: why.cause.clone(),
                waited_ms: waited,
            },
            other => of_pager(&other.to_string()),
        };
        eprintln!("{sandbox}: killed, since {why}");
        if let Some(client) = self.0.server.clients.get(sandbox) {
            client.note(&cause);
            // Before it is dead: whoever sees that may ask why, of the next pager as well.
            if let Some(handed) = self.0.handed.upgrade() {
                handed.keep_client(&client);
            }
        }
    }

    fn ended(&self, _ending: &uffd::Ending) {
        self.chore(Chore::Ended);
    }
}

/// Who stands behind a VMM's socket.
#[derive(Debug)]
struct Door(Arc<Watch>);

impl Door {
    fn handed(&self) -> io::Result<Arc<Handed>> {
        self.0
            .handed
            .upgrade()
            .ok_or(io::ErrorKind::NotFound.into())
    }
}

impl Host for Door {
    fn size_bytes(&self) -> u64 {
        self.0.node.size_bytes
    }

    fn knocked(&self) -> io::Result<()> {
        self.handed()?.knocked(&self.0, true)
    }

    fn admitted(&self, id: u64, keep: &uffd::Keep<'_>) -> io::Result<Guest> {
        self.handed()?.admit(&self.0, id, keep)
    }

    fn refused(&self, pid: i32, why: &Refusal) {
        eprintln!("{}: process {pid} is refused: {why}", self.0.sandbox);
    }

    fn deserted(&self) {
        let Ok(handed) = self.handed() else { return };
        if let Err(error) = handed.knocked(&self.0, false) {
            eprintln!("{}: {error}", self.0.sandbox);
        }
    }
}

fn of_pager(cause: &str) -> Cause {
    Cause {
        blob: "the pager".to_owned(),
        cause: cause.to_owned(),
        waited_ms: 0,
    }
}

fn copy(entry: &Entry) -> io::Result<Entry> {
    let fds = entry.fds.iter().map(|fd| fd.as_fd().try_clone_to_owned());
    Ok(Entry {
        value: entry.value.clone(),
        fds: fds.collect::<io::Result<_>>()?,
    })
}
