//! How fast a file of the pager is that is passed through, beside the file behind it.
//!
//! `passed_speed [MIB [ROUNDS]]` makes one file, which lies in the page cache, and reaches it by
//! its own name (`plain`) and through the pager (`passed`), in turn. A line of JSON for each:
//!
//! - `read`: all of it from first to last, in calls of 1 MiB.
//! - `touch`: every page once in random order, by a private mapping made for it, as a VMM's.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::hint::black_box;
use std::io::{Read, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{mpsc, Arc};
use std::time::{Duration, Instant};

mod cases;

use cases::noise;
use diapause_pager::clients::Clients;
use diapause_pager::fuse::Fuse;
use diapause_pager::nodes::{Nodes, Passed};
use diapause_pager::server::{Keeps, Server};
use diapause_pager::spec::{BlobsSpec, DeviceSpec};
use diapause_pager::wire::Init;
use nix::sys::mman::{madvise, mmap, munmap, MapFlags, MmapAdvise, ProtFlags};

const CALL: usize = 1 << 20;
const PAGE: usize = 4096;
const NAME: &str = "memory";

/// Says when the kernel has greeted; nobody keeps anything.
struct Greeted(mpsc::Sender<()>);

impl Keeps for Greeted {
    fn greeted(&self, _: &Init) {
        self.0.send(()).unwrap();
    }
    fn killed(&self, _: &str) {}
    fn ended(&self) {}
}

/// The file as the pager's; its server, which is asked for nothing but the open.
fn passed(plain: &File) -> (Arc<Server>, File) {
    let found = plain.metadata().unwrap();
    let nodes = Nodes::take_up(std::iter::empty(), 0);
    let spec = DeviceSpec {
        size_bytes: found.len(),
        header: "nowhere".into(),
        header_digest: "0".repeat(64),
        blobs: BlobsSpec::directory("/nowhere"),
        captures: Vec::new(),
    };
    nodes.put(NAME, nodes.plan(NAME, &spec).unwrap());
    let (greeted, wait) = mpsc::channel();
    let (fuse, bound) = (Fuse::mount().unwrap(), Duration::from_secs(10));
    let keeps = Arc::new(Greeted(greeted));
    let server = Server::new(fuse, nodes, Clients::default(), bound, keeps);
    let server = Arc::new(server);
    server.start().unwrap();
    wait.recv_timeout(bound).unwrap();
    let to = Passed {
        number: server.nodes.last() + 1,
        backing: server.fuse.show(plain.as_fd()).unwrap(),
        place: (found.dev(), found.ino()),
        modified: (found.mtime() as u64, found.mtime_nsec() as u32),
    };
    server.nodes.pass(NAME, Some(to));
    let mount = server.fuse.mount_fd().as_raw_fd();
    let file = File::open(format!("/proc/self/fd/{mount}/{NAME}")).unwrap();
    (server, file)
}

/// From first to last; microseconds for a MiB.
fn read(file: &mut File) -> f64 {
    file.seek(SeekFrom::Start(0)).unwrap();
    let (mut buffer, mut bytes) = (vec![0; CALL], 0);
    let began = Instant::now();
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return began.elapsed().as_secs_f64() * 1e6 / (bytes >> 20) as f64,
            length => bytes += length,
        }
        black_box(&buffer);
    }
}

/// Every page once, in an order that no readahead knows; microseconds for a MiB.
fn touch(file: &File) -> f64 {
    let length = file.metadata().unwrap().len() as usize;
    let size = NonZeroUsize::new(length).unwrap();
    let (readable, private) = (ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE);
    // SAFETY: a mapping of our own, at a place that the kernel chooses, unmapped below.
    let memory = unsafe { mmap(None, size, readable, private, file, 0) }.unwrap();
    // SAFETY: advice on that mapping changes nothing that is read.
    unsafe { madvise(memory, length, MmapAdvise::MADV_RANDOM) }.unwrap();
    let pages = length / PAGE;
    assert!(pages.is_power_of_two(), "the order would miss pages");
    let began = Instant::now();
    let mut page = 1;
    for _ in 0..pages {
        page = (page * 5 + 12345) % pages; // each value once
        let at = page * PAGE;
        // SAFETY: inside the mapping, which is readable and of a file that keeps its size.
        black_box(unsafe { memory.cast::<u8>().add(at).read_volatile() });
    }
    let took = began.elapsed();
    // SAFETY: the mapping that was made above, which nobody uses any more.
    unsafe { munmap(memory, length) }.unwrap();
    took.as_secs_f64() * 1e6 / (length >> 20) as f64
}

fn make(path: &Path, mib: u64) -> File {
    let mut file = File::create(path).unwrap();
    let mut page = Vec::new();
    for number in 0..mib * 256 {
        page.clear();
        noise(number, &mut page);
        file.write_all(&page).unwrap();
    }
    file.sync_all().unwrap(); // what is written back meanwhile would cost one of the two
    File::open(path).unwrap()
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: u64| arguments.next().map_or(default, |n| n.parse().unwrap());
    let (mib, rounds) = (number(512), number(7));
    let directory = tempfile::tempdir_in(".").unwrap(); // of a disk: no tmpfs, no overlay
    let plain = make(&directory.path().join("flat"), mib);
    let (_server, through) = passed(&plain);
    let mut ways = [("passed", through), ("plain", plain)];
    for _ in 0..=rounds {
        for (way, file) in &mut ways {
            for (what, us_per_mib) in [("read", read(file)), ("touch", touch(file))] {
                let line = serde_json::json!({"what": what, "way": way, "us_per_mib": us_per_mib});
                println!("{line}");
            }
        }
        ways.reverse();
    }
}
