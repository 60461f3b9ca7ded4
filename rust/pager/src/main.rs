//! The two processes of a home: `diapause-pager start|keeper|pager NAME`.
//!
//! `start`: the daemon's word. Its standard input is a SOCK_SEQPACKET socket that what is kept comes
//! from: the settings and the socket for clients. It becomes the keeper and starts the pager.
//! `keeper`, `pager`: one of the two, started by the other, which is at the end of its standard
//! input. NAME is not read: a process is found by it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use diapause_pager::kept::{pidfd, Kept};
use diapause_pager::service::Service;
use diapause_pager::{control, keeper};

use nix::sys::signal::{signal, SigHandler, Signal};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

fn main() -> ExitCode {
    let role = std::env::args().nth(1).unwrap_or_default();
    match run(&role) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            eprintln!("usage: diapause-pager start|keeper|pager NAME");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("{role}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(role: &str) -> io::Result<()> {
    if !matches!(role, "start" | "keeper" | "pager") {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // Each is the other's child at some time: nobody waits for a child that has ended.
    // SAFETY: no handler is set, and no thread runs yet.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
    let link = io::stdin().as_fd().try_clone_to_owned()?;
    let kept = Kept::receive(link.as_fd())?;
    match role {
        "start" => keeper::keep(kept, None),
        "keeper" => {
            let pager = other(&link)?;
            keeper::keep(kept, Some((link, pager)))
        }
        _ => {
            let keeper = other(&link)?;
            let (service, listener) = Service::start(kept, link, keeper)?;
            control::listen(&listener, &service);
            Ok(())
        }
    }
}

/// The process at the other end of the link: it made the pair of sockets.
fn other(link: &OwnedFd) -> io::Result<OwnedFd> {
    pidfd(getsockopt(link, PeerCredentials)?.pid())
}
