//! How fast a file of the pager is read from first to last, beside the least that could be done.
//!
//! `fuse_speed PEER [MIB [ROUNDS [READAHEAD_KIB]]]` makes one device of frames that are stored as
//! they are and one of compressed frames, warms the builds in the page cache, and reads each
//! through a FUSE file in calls of 1 MiB, with a cold page cache of that file. Each server is a
//! process of its own, as the pager is. A line of JSON for each round, the ways in turn:
//!
//! - `pager`: the pager's server over the build.
//! - `bare`: PEER (`benchmarks/peers/fuse_loop.c`) over the same bytes in a flat file.
//! - `zstd`: no FUSE: the compressed frames decoded by as many threads as the pager answers READs
//!   with, or as there are processors.
//!
//! `fuse_speed serve SPEC DESCRIPTORS…` is the process that serves.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::hint::black_box;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

mod cases;

use cases::{make, noise, words, Case};
use diapause_format::FRAME_BYTES;
use diapause_pager::clients::Clients;
use diapause_pager::frames::bound_malloc;
use diapause_pager::fuse::{Fuse, READERS};
use diapause_pager::nodes::Nodes;
use diapause_pager::server::{Keeps, Server};
use diapause_pager::spec::DeviceSpec;
use diapause_pager::wire::Init;
use nix::fcntl::{fcntl, posix_fadvise, FcntlArg, FdFlag, PosixFadviseAdvice};

/// Bytes of one read.
const CALL: usize = 1 << 20;
const NAME: &str = "memory";

/// Nobody keeps anything beyond this process.
struct Nobody;

impl Keeps for Nobody {
    fn greeted(&self, _: &Init) {}
    fn killed(&self, _: &str) {}
    fn ended(&self) {
        std::process::exit(0);
    }
}

fn serve(spec: &str, descriptors: impl Iterator<Item = String>) {
    bound_malloc();
    // SAFETY: only numbers are passed.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let spec: DeviceSpec = serde_json::from_str(spec).unwrap();
    // SAFETY: whoever started this process has passed these descriptors on for it alone.
    let owned = |number: String| unsafe { OwnedFd::from_raw_fd(number.parse().unwrap()) };
    let fuse = Fuse::from_descriptors(descriptors.map(owned).collect()).unwrap();
    let nodes = Nodes::take_up(std::iter::empty(), 0);
    nodes.put(NAME, nodes.plan(NAME, &spec).unwrap());
    let bound = Duration::from_secs(10);
    let server = Server::new(fuse, nodes, Clients::default(), bound, Arc::new(Nobody));
    Arc::new(server).start().unwrap();
    loop {
        std::thread::park();
    }
}

/// A process that serves, and the file to read; it ends with us.
struct Served {
    process: Child,
    file: File,
}

impl Served {
    /// Mounts, has `command` serve it with the descriptors' numbers behind its arguments.
    fn start(mut command: Command, with_mount: bool, readahead_kib: u32) -> Self {
        let fuse = Fuse::mount().unwrap();
        for fd in fuse.descriptors().skip(usize::from(!with_mount)) {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
            command.arg(fd.as_raw_fd().to_string());
        }
        let process = command.spawn().unwrap();
        let mount = fuse.mount_fd().try_clone().unwrap();
        let path = format!("/proc/self/fd/{}/{NAME}", mount.as_raw_fd());
        // From here on nobody but the process has the device: its death ends every read.
        let number = device_of(&fuse);
        drop(fuse);
        File::open(&path).unwrap();
        let sysfs = format!("/sys/class/bdi/{number}/read_ahead_kb");
        std::fs::write(sysfs, readahead_kib.to_string()).unwrap();
        let file = File::open(&path).unwrap();
        Self { process, file }
    }

    /// Reads all of it with nothing of it in the page cache; bytes a second.
    fn read(&mut self) -> f64 {
        posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        self.file.seek(SeekFrom::Start(0)).unwrap();
        let (mut buffer, mut bytes) = (vec![0; CALL], 0);
        let began = Instant::now();
        loop {
            match self.file.read(&mut buffer).unwrap() {
                0 => return bytes as f64 / began.elapsed().as_secs_f64(),
                length => bytes += length,
            }
            black_box(&buffer);
        }
    }

    /// Compares every byte.
    fn check(&mut self, flat: &Path) {
        let (mut flat, mut ours, mut theirs) =
            (File::open(flat).unwrap(), vec![0; CALL], vec![0; CALL]);
        self.file.seek(SeekFrom::Start(0)).unwrap();
        loop {
            let length = self.file.read(&mut ours).unwrap();
            flat.read_exact(&mut theirs[..length]).unwrap();
            assert!(ours[..length] == theirs[..length], "other bytes");
            if length == 0 {
                assert_eq!(flat.read(&mut theirs).unwrap(), 0);
                return;
            }
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// What sysfs calls the mount; asks no server.
fn device_of(fuse: &Fuse) -> String {
    let (major, minor) = fuse.device_number().unwrap();
    format!("{major}:{minor}")
}

/// The device as a flat file, read frame by frame.
fn flat(case: &Case, directory: &Path) -> PathBuf {
    let path = directory.join(format!("{}.flat", case.name));
    let mut to = File::create(&path).unwrap();
    let (mut decoder, mut stored) = (zstd::bulk::Decompressor::new().unwrap(), Vec::new());
    for number in 0..case.table.frame_count() {
        let entry = case.table.frame(number);
        stored.resize(entry.length as usize, 0);
        case.file.read_exact_at(&mut stored, entry.offset).unwrap();
        match entry.compressed {
            true => to.write_all(&decoder.decompress(&stored, FRAME_BYTES).unwrap()),
            false => to.write_all(&stored),
        }
        .unwrap();
    }
    to.sync_all().unwrap(); // what is written back meanwhile would cost one of the two
    path
}

/// Reads and decodes all frames on so many threads, in windows of [`CALL`]; bytes a second.
fn decode(case: &Case, threads: usize) -> f64 {
    let (next, window) = (AtomicU64::new(0), (CALL / FRAME_BYTES) as u64);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut decoder = zstd::bulk::Decompressor::new().unwrap();
                let (mut stored, mut pages) = (vec![0; CALL], vec![0; CALL]);
                loop {
                    let first = next.fetch_add(window, Ordering::Relaxed);
                    let end = (first + window).min(case.table.frame_count());
                    if first >= end {
                        return;
                    }
                    let (from, last) = (case.table.frame(first), case.table.frame(end - 1));
                    let length = last.offset + u64::from(last.length) - from.offset;
                    let mut rest = &mut stored[..length as usize];
                    case.file.read_exact_at(rest, from.offset).unwrap();
                    for (number, to) in (first..end).zip(pages.chunks_mut(FRAME_BYTES)) {
                        let entry = case.table.frame(number);
                        let (frame, later) = rest.split_at_mut(entry.length as usize);
                        decoder.decompress_to_buffer(&*frame, to).unwrap();
                        rest = later;
                    }
                    black_box(&pages);
                }
            });
        }
    });
    case.spec.size_bytes as f64 / began.elapsed().as_secs_f64()
}

fn tell(case: &Case, way: &str, bytes_per_s: f64) {
    let mib_per_s = (bytes_per_s / 1048576.0).round();
    let line = serde_json::json!({"frames": case.name, "way": way, "mib_per_s": mib_per_s});
    println!("{line}");
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let peer = arguments.next().expect("which peer");
    if peer == "serve" {
        return serve(&arguments.next().unwrap(), arguments);
    }
    let mut number = |default: u32| arguments.next().map_or(default, |n| n.parse().unwrap());
    let (mib, rounds, readahead_kib) = (number(512), number(5), number(1024));
    let there = std::thread::available_parallelism().unwrap().get();
    let threads = there.min(READERS); // as many as answer READs
    let directory = tempfile::tempdir().unwrap();
    for (name, page) in [
        ("raw", noise as fn(u64, &mut Vec<u8>)),
        ("compressed", words),
    ] {
        let case = make(name, directory.path(), mib.into(), page);
        let flat = flat(&case, directory.path());
        let mut ours = Command::new("/proc/self/exe");
        ours.arg("serve");
        ours.arg(serde_json::to_string(&case.spec).unwrap());
        let mut ours = Served::start(ours, true, readahead_kib);
        let mut bare = Command::new(&peer);
        bare.arg(&flat);
        let mut bare = Served::start(bare, false, readahead_kib);
        ours.check(&flat);
        bare.check(&flat);
        for _ in 0..rounds {
            tell(&case, "pager", ours.read());
            tell(&case, "bare", bare.read());
            if name == "compressed" {
                tell(&case, "zstd", decode(&case, threads));
            }
        }
    }
}
