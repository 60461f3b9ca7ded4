//! A connection to the kernel for a user who may not mount: made in a user namespace.
//!
//! A process of its own makes it and hands its descriptors over, so who serves stays where it is,
//! with its user's rights and no more. Facts of the kernel that this rests on (tried on 6.18):
//! - The device has to be opened in the namespace that the mount is made in.
//! - The mount has no place in any directory tree, so it needs no mount namespace to live on in,
//!   and files on it can be opened outside of the user namespace.
//! - Only processes of that user and group may reach it: `allow_other` would mean those in the
//!   namespace, where nobody is any more.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Command, Stdio};

use nix::sched::{unshare, CloneFlags};
use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
use nix::unistd::{getegid, geteuid};

use crate::fuse::{Audience, Fuse};
use crate::packet::{self, borrowed};

/// A new connection, by a process that enters a namespace for it.
///
/// # Errors
/// What that process has to say: there are no user namespaces, or no FUSE in them.
pub fn mount() -> io::Result<Fuse> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let mut maker = Command::new("/proc/self/exe")
        .arg("mount")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .spawn()?;
    let packet = packet::receive(ours.as_fd());
    let _ = maker.wait(); // somebody else may have let go of it already
    let packet = packet?.ok_or_else(|| io::Error::other("who mounts has ended at once"))?;
    match packet.parse::<Option<String>>()? {
        None => Fuse::from_descriptors(packet.fds).ok_or(io::ErrorKind::InvalidData.into()),
        Some(cause) => Err(io::Error::new(io::ErrorKind::PermissionDenied, cause)),
    }
}

/// Makes one and sends it, or says why not; for a process of its own, of one thread.
///
/// # Errors
/// Nobody is there to send it to.
pub fn make(to: BorrowedFd<'_>) -> io::Result<()> {
    match entered() {
        Ok(fuse) => packet::send(to, &None::<String>, &borrowed(fuse.descriptors())),
        Err(cause) => packet::send(to, &Some(cause), &[]),
    }
}

fn entered() -> Result<Fuse, String> {
    let why = |error: io::Error| format!("in a user namespace: {error}");
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
        .map_err(|error| format!("no user namespace can be had: {error}"))?;
    for (name, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("{uid} {uid} 1")),
        ("gid_map", format!("{gid} {gid} 1")),
    ] {
        fs::write(format!("/proc/self/{name}"), text).map_err(why)?;
    }
    Fuse::mount_for(Audience::OneUser).map_err(why)
}
