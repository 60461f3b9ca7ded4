//! The two processes of a home: `diapause-pager start|first|keeper|pager NAME`.
//!
//! `probe`: whether this host lets us mount FUSE, tried and let go of.
//! `mount`: mounts it in a user namespace, for whoever is at the end of its standard input.
//! `abort`: ends a connection that a pair left which is dead; its number is the second argument.
//! `start`: the daemon's word. It starts `first` and ends, so that the two are nobody's children.
//! `first`: its standard input is a SOCK_SEQPACKET socket that what is kept comes from: settings,
//! and the socket for clients. It becomes the keeper and starts the pager.
//! `keeper`, `pager`: one of the two, started by the other, which is at the end of its standard
//! input. NAME is not read: a process is found by it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, ExitCode};

use diapause_pager::fuse::{self, Fuse};
use diapause_pager::kept::Kept;
use diapause_pager::process::Process;
use diapause_pager::service::Service;
use diapause_pager::{control, frames, keeper, namespace};

fn main() -> ExitCode {
    let role = std::env::args().nth(1).unwrap_or_default();
    match run(&role) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            eprintln!("usage: diapause-pager probe|mount|abort|start|first|keeper|pager NAME");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("{role}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(role: &str) -> io::Result<()> {
    let roles = [
        "probe", "mount", "abort", "start", "first", "keeper", "pager",
    ];
    if !roles.contains(&role) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if role == "probe" {
        return Fuse::mount().map(drop);
    }
    if role == "mount" {
        return namespace::make(io::stdin().as_fd());
    }
    let name = std::env::args().nth(2).unwrap_or_default();
    if role == "abort" {
        let number = name.parse().map_err(|_| io::ErrorKind::InvalidInput)?;
        return fuse::abort(number);
    }
    if role == "start" {
        return Command::new("/proc/self/exe")
            .args(["first", &name])
            .spawn()
            .map(drop);
    }
    frames::bound_malloc();
    let link = io::stdin().as_fd().try_clone_to_owned()?;
    let kept = Kept::receive(link.as_fd())?;
    match role {
        "first" => keeper::keep(kept, None),
        "keeper" => match other(&link) {
            Ok(pager) => keeper::keep(kept, Some((link, pager))),
            // It died when it had told us everything.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => keeper::keep(kept, None),
            Err(error) => Err(error),
        },
        _ => {
            let keeper = other(&link)?;
            let (service, listener) = Service::start(kept, link, keeper)?;
            control::listen(&listener, &service);
            Ok(())
        }
    }
}

/// The process at the other end of the link: it made the pair of sockets.
fn other(link: &OwnedFd) -> io::Result<Process> {
    Ok(Process::peer(link)?.0)
}
