//! Files of a real FUSE mount whose builds lie behind a medium with latency.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use diapause_pager::clients::Clients;
use diapause_pager::fuse::Fuse;
use diapause_pager::nodes::Nodes;
use diapause_pager::prefetch;
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
        let nodes = Nodes::take_up(std::iter::empty(), 0);
        for (name, spec) in files {
            nodes.put(name, nodes.plan(name, spec).unwrap());
        }
        let fuse = Fuse::mount().unwrap();
        let server = Server::new(fuse, nodes, Clients::default(), LONG, Arc::new(Nobody));
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
