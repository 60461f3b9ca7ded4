//! A VMM as tests need it, and a server to be killed: `uffd_peer client …`, `uffd_peer serve`.
//!
//! The client registers real memory, hands it in as Firecracker does and closes its own descriptor.
//! Then it checks its memory under load (`stress`), or does what its input says (`script`).
#![allow(clippy::unwrap_used)]

#[path = "../tests/uffd_support/pattern.rs"]
mod pattern;
#[path = "../tests/uffd_support/source.rs"]
mod source;

use std::io::{self, BufRead, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};
use std::{env, process, thread};

use diapause_pager::packet;
use diapause_pager::uffd::ioctl::{features, Uffd};
use diapause_pager::uffd::memory::Mapping;
use diapause_pager::uffd::{Guest, Kept, Limits, Options, Region, Server, Witness};
use nix::fcntl::{fallocate, FallocateFlags};
use nix::libc;
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags, UnixAddr};
use nix::unistd::ftruncate;
use serde::{Deserialize, Serialize};

const PAGE: u64 = 4096;

fn main() {
    let arguments: Vec<_> = env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("client") => client(&serde_json::from_str(&arguments[1]).unwrap()),
        Some("serve") => serve(),
        _ => panic!("client or serve"),
    }
}

/// What a client does.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Orders {
    socket: String,
    seed: u64,
    /// Bytes of each region.
    regions: Vec<u64>,
    #[serde(default)]
    huge: bool,
    #[serde(default)]
    threads: u64,
    #[serde(default)]
    seconds: f64,
    /// Whether it connects when it is told to only.
    #[serde(default)]
    waits: bool,
    /// `stress`, `script`, or what is to be wrong.
    mode: String,
}

/// Memory, in the order of the device.
#[derive(Debug)]
struct Memory {
    regions: Vec<Region>,
    page_size: u64,
    /// What is behind the first region, where it is a file.
    file: Option<OwnedFd>,
}

impl Memory {
    fn map(orders: &Orders) -> Self {
        let page_size = if orders.huge { 2 << 20 } else { PAGE };
        let (mut offset, mut file) = (0, None);
        let regions = orders.regions.iter().map(|&size| {
            let base = if orders.mode == "file" && file.is_none() {
                let (base, behind) = map_file(size);
                file = Some(behind);
                base
            } else {
                map(size, orders.huge)
            };
            let region = Region {
                base,
                size,
                offset,
                page_size,
            };
            offset += size;
            region
        });
        let regions = regions.collect();
        Self {
            regions,
            page_size,
            file,
        }
    }

    fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.size).sum::<u64>() / PAGE
    }

    /// The address of a small page of the device.
    fn address(&self, page: u64) -> u64 {
        let inside = |region: &&Region| {
            (region.offset..region.offset + region.size).contains(&(page * PAGE))
        };
        let region = self.regions.iter().find(inside).unwrap();
        region.base + (page * PAGE - region.offset)
    }

    fn word(&self, page: u64, at: usize) -> *mut u64 {
        (self.address(page) + at as u64 * 8) as *mut u64
    }

    fn read(&self, page: u64, at: usize) -> u64 {
        // SAFETY: inside of memory that was mapped for this and is never unmapped; others change it
        // at the same time, which a volatile access is for.
        unsafe { self.word(page, at).read_volatile() }
    }

    fn write(&self, page: u64, at: usize, value: u64) {
        // SAFETY: as above.
        unsafe { self.word(page, at).write_volatile(value) }
    }

    /// Makes pages a mapping of their own: they may not be written any more.
    fn split(&self, page: u64, count: u64) {
        let (at, length) = (self.address(page), count * PAGE);
        // SAFETY: the range is ours, and nobody writes to it.
        let result = unsafe { libc::mprotect(at as *mut _, length as usize, libc::PROT_READ) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    /// Takes pages out of the file behind the first region, which no message says.
    fn punch(&self, page: u64, count: u64) {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let file = self.file.as_ref().unwrap();
        fallocate(file, mode, (page * PAGE) as i64, (count * PAGE) as i64).unwrap();
    }

    /// Gives pages back; all of them in one region.
    fn remove(&self, page: u64, count: u64) {
        let (at, length) = (self.address(page), count * PAGE);
        // SAFETY: the range is ours, and nothing of Rust's lies in it.
        let result = unsafe { libc::madvise(at as *mut _, length as usize, libc::MADV_DONTNEED) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }
}

/// Memory of a file that nobody else has.
fn map_file(size: u64) -> (u64, OwnedFd) {
    let file = memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&file, size as i64).unwrap();
    let map = Mapping::shared(&file, size as usize).unwrap();
    let start = map.address();
    // It stays for as long as the process.
    std::mem::forget(map);
    (start, file)
}

fn map(size: u64, huge: bool) -> u64 {
    let huge = if huge { libc::MAP_HUGETLB } else { 0 };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge;
    let both = libc::PROT_READ | libc::PROT_WRITE;
    // A page more on each side, so that two regions never touch.
    let (null, guard) = (std::ptr::null_mut(), if huge == 0 { 2 * PAGE } else { 0 });
    // SAFETY: the kernel chooses the place.
    let start = unsafe { libc::mmap(null, (size + guard) as usize, both, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    start as u64 + guard / 2
}

/// One message, as Firecracker sends it.
fn hand_in(stream: &UnixStream, text: &[u8], fds: &[&dyn AsRawFd]) {
    let numbers: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[][..] } else { &rights };
    let data = [IoSlice::new(text)];
    let none = MsgFlags::empty();
    let sent = sendmsg::<UnixAddr>(stream.as_raw_fd(), &data, control, none, None).unwrap();
    assert_eq!(sent, text.len());
}

fn client(orders: &Orders) {
    let memory = Arc::new(Memory::map(orders));
    let asked = match orders.mode.as_str() {
        "no_remove" => 0,
        "fork" => features::REMOVE | features::FORK,
        _ => features::REMOVE,
    };
    let uffd = Uffd::open(asked).unwrap();
    let unregistered = usize::from(orders.mode == "not_registered");
    for region in &memory.regions[unregistered..] {
        uffd.register(region.base, region.size).unwrap();
    }
    let mut said = memory.regions.clone();
    spoil(&orders.mode, &mut said);
    if orders.waits {
        io::stdin().lock().read_line(&mut String::new()).unwrap();
    }
    let stream = UnixStream::connect(&orders.socket).unwrap();
    hand_in(
        &stream,
        &serde_json::to_vec(&said).unwrap(),
        &[&uffd.as_fd()],
    );
    drop(uffd);
    match orders.mode.as_str() {
        "stress" => stress(orders, &memory),
        _ => script(&memory),
    }
    drop(stream);
}

/// Regions that a server must not believe.
fn spoil(mode: &str, said: &mut Vec<Region>) {
    match mode {
        "overlap" => said.push(said[0]),
        "unaligned" => said[0].base += 512,
        "beyond" => said[0].offset += 1 << 40,
        "page_size" => said[0].page_size = 8192,
        "other_page_size" => {
            for region in said {
                region.page_size = 2 << 20;
                region.base &= !((2 << 20) - 1);
            }
        }
        "hidden" => said.truncate(1),
        _ => {}
    }
}

/// `touch P`, `write P VALUE`, `remove P N`, `split P N`, `punch P N`, `quit`: each answered with a
/// line, in its own time.
fn script(memory: &Arc<Memory>) {
    println!("ready");
    for line in io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        if words[0] == "quit" {
            return;
        }
        let memory = memory.clone();
        thread::spawn(move || {
            let number = |at: usize| words[at].parse::<u64>().unwrap();
            let page = number(1);
            match words[0].as_str() {
                "touch" => {}
                "write" => memory.write(page, 1, number(2)),
                "remove" => memory.remove(page, number(2)),
                "split" => memory.split(page, number(2)),
                "punch" => memory.punch(page, number(2)),
                other => panic!("{other}"),
            }
            match words[0].as_str() {
                "touch" | "write" => println!("page {page} {}", memory.read(page, 1)),
                done => println!("{done} {page}"),
            }
        });
    }
}

/// The state of a page that is never written: these follow each other.
const ORIGINAL: u8 = 0;
const REMOVING: u8 = 1;
const ZERO: u8 = 2;
/// Generations of a page that is written: 0 is the device's, this is zeros.
const ZEROS: u64 = u64::MAX;

/// What each page should be.
struct Model {
    seed: u64,
    memory: Arc<Memory>,
    /// Pages that are only given back, while others read them.
    free: Vec<AtomicU8>,
    /// Pages that are written and given back, by one at a time.
    held: Vec<RwLock<u64>>,
    faults: AtomicU64,
}

impl Model {
    /// Small pages of one state: what can be given back at once.
    fn group(&self) -> u64 {
        (self.memory.page_size / PAGE).max(8)
    }

    fn is_free(&self, page: u64) -> bool {
        page / self.group() % 2 == 0
    }

    fn wrong(&self, page: u64, at: usize, got: u64, allowed: &[u64]) -> ! {
        let device = pattern::word(self.seed, page, at);
        println!(
            "wrong: page {page} word {at} is {got:#x}, {allowed:x?} allowed, device {device:#x}"
        );
        process::exit(1);
    }

    fn check_free(&self, page: u64) {
        for at in 0..pattern::WORDS {
            let state = &self.free[page as usize];
            let before = state.load(Ordering::SeqCst);
            let got = self.memory.read(page, at);
            let after = state.load(Ordering::SeqCst);
            let original = pattern::word(self.seed, page, at);
            let right = match (before, after) {
                (ORIGINAL, ORIGINAL) => got == original,
                (ZERO, _) => got == 0,
                _ => got == original || got == 0,
            };
            if !right {
                self.wrong(
                    page,
                    at,
                    got,
                    &[u64::from(before), u64::from(after), original],
                );
            }
        }
    }

    fn check_held(&self, page: u64) {
        let generation = self.held[page as usize].read().unwrap();
        for at in 0..pattern::WORDS {
            let wanted = match *generation {
                ZEROS => 0,
                0 => pattern::word(self.seed, page, at),
                number => pattern::mix(number ^ page << 32 ^ at as u64),
            };
            let got = self.memory.read(page, at);
            if got != wanted {
                self.wrong(page, at, got, &[*generation, wanted]);
            }
        }
    }

    fn check(&self, page: u64) {
        if self.is_free(page) {
            self.check_free(page);
        } else {
            self.check_held(page);
        }
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives back a range of free pages, while others read them.
    fn remove_free(&self, page: u64, count: u64) {
        let pages = page..page + count;
        for page in pages.clone() {
            let state = &self.free[page as usize];
            let order = Ordering::SeqCst;
            let _ = state.compare_exchange(ORIGINAL, REMOVING, order, order);
        }
        self.memory.remove(page, count);
        for page in pages {
            self.free[page as usize].store(ZERO, Ordering::SeqCst);
        }
    }

    /// Writes the whole of a page.
    fn write_held(&self, page: u64, number: u64) {
        let mut generation = self.held[page as usize].write().unwrap();
        for at in 0..pattern::WORDS {
            let value = pattern::mix(number ^ page << 32 ^ at as u64);
            self.memory.write(page, at, value);
        }
        *generation = number;
    }

    /// Gives back a whole group of pages that nobody else may touch meanwhile.
    fn remove_held(&self, page: u64) {
        let small = self.memory.page_size == PAGE;
        let (first, count) = if small {
            (page, 1)
        } else {
            (page / self.group() * self.group(), self.group())
        };
        let held = first as usize..(first + count) as usize;
        let mut all: Vec<_> = self.held[held]
            .iter()
            .map(|page| page.write().unwrap())
            .collect();
        self.memory.remove(first, count);
        for generation in &mut all {
            **generation = ZEROS;
        }
    }

    fn act(&self, random: &mut u64) {
        let pages = self.memory.pages();
        let page = pattern::next(random) % pages;
        let dice = pattern::next(random) % 100;
        match (self.is_free(page), dice) {
            (true, 0) if self.memory.page_size == PAGE => {
                let left = (self.group() - page % self.group()).min(pages - page);
                self.remove_free(page, pattern::next(random) % left + 1);
            }
            (true, 0) => self.remove_free(page / self.group() * self.group(), self.group()),
            (false, 0..25) => self.write_held(page, pattern::next(random) >> 1 | 1),
            (false, 25..50) => self.remove_held(page),
            _ => self.check(page),
        }
    }
}

fn stress(orders: &Orders, memory: &Arc<Memory>) {
    let pages = memory.pages() as usize;
    let model = Arc::new(Model {
        seed: orders.seed,
        memory: memory.clone(),
        free: (0..pages).map(|_| AtomicU8::new(ORIGINAL)).collect(),
        held: (0..pages).map(|_| RwLock::new(0)).collect(),
        faults: AtomicU64::new(0),
    });
    println!("ready");
    let until = Instant::now() + Duration::from_secs_f64(orders.seconds);
    let threads = (0..orders.threads).map(|number| {
        let model = model.clone();
        let mut random = orders.seed.wrapping_mul(31).wrapping_add(number);
        thread::spawn(move || {
            while Instant::now() < until {
                model.act(&mut random);
            }
        })
    });
    let threads: Vec<_> = threads.collect();
    for thread in threads {
        thread.join().unwrap();
    }
    for page in 0..pages as u64 {
        model.check(page);
    }
    println!("right {}", model.faults.load(Ordering::Relaxed));
}

/// What a server is told in the packet on its standard input; descriptors: memory, VMM, ledger of
/// each VMM.
#[derive(Debug, Serialize, Deserialize)]
struct TakeUp {
    seed: u64,
    size_bytes: u64,
    window_bytes: u64,
    vmms: Vec<Vec<Region>>,
}

#[derive(Debug)]
struct Nobody;

impl Witness for Nobody {}

/// Serves VMMs of a predecessor until it is killed.
fn serve() {
    let packet = packet::receive(io::stdin().as_fd()).unwrap().unwrap();
    let orders: TakeUp = packet.parse().unwrap();
    let server = Server::start(Limits::default()).unwrap();
    let mut fds = packet.fds.into_iter();
    let mut next = || -> OwnedFd { fds.next().unwrap() };
    for regions in orders.vmms {
        let kept = Kept {
            uffd: next(),
            vmm: next(),
            ledger: next(),
            regions,
        };
        let guest = Guest {
            pages: Arc::new(source::Pattern {
                seed: orders.seed,
                size_bytes: orders.size_bytes,
            }),
            witness: Arc::new(Nobody),
            options: Options {
                window_bytes: orders.window_bytes,
                ..Options::default()
            },
        };
        server.take_up(kept, guest).unwrap();
    }
    println!("serving");
    // The end of the packets is the end of whoever started it.
    let _ = packet::receive(io::stdin().as_fd());
}
