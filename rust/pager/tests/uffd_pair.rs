//! The real pager and its keeper under VMMs that hand in their memory: whoever of the two is
//! killed or stopped, a VMM waits and sees what is right; where both are, it is dead before it
//! sees anything else.
#![allow(clippy::unwrap_used)]

#[path = "uffd_support/pair.rs"]
mod pair_of_processes;
mod support;
mod uffd_support;

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::libc::{self, SIGKILL};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use pair_of_processes::{end, Pair};
use serde_json::{json, Value};
use support::World;
use uffd_support::{pattern, Client};

const MIB: u64 = 1 << 20;
const SEED: u64 = 7;
const REGIONS: [u64; 2] = [6 * MIB, 2 * MIB];
/// Longer than any test.
const NEVER_MS: u64 = 600_000;
const LARGE: u64 = 1 << 30;

/// The client's pattern as a snapshot's memory: a header, a build, verified as any.
fn world() -> World {
    let pages = REGIONS.iter().sum::<u64>() / 4096;
    let words = (0..pages).flat_map(|page| (0..pattern::WORDS).map(move |at| (page, at)));
    let bytes = words.flat_map(|(page, at)| pattern::word(SEED, page, at).to_le_bytes());
    World::straight(bytes.collect())
}

fn pair() -> (Pair, World) {
    let (pair, world) = (Pair::start(NEVER_MS, NEVER_MS, LARGE), world());
    pair.put("one.memory", &world.spec);
    (pair, world)
}

fn orders(mode: &str) -> Value {
    json!({"seed": SEED, "regions": REGIONS, "mode": mode, "threads": 3, "seconds": 3.0})
}

fn scripted(pair: &Pair) -> Client {
    pair.client("one", "one.memory", &orders("script"))
}

fn touch(client: &mut Client, page: u64) {
    client.say(&format!("touch {page}"));
    assert_eq!(client.line(), right(page));
}

fn right(page: u64) -> String {
    format!("page {page} {}", pattern::word(SEED, page, 1))
}

#[test]
fn either_is_killed_again_and_again_and_every_byte_is_right() {
    let (pair, _world) = pair();
    let mut client = pair.client("one", "one.memory", &orders("stress"));
    let mut random = 3;
    let begin = Instant::now();
    let mut deaths = 0;
    while begin.elapsed() < Duration::from_secs(3) || deaths < 4 {
        let (pager, keeper) = pair.pids();
        let pause = Duration::from_micros(pattern::next(&mut random) % 60_000);
        std::thread::sleep(pause);
        end(if deaths % 3 == 2 { keeper } else { pager });
        deaths += 1;
    }
    client.is_right();
    assert_eq!(pair.detach("one"), Value::Null);
}

#[test]
fn where_both_die_the_vmm_is_dead_before_it_sees_anything() {
    for _ in 0..3 {
        let (pair, _world) = pair();
        let mut client = scripted(&pair);
        touch(&mut client, 1);
        let (pager, keeper) = pair.pids();
        for pid in [keeper, pager] {
            kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
        }
        client.say("touch 400"); // waits when they die
        for pid in [keeper, pager] {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        client.dies_of(SIGKILL);
        client.try_say("touch 800");
        let said = client.line_within(Duration::from_secs(1));
        assert_eq!(said, None, "it saw something");
    }
}

#[test]
fn a_pager_that_is_stopped_is_replaced() {
    let pair = Pair::start(3000, NEVER_MS, LARGE);
    let world = world();
    pair.put("one.memory", &world.spec);
    let mut client = scripted(&pair);
    touch(&mut client, 1);
    let (pager, _) = pair.pids();
    kill(Pid::from_raw(pager), Signal::SIGSTOP).unwrap();
    touch(&mut client, 500);
    assert_ne!(pair.pids().0, pager);
    assert!(fs::read_to_string(pair.log())
        .unwrap()
        .contains("is silent"));
}

#[test]
fn a_keeper_that_is_stopped_is_replaced() {
    let (pair, _world) = pair();
    let mut client = scripted(&pair);
    let (pager, keeper) = pair.pids();
    kill(Pid::from_raw(keeper), Signal::SIGSTOP).unwrap();
    pair.wait("another keeper", || pair.pids().1 != keeper);
    assert_eq!(pair.pids().0, pager);
    end(pager);
    touch(&mut client, 700);
}

#[test]
fn a_socket_outlives_the_pager_that_listened() {
    let (pair, _world) = pair();
    let (path, listener) = pair.bind("one");
    let mut orders = orders("script");
    orders["waits"] = true.into();
    let mut client = Client::start(&path, &orders);
    let pid = client.child.id();
    pair.listen("one", "one.memory", pid, &listener).unwrap();
    end(pair.pids().0);
    assert_eq!(
        pair.seen("one")["uffd"],
        json!({"came": false, "knocked": false})
    );
    // It is announced again by whoever did not hear the answer.
    pair.listen("one", "one.memory", pid, &listener).unwrap();
    client.say("connect");
    assert_eq!(client.line(), "ready");
    touch(&mut client, 9);
    pair.listen("one", "one.memory", pid, &listener).unwrap();
    touch(&mut client, 300);
}

#[test]
fn who_was_not_announced_is_killed_and_costs_nobody_else_anything() {
    let (pair, _world) = pair();
    let (path, listener) = pair.bind("one");
    let mut announced = Command::new("sleep").arg("600").spawn().unwrap();
    pair.listen("one", "one.memory", announced.id(), &listener)
        .unwrap();
    let mut stranger = Client::start(&path, &orders("script"));
    stranger.dies_of(SIGKILL);
    assert!(announced.try_wait().unwrap().is_none());
    let mut other = pair.client("two", "one.memory", &orders("script"));
    touch(&mut other, 11);
    announced.kill().unwrap();
    announced.wait().unwrap();
}

/// Bytes that nobody has read at the other end.
fn unread(stream: &UnixStream) -> i32 {
    let mut bytes = -1;
    // SAFETY: the kernel writes a number to a variable that lives here.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    assert_eq!(result, 0);
    bytes
}

#[test]
fn who_was_being_let_in_when_the_pager_died_is_killed() {
    let (pair, _world) = pair();
    let (path, listener) = pair.bind("one");
    let mut vmm = Command::new("sleep").arg("600").spawn().unwrap();
    pair.listen("one", "one.memory", vmm.id(), &listener)
        .unwrap();
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"[").unwrap();
    pair.wait("it is let in", || unread(&stream) == 0);
    end(pair.pids().0);
    assert!(!vmm.wait().unwrap().success());
    pair.wait("why", || {
        pair.detach("one")["cause"].to_string().contains("let in")
    });
    drop(stream);
}

#[test]
fn what_can_not_be_read_kills_the_vmm_with_the_name_of_the_blob() {
    let pair = Pair::start(NEVER_MS, 300, LARGE);
    let world = world();
    let build = world.build_file(0);
    let mut bytes = fs::read(&build).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 300_000].fill(0xEE);
    fs::write(&build, bytes).unwrap();
    pair.put("one.memory", &world.spec);
    let mut client = scripted(&pair);
    let page = (REGIONS[0] + REGIONS[1]) / 4096 / 2 + 20;
    client.say(&format!("touch {page}"));
    client.dies_of(SIGKILL);
    assert_eq!(client.line_within(Duration::from_secs(1)), None);
    // A pager that is replaced knows it as well.
    end(pair.pids().0);
    let killed = pair.detach("one");
    let name = build.file_name().unwrap().to_str().unwrap();
    assert!(killed["blob"].to_string().contains(name), "{killed}");
}

#[test]
fn who_is_detached_is_dead() {
    let (pair, _world) = pair();
    let mut client = scripted(&pair);
    touch(&mut client, 5);
    let seen = pair.seen("one");
    assert_eq!(seen["uffd"]["pages"], (REGIONS[0] + REGIONS[1]) / 4096);
    // What was answered is counted a moment after the VMM goes on.
    pair.wait("it is counted", || {
        let seen = pair.seen("one");
        let reads = seen["files"][0]["seen"]["reads"].as_object().unwrap();
        seen["uffd"]["filled_pages"].as_u64().unwrap() >= 1 && !reads.is_empty()
    });
    let remove = json!({"remove": {"name": "one.memory"}});
    assert!(pair.ask(&remove, &[]).unwrap_err().contains("one runs on"));
    assert_eq!(pair.detach("one"), Value::Null);
    client.dies_of(SIGKILL);
    pair.ask(&remove, &[]).unwrap();
    assert_eq!(
        pair.ask(&json!({"sandboxes": {"after": ""}}), &[]).unwrap(),
        json!({"sandboxes": []})
    );
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (pair, _world) = pair();
    let (_, listener) = pair.bind("one");
    let me = std::process::id();
    let refused = pair.listen("one", "nothing", me, &listener).unwrap_err();
    assert!(refused.contains("no file nothing"), "{refused}");
    let (one, _other) = UnixStream::pair().unwrap();
    let no_listener = UnixListener::from(std::os::fd::OwnedFd::from(one));
    let refused = pair
        .listen("one", "one.memory", me, &no_listener)
        .unwrap_err();
    assert!(refused.contains("no socket that listens"), "{refused}");
    let nothing = json!({"listen": {"sandbox": "one", "file": "one.memory"}});
    assert!(pair
        .ask(&nothing, &[])
        .unwrap_err()
        .contains("have to come"));
}

#[test]
fn the_log_is_bounded_and_both_go_on_in_the_new_one() {
    let pair = Pair::start(NEVER_MS, NEVER_MS, 300);
    let aside = pair.log().with_extension("log.1");
    while fs::metadata(pair.log()).unwrap().len() < 300 && !aside.exists() {
        end(pair.pids().1);
    }
    pair.wait("it is set aside", || aside.exists());
    let (pager, keeper) = pair.pids();
    pair.wait("both write to the new one", || {
        let of = |pid: i32| fs::read_link(format!("/proc/{pid}/fd/2")).unwrap();
        of(pager) == pair.log() && of(keeper) == pair.log()
    });
    assert!(fs::metadata(&aside).unwrap().len() < 10_000);
}
