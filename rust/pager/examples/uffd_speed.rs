//! How fast faults are answered: `uffd_speed BYTES_OF_A_FAULT BYTES [VMMS]` prints lines of JSON.
//! Its peer is `benchmarks/peers/uffd_loop.c`: the same touches, the same source in memory.
//!
//! With more than one VMM the others are held open, having touched nothing, so that what they cost
//! in memory and time can be seen.
#![allow(clippy::unwrap_used)]

use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;
use std::{env, fs, io};

use diapause_format::FRAME_BYTES;
use diapause_pager::build::{Frame, Unreadable};
use diapause_pager::device::{Origin, Part};
use diapause_pager::uffd::host::Keep;
use diapause_pager::uffd::ioctl::{features, Uffd};
use diapause_pager::uffd::memory::{Mapping, Protection};
use diapause_pager::uffd::{Guest, Host, Limits, Options, Pages, Region, Server, Witness};
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags, UnixAddr};

const PAGE: u64 = 4096;

fn main() {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let number = |at: usize| arguments[at].parse::<u64>().unwrap();
    match arguments[0].as_str() {
        "client" => client(&arguments[1], number(2), number(3)),
        "idle" => idle(&arguments[1], number(2)),
        _ => measure(
            number(0),
            number(1),
            arguments.get(2).map_or(1, |_| number(2)),
        ),
    }
}

/// Frames in memory: what a source costs that has everything.
#[derive(Debug)]
struct Warm {
    frames: Vec<Frame>,
    options: Options,
}

impl Pages for Warm {
    fn size_bytes(&self) -> u64 {
        (self.frames.len() * FRAME_BYTES) as u64
    }

    fn read(&self, offset: u64, size: usize, parts: &mut Vec<Part>) -> Result<Origin, Unreadable> {
        let (mut at, end) = (offset as usize, offset as usize + size);
        while at < end {
            let from = at % FRAME_BYTES;
            let taken = (FRAME_BYTES - from).min(end - at);
            let frame = self.frames[at / FRAME_BYTES].clone();
            parts.push(Part::Frame(frame, from, taken));
            at += taken;
        }
        Ok(Origin::Kept)
    }
}

#[derive(Debug)]
struct Nobody;

impl Witness for Nobody {}

#[derive(Debug)]
struct House(Arc<Warm>);

impl Host for House {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn admitted(&self, _id: u64, _keep: &Keep<'_>) -> io::Result<Guest> {
        Ok(Guest {
            pages: self.0.clone(),
            witness: Arc::new(Nobody),
            options: self.0.options,
        })
    }
}

fn measure(window_bytes: u64, size: u64, vmms: u64) {
    let frames = (0..size.div_ceil(FRAME_BYTES as u64)).map(|_| vec![7; FRAME_BYTES].into());
    let warm = Arc::new(Warm {
        frames: frames.collect(),
        options: Options {
            window_bytes,
            ..Options::default()
        },
    });
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("uffd.sock");
    let server = Server::start(Limits::default()).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    server.listen(listener, Arc::new(House(warm))).unwrap();
    let before = resident_bytes();
    let program = env::current_exe().unwrap();
    let start = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.args(arguments).stdin(Stdio::piped());
        command.spawn().unwrap()
    };
    let (socket, size, window) = (
        socket.to_str().unwrap(),
        size.to_string(),
        window_bytes.to_string(),
    );
    let others: Vec<_> = (1..vmms).map(|_| start(&["idle", socket, &size])).collect();
    while (server.vmms().len() as u64) < vmms - 1 {
        std::thread::yield_now();
    }
    let mut client = start(&["client", socket, &window, &size]);
    assert!(client.wait().unwrap().success());
    let cost = resident_bytes().saturating_sub(before);
    println!("{{\"vmms\":{vmms},\"resident_bytes_more\":{cost}}}");
    for mut other in others {
        drop(other.stdin.take());
        let _ = other.wait();
    }
}

fn resident_bytes() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * PAGE
}

/// Memory that is served, as Firecracker's.
fn served(socket: &str, size: u64) -> (Mapping, UnixStream) {
    const ALIGNED: u64 = 2 << 20;
    let memory = Mapping::anonymous((size + ALIGNED) as usize, Protection::Write).unwrap();
    let base = memory.address().next_multiple_of(ALIGNED);
    let uffd = Uffd::open(features::REMOVE).unwrap();
    uffd.register(base, size).unwrap();
    let region = Region {
        base,
        size,
        offset: 0,
        page_size: PAGE,
    };
    let text = serde_json::to_vec(&[region]).unwrap();
    let stream = UnixStream::connect(socket).unwrap();
    let fds = [uffd.as_fd().as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let data = [IoSlice::new(&text)];
    sendmsg::<UnixAddr>(stream.as_raw_fd(), &data, &rights, MsgFlags::empty(), None).unwrap();
    (memory, stream)
}

fn idle(socket: &str, size: u64) {
    let _memory = served(socket, size);
    let _ = io::stdin().read(&mut [0]);
}

fn client(socket: &str, window: u64, size: u64) {
    let (memory, _stream) = served(socket, size);
    let base = memory.address().next_multiple_of(2 << 20);
    // Waits until it is served, so that the handshake is not measured.
    let touch = |offset: u64| {
        // SAFETY: inside of the mapping, which lives to the end of this function.
        unsafe { ((base + offset) as *const u8).read_volatile() }
    };
    assert_eq!(touch(0), 7);
    let mut took = Vec::with_capacity((size / window) as usize);
    let begin = Instant::now();
    for offset in (window..size).step_by(PAGE as usize) {
        let before = Instant::now();
        let byte = touch(offset);
        let after = before.elapsed();
        if offset % window == 0 {
            took.push(after.as_nanos() as f64 / 1e3);
        }
        assert_eq!(byte, 7);
    }
    let speed = (size - window) as f64 / begin.elapsed().as_micros() as f64;
    took.sort_by(f64::total_cmp);
    let (p50, p99) = (took[took.len() / 2], took[took.len() * 99 / 100]);
    let faults = took.len();
    println!(
        "{{\"window_bytes\":{window},\"faults\":{faults},\"p50_us\":{p50:.2},\"p99_us\":{p99:.2},\
         \"mb_per_s\":{speed:.0}}}"
    );
}
