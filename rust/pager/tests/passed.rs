//! Files that are passed through, against the real kernel and the real pair of processes: what it
//! does with opens, mappings and numbers that the server says.
#![allow(clippy::unwrap_used)]

#[path = "uffd_support/pair.rs"]
#[allow(dead_code)] // of which these tests need no VMM
mod pair_of_processes;
mod support;
mod uffd_support;

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};
use nix::sys::socket::{connect, socket, AddressFamily, SockFlag, SockType, UnixAddr};
use pair_of_processes::{end, Pair};
use proptest::prelude::*;
use serde_json::{json, Value};
use support::{pages, Dice, World};

const NAME: &str = "one.memory";
const NEVER_MS: u64 = 600_000;

/// A pair that serves a device, a mount of it, and the device as a flat file.
struct Case {
    pair: Pair,
    world: World,
    mount: OwnedFd,
}

impl Case {
    fn new(seed: u64) -> Self {
        let pair = Pair::start(NEVER_MS, NEVER_MS, 1 << 30);
        let world = World::straight(pages(300, &mut Dice::new(seed)));
        pair.put(NAME, &world.spec);
        let mount = mount_of(&pair);
        let case = Self { pair, world, mount };
        fs::write(case.flat(0), &case.world.expected).unwrap();
        case
    }

    fn flat(&self, number: usize) -> PathBuf {
        self.world.directory.path().join(format!("flat{number}"))
    }

    /// A file that holds the same, and is another.
    fn another(&self, number: usize) -> File {
        fs::copy(self.flat(0), self.flat(number)).unwrap();
        File::open(self.flat(number)).unwrap()
    }

    /// Why it is served; null where it is passed through.
    fn pass(&self, to: Option<&File>) -> Value {
        let fds: Vec<_> = to.iter().map(|file| file.as_fd()).collect();
        let pass = json!({"pass": {"name": NAME}});
        self.pair.ask(&pass, &fds).unwrap()["cause"].clone()
    }

    fn open(&self) -> File {
        let mount = self.mount.as_raw_fd();
        File::open(format!("/proc/self/fd/{mount}/{NAME}")).unwrap()
    }

    /// Every byte, by a read and by a mapping that is made for it.
    fn check(&self, file: &File) {
        let mut bytes = vec![0; self.world.expected.len()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == self.world.expected, "other bytes are read");
        let length = self.world.expected.len().try_into().unwrap();
        let (readable, private) = (ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE);
        // SAFETY: a mapping of our own, at a place that the kernel chooses, unmapped below.
        let memory = unsafe { mmap(None, length, readable, private, file, 0) }.unwrap();
        // SAFETY: readable and so long; nobody changes the file behind.
        let mapped =
            unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<u8>(), length.get()) };
        let right = self.world.expected[..] == *mapped;
        // SAFETY: the mapping from above, which nobody uses any more.
        unsafe { munmap(memory, length.get()) }.unwrap();
        assert!(right, "other bytes are mapped");
    }

    fn reads(&self) -> u64 {
        let totals = self.pair.ask(&json!({"totals": {}}), &[]).unwrap();
        let reads = totals["totals"]["reads"].as_object().unwrap().clone();
        reads.values().map(|of| of["count"].as_u64().unwrap()).sum()
    }
}

fn mount_of(pair: &Pair) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let client = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    connect(client.as_raw_fd(), &UnixAddr::new(&pair.socket()).unwrap()).unwrap();
    diapause_pager::packet::send(client.as_fd(), &json!({"hello": {}}), &[]).unwrap();
    let answer = diapause_pager::packet::receive(client.as_fd()).unwrap();
    answer.unwrap().fds.pop().unwrap()
}

fn is_passed(file: &File) -> bool {
    file.metadata().unwrap().mtime() != 0
}

#[test]
fn it_is_the_other_file_for_whoever_opens_it_and_the_server_is_not_asked() {
    let case = Case::new(1);
    let flat = File::open(case.flat(0)).unwrap();
    assert_eq!(case.pass(Some(&flat)), Value::Null);
    let opened: Vec<File> = (0..3).map(|_| case.open()).collect();
    end(case.pair.pids().0);
    for file in &opened {
        assert!(is_passed(file));
        case.check(file);
    }
    fs::remove_file(case.flat(0)).unwrap();
    drop(flat);
    let later = case.open(); // by the next pager, to a file that has no name any more
    assert!(is_passed(&later));
    case.check(&later);
    assert_eq!(case.reads(), 0);
}

#[test]
fn a_file_of_another_size_is_refused_also_when_it_is_cut_between() {
    let case = Case::new(2);
    let flat = case.another(1);
    File::options()
        .write(true)
        .open(case.flat(1))
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert_eq!(case.pass(Some(&flat)), "it has another size");
    assert!(!is_passed(&case.open()));
    case.check(&case.open());
    assert!(case.reads() > 0);
}

/// What is done to the pair and its file, in any order.
#[derive(Debug, Clone, Copy)]
enum Step {
    Pass(usize),
    Serve,
    Open,
    Close(usize),
    KillPager,
    KillKeeper,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0usize..3).prop_map(Step::Pass),
        1 => Just(Step::Serve),
        5 => Just(Step::Open),
        2 => any::<usize>().prop_map(Step::Close),
        1 => Just(Step::KillPager),
        1 => Just(Step::KillKeeper),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 32,
        max_shrink_iters: 0, // what is done to processes is not done twice the same
        ..ProptestConfig::default()
    })]

    /// Whoever has it open, and as what: every open succeeds, is what was said last, and reads
    /// right for ever.
    #[test]
    fn opens_and_changes_in_any_order(steps in prop::collection::vec(step(), 1..40)) {
        let case = Case::new(3);
        let flats: Vec<File> = (1..4).map(|number| case.another(number)).collect();
        let (mut open, mut passed): (Vec<(File, bool)>, bool) = (Vec::new(), false);
        for step in steps {
            match step {
                Step::Pass(which) => {
                    prop_assert_eq!(case.pass(Some(&flats[which])), Value::Null);
                    passed = true;
                }
                Step::Serve => {
                    prop_assert!(case.pass(None).is_string());
                    passed = false;
                }
                Step::Open => {
                    let file = case.open();
                    prop_assert_eq!(is_passed(&file), passed);
                    open.push((file, passed));
                }
                Step::Close(which) if !open.is_empty() => {
                    open.swap_remove(which % open.len());
                }
                Step::Close(_) => {}
                Step::KillPager => end(case.pair.pids().0),
                Step::KillKeeper => end(case.pair.pids().1),
            }
        }
        for (file, was_passed) in &open {
            prop_assert_eq!(is_passed(file), *was_passed);
            case.check(file);
        }
    }
}
