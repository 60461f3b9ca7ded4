//! Files of a real FUSE mount whose builds lie behind a medium with latency.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use diapause_pager::clients::{Client, ClientText, Clients};
use diapause_pager::fuse::Fuse;
use diapause_pager::nodes::{Nodes, Open};
use diapause_pager::prefetch;
use diapause_pager::process::Process;
use diapause_pager::server::{Keeps, Server};
use diapause_pager::spec::{BlobsSpec, DeviceSpec};
use diapause_pager::trace::{Trace, GRANULE};
use diapause_pager::wire::Init;
use support::server::{Act, Server as Peer};
use support::{pages, Dice, World};

/// Longer than a machine that is busy takes for anything.
const LONG: Duration = Duration::from_secs(60);

/// Nobody keeps anything beyond this process.
struct Nobody;

impl Keeps for Nobody {
    fn greeted(&self, _: &Init) {}
    fn killed(&self, _: &str) {}
    fn ended(&self) {}
}

/// A mount whose files this process serves.
struct Mounted(Arc<Server>);

impl Mounted {
    fn new(files: &[(&str, &DeviceSpec)]) -> Self {
        Self::with(files, LONG, Open::default())
    }

    fn with(files: &[(&str, &DeviceSpec)], bound: Duration, open: Open) -> Self {
        let nodes = Nodes::take_up(std::iter::empty(), 0);
        for (name, spec) in files {
            nodes.put(name, nodes.plan(name, spec).unwrap());
        }
        let fuse = Fuse::mount().unwrap();
        let mut server = Server::new(fuse, nodes, Clients::default(), bound, Arc::new(Nobody));
        server.open = open;
        let server = Arc::new(server);
        server.start().unwrap();
        Self(server)
    }

    /// Where other processes open a file as well.
    fn path(&self, name: &str) -> PathBuf {
        let (pid, mount) = (std::process::id(), self.0.fuse.mount_fd().as_raw_fd());
        format!("/proc/{pid}/fd/{mount}/{name}").into()
    }

    /// Brings all of a file ahead and waits for it.
    fn bring(&self, world: &World, name: &str) {
        let size_bytes = world.spec.size_bytes;
        assert_eq!(fs::metadata(self.path(name)).unwrap().len(), size_bytes);
        let granules: Vec<u32> = (0..size_bytes.div_ceil(GRANULE) as u32).collect();
        let trace = world.directory.path().join("trace");
        let known = Trace::empty(size_bytes).with(&[], &granules);
        known.write(&trace).unwrap();
        let node = self.0.nodes.find(name).unwrap();
        let bytes = prefetch::begin(&self.0, &node, &trace, u64::MAX).unwrap();
        assert_eq!(bytes, size_bytes);
        until(|| self.0.seen.of(name).stored_bytes >= bytes);
        assert_eq!(self.0.seen.of(name).stored_bytes, bytes);
    }
}

/// A process that reads 64 KiB of a file: one that waits must not be of the process that serves.
struct Reader {
    process: Child,
    at: usize,
}

impl Reader {
    fn start(mounted: &Mounted, name: &str, granule: usize) -> Self {
        let mut command = Command::new("dd");
        command
            .arg(format!("if={}", mounted.path(name).display()))
            .args(["bs=64K", "count=1", "status=none"])
            .arg(format!("skip={granule}"));
        let process = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self {
            process: process.spawn().unwrap(),
            at: granule * GRANULE as usize,
        }
    }

    /// Whether it waits for a page.
    fn waits(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap();
        stat.rsplit(") ").next().unwrap().starts_with('D')
    }

    /// It reads what the device has.
    fn check(self, world: &World) {
        let output = self.process.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", self.at);
        let expected = &world.expected[self.at..self.at + GRANULE as usize];
        assert!(output.stdout == expected, "at {}", self.at);
    }
}

fn until(there: impl Fn() -> bool) {
    let began = Instant::now();
    while !there() {
        assert!(began.elapsed() < LONG, "it did not come to that");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What serves a world's builds, and the world's device by way of it.
fn far(world: &World) -> (Peer, DeviceSpec) {
    let peer = Peer::new(world.builds_directory());
    let blobs = BlobsSpec::Http {
        url: peer.url(),
        fallback: None,
    };
    let spec = DeviceSpec {
        blobs,
        ..world.spec.clone()
    };
    (peer, spec)
}

#[test]
fn what_is_brought_ahead_is_the_device_whatever_it_is_made_of() {
    for seed in 1..5 {
        let world = World::new(seed, 2000, 7, seed % 2 == 0);
        let (peer, spec) = far(&world);
        peer.always(Act::Slow(Duration::from_millis(2)));
        let mounted = Mounted::new(&[("memory", &spec)]);
        mounted.bring(&world, "memory");
        let found = fs::read(mounted.path("memory")).unwrap();
        assert!(found == world.expected, "seed {seed}");
        let reads = mounted.0.seen.of("memory").reads;
        assert!(reads.is_empty(), "{reads:?} were not brought ahead");
    }
}

#[test]
fn what_is_brought_ahead_is_asked_for_once_and_in_large_pieces() {
    let world = World::straight(pages(6000, &mut Dice::new(1)));
    let (peer, spec) = far(&world);
    let mounted = Mounted::new(&[("memory", &spec)]);
    mounted.bring(&world, "memory");
    // The table, and 375 frames by 32.
    assert_eq!(peer.requests().len(), 1 + 12, "{:?}", peer.requests());
    assert!(fs::read(mounted.path("memory")).unwrap() == world.expected);
}

#[test]
fn a_peer_that_is_late_is_asked_for_less_at_once_and_for_all_of_it() {
    let world = World::straight(pages(6000, &mut Dice::new(5)));
    let (peer, spec) = far(&world);
    // The first six of the twelve; the others find that only few may be at it.
    let late = Duration::from_millis(1200);
    peer.act(move |request, _| match request {
        1..=6 => Act::Slow(late),
        _ => Act::Serve,
    });
    let open = Open::waiting_at_most(LONG);
    let mounted = Mounted::with(&[("memory", &spec)], LONG, open);
    mounted.bring(&world, "memory");
    let ranges: HashSet<String> = peer.requests().into_iter().map(|r| r.1).collect();
    assert_eq!(ranges.len(), 1 + 12, "{ranges:?}");
    assert!(fs::read(mounted.path("memory")).unwrap() == world.expected);
}

#[test]
fn a_build_that_lies_is_not_brought_ahead() {
    let world = World::straight(pages(600, &mut Dice::new(2)));
    let (peer, spec) = far(&world);
    peer.act(|request, _| match request {
        0 => Act::Serve,
        1 => Act::Lie,
        _ => Act::Slow(Duration::from_millis(5)),
    });
    let mounted = Mounted::new(&[("memory", &spec)]);
    fs::metadata(mounted.path("memory")).unwrap();
    let trace = world.directory.path().join("trace");
    let known = Trace::empty(world.spec.size_bytes).with(&[], &[0, 1, 30]);
    known.write(&trace).unwrap();
    let node = mounted.0.nodes.find("memory").unwrap();
    prefetch::begin(&mounted.0, &node, &trace, u64::MAX).unwrap();
    until(|| peer.requests().len() >= 2);
    assert!(fs::read(mounted.path("memory")).unwrap() == world.expected);
}

/// Eight readers of a device whose peer says nothing, of other places each.
fn eight(mounted: &Mounted) -> Vec<Reader> {
    let readers = (0..8).map(|number| Reader::start(mounted, "far", number * 10));
    readers.collect()
}

#[test]
fn a_silent_peer_holds_up_nobody_elses_reads() {
    let [world, near] = [1, 2].map(|seed| World::straight(pages(1500, &mut Dice::new(seed))));
    let (peer, spec) = far(&world);
    peer.always(Act::Hang);
    // Nothing that waits for the peer fails by itself before the peer's requests do.
    let files = [("far", &spec), ("near", &near.spec), ("other", &near.spec)];
    let mounted = Mounted::with(&files, LONG, Open::waiting_at_most(LONG));
    let readers = eight(&mounted);
    until(|| !peer.requests().is_empty() && readers.iter().all(Reader::waits));
    assert!(fs::read(mounted.path("near")).unwrap() == near.expected);
    assert_eq!(
        fs::metadata(mounted.path("other")).unwrap().len(),
        near.spec.size_bytes
    );
    let missing = fs::metadata(mounted.path("no such")).unwrap_err();
    assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);
    // Not one of the eight had been given up when all of that was answered.
    assert!(readers.iter().all(Reader::waits));
    assert_eq!(mounted.0.seen.of("far").stalls, 0);
    // One fetch for all of them: of the table, which is tried again as often as one read may.
    assert!(peer
        .requests()
        .iter()
        .all(|(_, range)| range.starts_with("bytes=-")));
    peer.always(Act::Serve);
    readers.into_iter().for_each(|reader| reader.check(&world));
}

#[test]
fn what_is_tried_again_waits_for_no_silent_peer() {
    let [world, near] = [3, 4].map(|seed| World::straight(pages(1500, &mut Dice::new(seed))));
    let (peer, spec) = far(&world);
    peer.always(Act::Hang);
    let hidden = near.directory.path().join("hidden");
    fs::rename(near.build_file(0), &hidden).unwrap();
    let files = [("far", &spec), ("near", &near.spec)];
    // Less than eight tries of the silent peer take one after the other.
    let bound = Duration::from_secs(10);
    let mounted = Mounted::with(&files, bound, Open::default());
    let readers = eight(&mounted);
    until(|| mounted.0.seen.of("far").stalls == 8);
    // As a VMM is, it is killed when the bound comes.
    let reader = Reader::start(&mounted, "near", 3);
    let text = ClientText {
        pid: reader.process.id() as i32,
        files: vec!["near".to_owned()],
        killed: None,
        handed: false,
    };
    let handle = Process::open(text.pid).unwrap();
    mounted.0.clients.add(Client::new("vm", text, handle));
    until(|| mounted.0.seen.of("near").stalls == 1);
    fs::rename(&hidden, near.build_file(0)).unwrap();
    reader.check(&near);
    for mut reader in readers {
        reader.process.kill().unwrap();
        reader.process.wait().unwrap();
    }
    until(|| mounted.0.held.since(Duration::ZERO).is_empty());
}

/// Reads a file in calls of so many bytes, at these offsets, by descriptors of its own.
fn read_at(path: &PathBuf, offsets: impl Iterator<Item = usize>, length: usize, world: &World) {
    let file = fs::File::open(path).unwrap();
    let mut found = vec![0; length];
    for offset in offsets {
        let count = file.read_at(&mut found, offset as u64).unwrap();
        let end = world.expected.len().min(offset + length);
        let expected = &world.expected[offset.min(end)..end];
        assert!(found[..count] == *expected, "at {offset}");
    }
}

/// Who reads on, backward, in strides and at random, all at once.
fn read_in_every_way(mounted: &Mounted, name: &str, world: &World) {
    const CALL: usize = 96 << 10;
    let (path, calls) = (mounted.path(name), world.expected.len().div_ceil(CALL));
    std::thread::scope(|scope| {
        let (path, backward) = (&path, (0..calls).rev().map(|at| at * CALL));
        scope.spawn(move || read_at(path, (0..calls).map(|at| at * CALL), CALL, world));
        scope.spawn(move || read_at(path, (calls / 2..calls).map(|at| at * CALL), CALL, world));
        scope.spawn(move || read_at(path, backward, CALL, world));
        scope.spawn(move || read_at(path, (0..calls).step_by(3).map(|at| at * CALL), CALL, world));
        let (mut dice, end) = (Dice::new(5), world.expected.len() as u64);
        let random = std::iter::repeat_with(move || dice.below(end) as usize);
        scope.spawn(move || read_at(path, random.take(100), 5000, world));
    });
}

#[test]
fn whoever_reads_in_whatever_way_reads_the_device() {
    for seed in 1..4 {
        let world = match seed {
            1 => World::straight(pages(6000, &mut Dice::new(seed))),
            _ => World::new(seed, 4000, 5, seed % 2 == 0),
        };
        let (peer, far) = far(&world);
        peer.act(move |request, _| match request as u64 % 7 {
            // Found, and asked for again.
            3 => Act::CutAfter(100_000),
            5 => Act::Lie,
            _ => Act::Slow(Duration::from_millis(request as u64 % 5)),
        });
        let mounted = Mounted::new(&[("far", &far), ("near", &world.spec)]);
        read_in_every_way(&mounted, "near", &world);
        read_in_every_way(&mounted, "far", &world);
        assert_eq!(mounted.0.seen.of("near").ahead_bytes, 0);
    }
}

#[test]
fn what_follows_a_run_is_asked_for_once_and_is_there_when_it_is_read() {
    let world = World::straight(pages(16_000, &mut Dice::new(6)));
    let (peer, spec) = far(&world);
    peer.always(Act::Slow(Duration::from_millis(5)));
    let mounted = Mounted::new(&[("memory", &spec)]);
    let calls = world.expected.len().div_ceil(1 << 17);
    read_at(
        &mounted.path("memory"),
        (0..calls).map(|at| at << 17),
        1 << 17,
        &world,
    );
    let seen = mounted.0.seen.of("memory");
    assert!(seen.ahead_bytes > world.spec.size_bytes / 2, "{seen:?}");
    let mut ranges: Vec<_> = peer
        .requests()
        .into_iter()
        .map(|(_, range)| range)
        .collect();
    let count = ranges.len();
    ranges.sort_unstable();
    ranges.dedup();
    assert_eq!(ranges.len(), count, "{ranges:?}");
}

#[test]
fn nothing_is_asked_for_ahead_of_a_reader_who_waits_for_a_damaged_frame() {
    let world = World::straight(pages(16_000, &mut Dice::new(7)));
    let (peer, spec) = far(&world);
    let path = world.build_file(0);
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    let middle = good.len() / 2;
    bad[middle] ^= 1;
    fs::write(&path, &bad).unwrap();
    let mounted = Mounted::new(&[("memory", &spec)]);
    let file = mounted.path("memory");
    std::thread::scope(|scope| {
        let calls = world.expected.len().div_ceil(1 << 17);
        let (file, world) = (&file, &world);
        scope.spawn(move || read_at(file, (0..calls).map(|at| at << 17), 1 << 17, world));
        until(|| mounted.0.seen.of("memory").stalls > 0);
        let most = mounted.0.seen.of("memory").ahead_bytes;
        let tried = peer.requests().len();
        until(|| peer.requests().len() > tried + 2); // it is tried again, and no more than that
        assert_eq!(mounted.0.seen.of("memory").ahead_bytes, most);
        assert!(most < world.spec.size_bytes * 3 / 4, "{most}");
        fs::write(&path, &good).unwrap();
    });
}
