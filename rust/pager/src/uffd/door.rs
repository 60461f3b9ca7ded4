//! The thread that lets peers in, wakes what is stalled and watches the bounds.

use std::os::fd::AsFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use super::crew::{Crew, Named, WATCH};
use super::handshake::{Offer, Pending, Refusal};
use super::host::Host;
use super::ledger::Ledger;
use super::session::Session;

/// The life of that thread.
pub fn tend(crew: &Arc<Crew>) {
    let mut pending: Vec<Pending> = Vec::new();
    let mut next = Instant::now() + WATCH;
    while !crew.is_over() {
        let listeners: Vec<_> = crew.listeners();
        let until = pending.iter().map(Pending::until).fold(next, Instant::min);
        let ready = wait(crew, &listeners, &pending, until);
        crew.hush();
        // A fault in here costs the peers that are in their handshake, nobody else.
        let stepped = catch_unwind(AssertUnwindSafe(|| {
            let mut peers = std::mem::take(&mut pending);
            let mut hosts: Vec<_> = peers.iter().map(|peer| peer.host().clone()).collect();
            for (id, (_, host)) in ready.iter().map(|&number| &listeners[number]) {
                greet(crew, *id, host, &mut peers);
                hosts.push(host.clone());
            }
            let left = advance(crew, peers);
            tell_deserted(hosts, &left);
            left
        }));
        pending = stepped.unwrap_or_default();
        next = crew.watch();
    }
}

/// Until something happens, or until then; the numbers of listeners at which somebody waits.
fn wait(crew: &Crew, listeners: &[Named], pending: &[Pending], until: Instant) -> Vec<usize> {
    let mut fds = vec![PollFd::new(crew.bell(), PollFlags::POLLIN)];
    let doors = listeners.iter().map(|(_, (listener, _))| listener.as_fd());
    let all = doors.chain(pending.iter().map(|pending| pending.stream().as_fd()));
    fds.extend(all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
    let left = until.saturating_duration_since(Instant::now());
    // Rounded up, or the last millisecond would be spent in circles.
    let timeout = PollTimeout::try_from(left + Duration::from_millis(1));
    if let Err(error) = poll(&mut fds, timeout.unwrap_or(PollTimeout::ZERO)) {
        debug_assert_eq!(error, Errno::EINTR);
        return Vec::new();
    }
    let ready = |number: &usize| fds[number + 1].any().unwrap_or(false);
    (0..listeners.len()).filter(ready).collect()
}

/// Tells hosts that had peers, or were about to, and have none.
fn tell_deserted(mut hosts: Vec<Arc<dyn Host>>, peers: &[Pending]) {
    let same = |one: &Arc<dyn Host>, other: &Arc<dyn Host>| Arc::ptr_eq(one, other);
    while let Some(host) = hosts.pop() {
        hosts.retain(|other| !same(&host, other));
        if !peers.iter().any(|peer| same(&host, peer.host())) {
            host.deserted();
        }
    }
}

/// Takes in who has connected.
fn greet(crew: &Crew, listener: u64, host: &Arc<dyn Host>, peers: &mut Vec<Pending>) {
    // Not more than there is room for, so that others have their turn.
    for _ in 0..crew.limits().handshakes.max(1) {
        let known = host.knocked();
        let Some(stream) = crew.accept(listener) else {
            return;
        };
        if let Err(error) = known {
            host.refused(0, &Refusal::Unwanted(error));
            continue;
        }
        if peers.len() >= crew.limits().handshakes.max(1) {
            // A VMM says all it has to say at once: who waits longest is none.
            peers.remove(0).refuse(Refusal::Crowded);
        }
        match Pending::new(stream, host.clone(), crew.limits().handshake_max) {
            Ok(peer) => peers.push(peer),
            Err(why) => host.refused(0, &why),
        }
    }
}

/// Goes on with each handshake; those that are not over.
fn advance(crew: &Crew, peers: Vec<Pending>) -> Vec<Pending> {
    let mut left = Vec::new();
    for mut peer in peers {
        match peer.advance() {
            Ok(Some(list)) => {
                if let Ok((offer, host)) = peer.accept(list) {
                    // The host was told.
                    let _ = admit(crew, offer, &*host);
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

/// A peer whose handshake is complete: kept, then served.
fn admit(crew: &Crew, offer: Offer, host: &dyn Host) -> Result<(), Refusal> {
    let pid = offer.pid;
    // From here on the VMM dies where anything fails: its memory has nobody else.
    let admitted = (|| {
        if crew.count() >= crew.limits().vmms {
            return Err(Refusal::Full);
        }
        let ledger = Ledger::create(offer.regions.pages())?;
        let Offer { vmm, regions, .. } = offer;
        let id = crew.next_id();
        let session = Session::new(id, pid, vmm, regions, ledger, Some(offer.stream));
        let guest = host.admitted(id, &session.keep());
        session.equip(guest.map_err(Refusal::Unwanted)?);
        Ok(crew.enrol(session)?)
    })();
    admitted.inspect_err(|why| host.refused(pid, why))
}
