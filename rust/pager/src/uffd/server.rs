//! Serving VMMs, for whoever has some.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::process::Process;

use super::crew::{spawn, Crew, Limits};
use super::door;
use super::host::{Guest, Host, Kept, Why};
use super::ioctl::Uffd;
use super::ledger::Ledger;
use super::regions::Regions;
use super::session::{Session, State};
use super::vmm::Vmm;

/// Serves VMMs until it is dropped, which kills those that are left.
#[derive(Debug)]
pub struct Server {
    crew: Arc<Crew>,
    door: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts its threads.
    ///
    /// # Errors
    /// Where there are no descriptors or no threads to be had.
    pub fn start(limits: Limits) -> io::Result<Self> {
        let crew = Crew::new(limits)?;
        let mut server = Self {
            crew: crew.clone(),
            door: None,
        };
        crew.man()?;
        server.door = Some(spawn("uffd-door", move || door::tend(&crew))?);
        Ok(server)
    }

    /// Lets VMMs in that connect to a socket; a name for the listener.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn listen(&self, listener: UnixListener, host: Arc<dyn Host>) -> io::Result<u64> {
        listener.set_nonblocking(true)?;
        Ok(self.crew.listen(listener, host))
    }

    /// Closes a listener. VMMs that were let in are served on.
    pub fn stop_listening(&self, id: u64) {
        self.crew.stop_listening(id);
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
        let id = self.crew.next_id();
        let session = Session::new(id, 0, vmm, regions, ledger, None);
        session.equip(guest);
        let taken = session.take_up();
        taken.map_err(|why| wrong(why.to_string()))?;
        self.crew.enrol(session)?;
        Ok(id)
    }

    /// The names of the VMMs that are served.
    pub fn vmms(&self) -> Vec<u64> {
        self.crew.all().iter().map(|session| session.id()).collect()
    }

    /// What a VMM waits for; None where it is gone.
    pub fn state(&self, id: u64) -> Option<State> {
        Some(self.crew.session(id)?.state())
    }

    /// Ends a VMM.
    pub fn kill(&self, id: u64) {
        if let Some(session) = self.crew.session(id) {
            session.kill(Why::Asked);
        }
    }

    /// A VMM; None where it is gone.
    pub fn session(&self, id: u64) -> Option<Arc<Session>> {
        self.crew.session(id)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let left = self.crew.end();
        if let Some(door) = self.door.take() {
            let _ = door.join();
        }
        for session in left {
            session.vmm().process().ended(Duration::from_secs(10));
            self.crew.strike(&session);
        }
    }
}
