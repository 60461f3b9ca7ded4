//! Packets: one JSON text and some descriptors, over a SOCK_SEQPACKET socket. What the keeper and
//! the pager say to each other, and what clients say to the pager.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::cmsg_space;
use nix::sys::socket::{recvmsg, sendmsg, ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr};
use serde::de::DeserializeOwned;
use serde::Serialize;

/// Bytes of a packet's text.
pub const PACKET_BYTES_MAX: usize = 64 << 10;
/// Descriptors that come with it.
pub const PACKET_FDS_MAX: usize = 16;

/// Descriptors that the kernel passes with one message.
const SCM_FDS_MAX: usize = 253;

/// What was received.
#[derive(Debug)]
pub struct Packet {
    /// Its text.
    pub text: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

impl Packet {
    /// Its text as what it has to be.
    ///
    /// # Errors
    /// Where it is something else.
    pub fn parse<T: DeserializeOwned>(&self) -> io::Result<T> {
        serde_json::from_slice(&self.text).map_err(invalid)
    }
}

/// Sends one packet, whole or not at all.
///
/// # Errors
/// What the kernel says; also where it is too large.
pub fn send(to: BorrowedFd<'_>, what: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let text = text_of(what, fds.len())?;
    let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[][..] } else { &rights };
    let data = [IoSlice::new(&text)];
    loop {
        match sendmsg::<UnixAddr>(to.as_raw_fd(), &data, control, MsgFlags::MSG_NOSIGNAL, None) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
}

/// Whether something can be sent.
///
/// # Errors
/// Where it is too large.
pub fn check(what: &impl Serialize, fds: usize) -> io::Result<()> {
    text_of(what, fds).map(drop)
}

fn text_of(what: &impl Serialize, fds: usize) -> io::Result<Vec<u8>> {
    let text = serde_json::to_vec(what).map_err(invalid)?;
    if text.len() > PACKET_BYTES_MAX || fds > PACKET_FDS_MAX {
        let size = format!("a packet of {} bytes, {fds} descriptors", text.len());
        return Err(invalid(size));
    }
    Ok(text)
}

/// Receives one packet; None at the end of the stream.
///
/// # Errors
/// What the kernel says; also where it does not fit.
pub fn receive(from: BorrowedFd<'_>) -> io::Result<Option<Packet>> {
    let mut text = vec![0; PACKET_BYTES_MAX];
    // Room for all that the kernel passes at once: descriptors that come can't be lost then, and
    // those of a packet that is refused are closed.
    let mut space = cmsg_space!([std::os::fd::RawFd; SCM_FDS_MAX]);
    let mut data = [IoSliceMut::new(&mut text)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = loop {
        match recvmsg::<UnixAddr>(from.as_raw_fd(), &mut data, Some(&mut space), flags) {
            Err(nix::errno::Errno::EINTR) => {}
            other => break other?,
        }
    };
    let (bytes, cut) = (got.bytes, got.flags);
    let mut fds = Vec::new();
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: the kernel has just made these descriptors for us, and nobody else has them.
            fds.extend(
                numbers
                    .into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    let cut = cut.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
    if cut || fds.len() > PACKET_FDS_MAX {
        return Err(invalid("a packet that is too large"));
    }
    text.truncate(bytes);
    Ok((bytes > 0 || !fds.is_empty()).then_some(Packet { text, fds }))
}

/// Borrows of descriptors, as [`send`] takes them.
pub fn borrowed<'a>(fds: impl IntoIterator<Item = &'a OwnedFd>) -> Vec<BorrowedFd<'a>> {
    fds.into_iter().map(AsFd::as_fd).collect()
}

fn invalid(cause: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, cause.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC;
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
    }

    #[test]
    fn text_and_descriptors_arrive_together() {
        let (one, other) = pair();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"kept").unwrap();
        send(one.as_fd(), &"hello", &[file.as_fd()]).unwrap();
        let mut packet = receive(other.as_fd()).unwrap().unwrap();
        assert_eq!(packet.parse::<String>().unwrap(), "hello");
        let mut same = File::from(packet.fds.remove(0));
        same.rewind().unwrap();
        let mut text = String::new();
        same.read_to_string(&mut text).unwrap();
        assert_eq!(text, "kept");
        drop(one);
        assert!(receive(other.as_fd()).unwrap().is_none());
    }

    #[test]
    fn what_is_too_large_is_neither_sent_nor_taken() {
        let (one, other) = pair();
        let large = "x".repeat(PACKET_BYTES_MAX);
        assert!(send(one.as_fd(), &large, &[]).is_err());
        let bytes = vec![b'1'; PACKET_BYTES_MAX + 1];
        nix::unistd::write(&one, &bytes).unwrap();
        assert!(receive(other.as_fd()).is_err());
    }

    #[test]
    fn descriptors_of_a_refused_packet_are_closed() {
        let (one, other) = pair();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let numbers = vec![writer.as_raw_fd(); PACKET_FDS_MAX + 1];
        let rights = [ControlMessage::ScmRights(&numbers)];
        let (data, none) = ([IoSlice::new(b"1")], MsgFlags::empty());
        sendmsg::<UnixAddr>(one.as_raw_fd(), &data, &rights, none, None).unwrap();
        drop(writer);
        assert!(receive(other.as_fd()).is_err());
        // Nobody has the other end of the pipe any more.
        assert_eq!(nix::unistd::read(&reader, &mut [0; 1]).unwrap(), 0);
    }
}
