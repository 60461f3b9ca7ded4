//! A server that is killed, again and again, and replaced: the VMM waits and never sees a wrong
//! byte. This test is the keeper, which holds what a successor needs.
#![allow(clippy::unwrap_used)]

mod uffd_support;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use diapause_pager::packet;
use diapause_pager::uffd::ioctl::{event, Uffd};
use diapause_pager::uffd::ledger::{Fact, Ledger};
use diapause_pager::uffd::{Guest, Kept, Limits, Options, Regions, Server};
use nix::fcntl::{Flock, FlockArg};
use nix::libc::SIGKILL;
use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
use serde_json::json;
use uffd_support::{pattern, peer_program, Client, House, Notes, Ruled, LONG};

const MIB: u64 = 1 << 20;

/// VMMs that were let in, and the server that did so is gone without having served them.
fn kept(orders: &serde_json::Value, count: usize) -> (Vec<Kept>, Vec<Client>) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("uffd.sock");
    let (sender, receiver) = channel();
    let house = Door {
        house: House {
            pages: Ruled::new(orders["seed"].as_u64().unwrap(), size(orders)),
            notes: Arc::default(),
            options: Options::default(),
            kept: Some(sender),
        },
    };
    let listener = UnixListener::bind(&socket).unwrap();
    let clients = (0..count).map(|_| Client::start(&socket, orders));
    let clients: Vec<_> = clients.collect();
    let taken = (0..count).map(|_| house.admit(&listener, &receiver));
    (taken.collect(), clients)
}

/// Lets VMMs in by hand: what a keeper gets of each.
struct Door {
    house: House,
}

impl Door {
    fn admit(&self, listener: &UnixListener, receiver: &std::sync::mpsc::Receiver<Kept>) -> Kept {
        use diapause_pager::uffd::handshake::Pending;
        use diapause_pager::uffd::session::Session;
        use diapause_pager::uffd::Host;
        let (stream, _) = listener.accept().unwrap();
        let pages = self.house.pages.clone();
        let host = Arc::new(House {
            pages,
            notes: Arc::default(),
            options: self.house.options,
            kept: None,
        });
        let mut pending = Pending::new(stream, host, Duration::from_secs(60)).unwrap();
        let list = loop {
            if let Some(list) = pending.advance().unwrap() {
                break list;
            }
            thread::yield_now();
        };
        let (offer, _) = pending.accept(list).unwrap();
        let ledger = Ledger::create(offer.regions.pages()).unwrap();
        let session = Session::new(1, offer.pid, offer.vmm, offer.regions, ledger, None);
        self.house.admitted(1, &session.keep()).unwrap();
        // Its end would be the VMM's; the process that dies does not get there either.
        std::mem::forget(session);
        receiver.recv().unwrap()
    }
}

fn size(orders: &serde_json::Value) -> u64 {
    let regions = orders["regions"].as_array().unwrap();
    regions.iter().map(|size| size.as_u64().unwrap()).sum()
}

/// A server process that takes up VMMs; killed at the end, which its VMMs survive.
struct ServerProcess {
    child: Child,
    _control: OwnedFd,
}

impl ServerProcess {
    fn start(kept: &[Kept], orders: &serde_json::Value, window_bytes: u64) -> Self {
        let kind = SockType::SeqPacket;
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        let what = json!({"seed": orders["seed"], "size_bytes": size(orders),
            "window_bytes": window_bytes,
            "vmms": kept.iter().map(|kept| &kept.regions).collect::<Vec<_>>()});
        let fds = kept
            .iter()
            .flat_map(|kept| [&kept.uffd, &kept.vmm, &kept.ledger]);
        let fds: Vec<BorrowedFd<'_>> = fds.map(AsFd::as_fd).collect();
        packet::send(ours.as_fd(), &what, &fds).unwrap();
        let mut child = Command::new(peer_program())
            .arg("serve")
            .stdin(theirs)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let output = child.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        assert_eq!(line, "serving\n");
        Self {
            child,
            _control: ours,
        }
    }

    /// Dead with all of its threads: only then may another take up its VMMs.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn servers_that_die_at_any_moment_are_replaced_and_nothing_is_wrong() {
    for seed in 0..3_u64 {
        let orders = json!({"seed": seed, "regions": [16 * MIB, 4 * MIB + 12288], "mode": "stress",
            "threads": 3, "seconds": 2.5});
        let (kept, mut clients) = kept(&orders, 2);
        let mut random = seed;
        let mut deaths = 0;
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(3) {
            let window = 4096 << (pattern::next(&mut random) % 6);
            let server = ServerProcess::start(&kept, &orders, window);
            thread::sleep(Duration::from_micros(pattern::next(&mut random) % 40_000));
            server.kill();
            deaths += 1;
        }
        let last = ServerProcess::start(&kept, &orders, 64 << 10);
        clients.iter_mut().for_each(Client::is_right);
        assert!(deaths > 10, "{deaths} deaths");
        last.kill();
    }
}

fn take_up(kept: Kept, orders: &serde_json::Value) -> (Server, Arc<Notes>) {
    let server = Server::start(Limits::default()).unwrap();
    let notes = Arc::<Notes>::default();
    let guest = Guest {
        pages: Ruled::new(orders["seed"].as_u64().unwrap(), size(orders)),
        witness: notes.clone(),
        options: Options::default(),
    };
    server.take_up(kept, guest).unwrap();
    (server, notes)
}

fn again(kept: &Kept) -> Kept {
    Kept {
        uffd: kept.uffd.try_clone().unwrap(),
        vmm: kept.vmm.try_clone().unwrap(),
        ledger: kept.ledger.try_clone().unwrap(),
        regions: kept.regions.clone(),
    }
}

/// Reads messages of a VMM into its ledger, as a server does that dies right after it.
fn read_and_die(kept: &Kept, event: u8) {
    let regions = Regions::new(kept.regions.clone(), 1 << 40).unwrap();
    let ledger = Ledger::open(kept.ledger.try_clone().unwrap(), regions.pages()).unwrap();
    let uffd = Uffd::recognize(kept.uffd.try_clone().unwrap()).unwrap();
    loop {
        match ledger.take(|place| nix::unistd::read(&uffd, place)) {
            Ok(messages) => {
                assert_eq!(messages[0].event, event);
                return;
            }
            Err(nix::errno::Errno::EAGAIN) => thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn what_a_dead_server_read_and_did_not_answer_or_note_is_found_again() {
    let orders = json!({"seed": 7, "regions": [4 * MIB], "mode": "script"});
    let (kept, mut clients) = kept(&orders, 1);
    let (kept, client) = (&kept[0], &mut clients[0]);
    assert_eq!(client.line(), "ready");
    // A fault that was read and never answered.
    client.say("touch 50");
    read_and_die(kept, event::PAGEFAULT);
    // Pages that were given back: the kernel let the thread go on when the message was read, and
    // nobody noted it.
    client.say("remove 100 20");
    read_and_die(kept, event::REMOVE);
    assert_eq!(client.line(), "remove 100");
    assert_eq!(client.line_within(Duration::from_millis(200)), None);
    let (server, notes) = take_up(again(kept), &orders);
    assert_eq!(
        client.line(),
        format!("page 50 {}", pattern::word(7, 50, 1))
    );
    for page in [100, 110, 119] {
        client.say(&format!("touch {page}"));
        assert_eq!(client.line(), format!("page {page} 0"));
    }
    client.say("touch 120");
    assert_eq!(
        client.line(),
        format!("page 120 {}", pattern::word(7, 120, 1))
    );
    notes.wait("served", 5);
    let state = server.state(server.vmms()[0]).unwrap();
    assert_eq!(state.removed_pages, 20);
    // Another descriptor of its memory is open here; it is dead before this server's closes.
    drop(server);
    client.dies_of(SIGKILL);
}

#[test]
fn a_vmm_that_can_not_be_taken_up_is_killed() {
    let orders = json!({"seed": 7, "regions": [4 * MIB], "mode": "script"});
    for spoiled in 0..3 {
        let (mut kept, mut clients) = kept(&orders, 1);
        let (mut kept, client) = (kept.remove(0), &mut clients[0]);
        let other = || tempfile::tempfile().unwrap().into();
        match spoiled {
            0 => kept.ledger = other(),
            1 => kept.regions[0].size += 4096,
            _ => kept.uffd = other(),
        }
        let server = Server::start(Limits::default()).unwrap();
        let guest = Guest {
            pages: Ruled::new(7, 64 * MIB),
            witness: Arc::<Notes>::default(),
            options: Options::default(),
        };
        assert!(server.take_up(kept, guest).is_err());
        client.dies_of(SIGKILL);
    }
}

/// Huge pages that the kernel keeps for us, while we live; as many as it gives.
///
/// The machine has one number of them: who runs this at the same time, and puts back what there
/// was before, takes ours, so one goes after the other.
struct HugePages {
    before: String,
    _turn: Option<Flock<File>>,
}

impl HugePages {
    const PATH: &'static str = "/proc/sys/vm/nr_hugepages";

    fn reserve(count: usize) -> (Self, usize) {
        let turn = Self::turn();
        let before = std::fs::read_to_string(Self::PATH).unwrap_or_default();
        let had: usize = before.trim().parse().unwrap_or(0);
        let _ = std::fs::write(Self::PATH, (had + count).to_string());
        let free = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = free.lines().find(|line| line.starts_with("HugePages_Free"));
        let free = line.and_then(|line| line.split_whitespace().nth(1));
        let free = free.map_or(0, |free| free.parse().unwrap());
        let reserved = Self {
            before,
            _turn: turn,
        };
        (reserved, free)
    }

    /// None where the kernel has no huge pages at all.
    fn turn() -> Option<Flock<File>> {
        let until = Instant::now() + LONG;
        let mut file = File::open(Self::PATH).ok()?;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(turn) => return Some(turn),
                Err((same, error)) => {
                    assert!(Instant::now() < until, "{error}");
                    file = same;
                }
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::PATH, &self.before);
    }
}

#[test]
fn huge_pages_are_filled_whole() {
    let orders = json!({"seed": 9, "regions": [16 * MIB, 8 * MIB], "mode": "stress", "huge": true,
        "threads": 3, "seconds": 1.5});
    let (_reserved, free) = HugePages::reserve(16);
    if free < 12 {
        // This machine has none to give: what is known of them is all that can be tried.
        let regions = json!([{"base_host_virt_addr": 4 * MIB, "size": 8 * MIB, "offset": 2 * MIB,
            "page_size": 2 * MIB}]);
        let list = serde_json::from_value(regions).unwrap();
        let regions = Regions::new(list, 64 * MIB).unwrap();
        assert_eq!(regions.find(7 * MIB), Some((0, 1)));
        let given: Vec<_> = regions.pages_of(5 * MIB, 9 * MIB).collect();
        assert_eq!(given, [(1, 1)]);
        let ledger = Ledger::create(regions.pages()).unwrap();
        ledger.remove(1, 1);
        assert_eq!(ledger.get(Fact::Removed, 0, 4), 0b10);
        println!("no huge pages here: only their bookkeeping was tried");
        return;
    }
    let (kept, mut clients) = kept(&orders, 1);
    let (_server, notes) = take_up(again(&kept[0]), &orders);
    clients[0].is_right();
    notes.wait("exited", 1);
    assert!(notes.count("served") >= 12);
}
