//! Peers that send what they should not: each gets its own refusal, and nobody else notices.
#![allow(clippy::unwrap_used)]

mod uffd_support;

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use diapause_pager::uffd::handshake::MESSAGE_BYTES_MAX;
use diapause_pager::uffd::{Limits, Options, Server};
use nix::libc::SIGKILL;
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags, UnixAddr};
use serde_json::json;
use uffd_support::{pattern, Client, Street};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;

fn street(limits: Limits) -> (Server, Street) {
    let server = Server::start(limits).unwrap();
    let street = Street::new(&server, 7, SIZE, Options::default());
    (server, street)
}

fn orders(mode: &str) -> serde_json::Value {
    json!({"seed": 7, "regions": [SIZE / 2, SIZE / 2], "mode": mode})
}

/// A good VMM is served, whatever happened before.
fn all_is_well(street: &Street) {
    let mut client = Client::start(&street.socket, &orders("script"));
    assert_eq!(client.line(), "ready");
    client.say("touch 9");
    assert_eq!(client.line(), format!("page 9 {}", pattern::word(7, 9, 1)));
}

fn send(stream: &UnixStream, text: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights };
    let data = [std::io::IoSlice::new(text)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    // A peer that was refused in the middle does not care.
    let _ = sendmsg::<UnixAddr>(stream.as_raw_fd(), &data, control, flags, None);
}

fn file() -> OwnedFd {
    tempfile::tempfile().unwrap().into()
}

const GOOD: &[u8] =
    br#"[{"base_host_virt_addr":65536,"size":4194304,"offset":0,"page_size":4096}]"#;

#[test]
fn garbage_is_refused_by_its_name() {
    let (_server, street) = street(Limits::default());
    let one = file();
    let fd = one.as_raw_fd();
    let fds = |count: usize| vec![fd; count];
    let large = vec![b' '; MESSAGE_BYTES_MAX + 1];
    let region = |base: u64, size: u64, offset: u64, page: u64| {
        let region = json!([{"base_host_virt_addr": base, "size": size, "offset": offset,
            "page_size": page}]);
        region.to_string().into_bytes()
    };
    let many = format!(
        "[{}]",
        vec!["{\"base_host_virt_addr\":0,\"size\":4096,\"offset\":0,\"page_size\":4096}"; 300]
            .join(",")
    );
    let cases: Vec<(&str, Vec<u8>, Vec<RawFd>)> = vec![
        ("bad_json", b"what]".to_vec(), fds(1)),
        ("bad_json", b"{\"a\":[]".to_vec(), fds(1)),
        ("bad_json", [GOOD, b"]"].concat(), fds(1)),
        ("no_regions", b"[]".to_vec(), fds(1)),
        ("too_large", large, fds(1)),
        ("too_many_regions", many.into_bytes(), fds(1)),
        ("no_descriptor", GOOD.to_vec(), vec![]),
        ("several_descriptors", GOOD.to_vec(), fds(2)),
        ("several_descriptors", GOOD.to_vec(), fds(200)),
        ("not_userfaultfd", GOOD.to_vec(), fds(1)),
        ("page_size", region(65536, 8192, 0, 8192), fds(1)),
        ("page_size", region(65536, 8192, 0, 0), fds(1)),
        ("unaligned", region(65537, 8192, 0, 4096), fds(1)),
        ("unaligned", region(65536, 0, 0, 4096), fds(1)),
        (
            "overflow",
            region(65536, 8192, u64::MAX - 4095, 4096),
            fds(1),
        ),
        ("beyond_device", region(65536, SIZE + 4096, 0, 4096), fds(1)),
    ];
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
    for (number, (code, text, fds)) in cases.iter().enumerate() {
        let stream = UnixStream::connect(&street.socket).unwrap();
        send(&stream, text, fds);
        let code = format!("refused {code}");
        let same = cases[..=number]
            .iter()
            .filter(|case| code.ends_with(case.0));
        street.house.notes.wait(&code, same.count() as u64);
    }
    all_is_well(&street);
    // Nothing of theirs stays open here (what others of this test hold comes and goes).
    let after = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(after < open + 100, "{open} descriptors, then {after}");
}

#[test]
fn half_a_message_and_silence_end_at_the_bound_and_at_hang_up() {
    let (_server, street) = street(Limits {
        handshake_max: Duration::from_millis(300),
        ..Limits::default()
    });
    let notes = &street.house.notes;
    let one = file();
    let silent = UnixStream::connect(&street.socket).unwrap();
    let mut half = UnixStream::connect(&street.socket).unwrap();
    half.write_all(&GOOD[..20]).unwrap();
    let only_fd = UnixStream::connect(&street.socket).unwrap();
    send(&only_fd, b"[", &[one.as_raw_fd()]);
    all_is_well(&street);
    notes.wait("refused silent", 1);
    notes.wait("refused half_message", 2);
    drop((silent, half, only_fd));
    drop(UnixStream::connect(&street.socket).unwrap());
    notes.wait("refused silent", 2);
    let mut gone = UnixStream::connect(&street.socket).unwrap();
    gone.write_all(&GOOD[..20]).unwrap();
    drop(gone);
    notes.wait("refused half_message", 3);
}

#[test]
fn a_message_in_many_pieces_is_whole() {
    let (_server, street) = street(Limits::default());
    let one = file();
    let mut stream = UnixStream::connect(&street.socket).unwrap();
    send(&stream, &GOOD[..1], &[one.as_raw_fd()]);
    for byte in &GOOD[1..] {
        stream.write_all(&[*byte]).unwrap();
    }
    // It was read to its end: only then is the descriptor looked at.
    street.house.notes.wait("refused not_userfaultfd", 1);
}

#[test]
fn who_says_nothing_keeps_nobody_out() {
    let (_server, street) = street(Limits {
        handshakes: 4,
        ..Limits::default()
    });
    let silent: Vec<_> = (0..20)
        .map(|_| UnixStream::connect(&street.socket).unwrap())
        .collect();
    all_is_well(&street);
    assert!(street.house.notes.count("refused crowded") >= 16);
    drop(silent);
}

#[test]
fn a_vmm_whose_word_is_wrong_is_dead_before_its_memory_reads_zeros() {
    let (_server, street) = street(Limits::default());
    for (mode, code) in [
        ("overlap", "overlap"),
        ("unaligned", "unaligned"),
        ("beyond", "beyond_device"),
        ("page_size", "page_size"),
        ("other_page_size", "not_registered"),
        ("not_registered", "not_registered"),
        ("no_remove", "features"),
        ("fork", "features"),
    ] {
        let mut client = Client::start(&street.socket, &orders(mode));
        // In the second region, which is registered in each case.
        client.try_say("touch 600");
        client.dies_of(SIGKILL);
        let notes = &street.house.notes;
        let count = 1 + u64::from(mode == "not_registered" || mode == "fork");
        notes.wait(&format!("refused {code}"), count);
        while let Some(line) = client.line_within(Duration::from_millis(100)) {
            assert_eq!(line, "ready", "{mode}: it saw something");
        }
    }
    all_is_well(&street);
}

#[test]
fn not_more_vmms_than_may_be_are_served() {
    let (server, street) = street(Limits {
        vmms: 1,
        ..Limits::default()
    });
    let mut first = Client::start(&street.socket, &orders("script"));
    street.house.notes.wait("admitted", 1);
    let mut second = Client::start(&street.socket, &orders("script"));
    second.dies_of(SIGKILL);
    street.house.notes.wait("refused full", 1);
    first.say("touch 9");
    assert_eq!((first.line(), server.vmms().len()), ("ready".into(), 1));
    assert_eq!(first.line(), format!("page 9 {}", pattern::word(7, 9, 1)));
}
