//! Who comes when a VMM is waited for: the one that was announced and nobody else, also where it is
//! announced twice, where others knock, and where its number has become another's.
#![allow(clippy::unwrap_used)]

#[path = "uffd_support/pair.rs"]
mod pair_of_processes;
mod support;
mod uffd_support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use diapause_pager::trace::Trace;
use nix::libc::SIGKILL;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use pair_of_processes::{end, Pair};
use serde_json::{json, Value};
use support::World;
use uffd_support::{pattern, Client, LONG};

const MIB: u64 = 1 << 20;
const SEED: u64 = 13;
const SIZE: u64 = 2 * MIB;
const FILE: &str = "one.memory";
/// Longer than any test.
const NEVER_MS: u64 = 600_000;

fn pair() -> (Pair, World) {
    let words = (0..SIZE / 4096).flat_map(|page| (0..pattern::WORDS).map(move |at| (page, at)));
    let bytes = words.flat_map(|(page, at)| pattern::word(SEED, page, at).to_le_bytes());
    let world = World::straight(bytes.collect());
    let pair = Pair::start(NEVER_MS, NEVER_MS, 1 << 30);
    pair.put(FILE, &world.spec);
    (pair, world)
}

fn orders(waits: bool) -> Value {
    json!({"seed": SEED, "regions": [SIZE], "mode": "script", "waits": waits})
}

fn touch(client: &mut Client, page: u64) {
    client.say(&format!("touch {page}"));
    assert_eq!(
        client.line(),
        format!("page {page} {}", pattern::word(SEED, page, 1))
    );
}

/// A client that has not connected so far, and is announced.
fn announced(pair: &Pair, path: &Path, listener: &UnixListener) -> Client {
    let client = Client::start(path, &orders(true));
    pair.listen("one", FILE, client.child.id(), listener)
        .unwrap();
    client
}

/// A client that has a number of our choice, which nobody has.
fn client_of_number(pid: u32, path: &Path) -> Client {
    let until = Instant::now() + LONG;
    loop {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
        let client = Client::start(path, &orders(true));
        if client.child.id() == pid {
            return client;
        }
        assert!(Instant::now() < until, "{pid} is never given");
    }
}

#[test]
fn a_number_that_became_another_s_is_not_the_one_that_was_announced() {
    let (pair, _world) = pair();
    let (path, listener) = pair.bind("one");
    let mut first = Command::new("sleep").arg("600").spawn().unwrap();
    let pid = first.id();
    pair.listen("one", FILE, pid, &listener).unwrap();
    first.kill().unwrap();
    first.wait().unwrap();
    let mut other = client_of_number(pid, &path);
    other.say("connect");
    other.dies_of(SIGKILL);
    assert_eq!(pair.seen("one")["uffd"]["came"], false);
}

#[test]
fn a_stranger_that_was_sent_away_costs_nothing_when_the_pager_dies() {
    let (pair, _world) = pair();
    let (path, listener) = pair.bind("one");
    let mut client = announced(&pair, &path, &listener);
    for said in [&b"garbage"[..], b"", b"[]"] {
        let mut stranger = UnixStream::connect(&path).unwrap();
        stranger.write_all(said).unwrap();
        stranger.shutdown(std::net::Shutdown::Write).unwrap();
        // It is closed when it was sent away.
        stranger.set_read_timeout(Some(LONG)).unwrap();
        assert_eq!(stranger.read(&mut [0]).unwrap_or(0), 0);
    }
    pair.wait("nobody is let in", || {
        pair.seen("one")["uffd"]["knocked"] == false
    });
    end(pair.pids().0);
    client.say("connect");
    assert_eq!(client.line(), "ready");
    touch(&mut client, 7);
}

#[test]
fn who_is_announced_again_while_it_comes_is_served_and_known() {
    let (pair, _world) = pair();
    for round in 0..12 {
        let name = format!("round{round}");
        let (path, listener) = pair.bind(&name);
        let mut client = announced(&pair, &path, &listener);
        let (pid, came) = (client.child.id(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !came.load(Ordering::Relaxed) {
                    pair.listen("one", FILE, pid, &listener).unwrap();
                }
            });
            std::thread::sleep(Duration::from_millis(2 * round));
            client.say("connect");
            let ready = client.line();
            touch(&mut client, 9);
            came.store(true, Ordering::Relaxed);
            assert_eq!(ready, "ready");
        });
        assert_eq!(pair.seen("one")["uffd"]["came"], true, "round {round}");
        touch(&mut client, 40);
        assert_eq!(pair.detach("one"), Value::Null);
        client.dies_of(SIGKILL);
    }
}

#[test]
fn the_next_of_a_sandbox_is_let_in_the_moment_the_last_is_dead() {
    let (pair, _world) = pair();
    for round in 0..10 {
        let (path, listener) = pair.bind(&format!("round{round}"));
        let mut client = announced(&pair, &path, &listener);
        client.say("connect");
        assert_eq!(client.line(), "ready");
        touch(&mut client, round);
        pair.wait("it has come", || pair.seen("one")["uffd"]["came"] == true);
        client.child.kill().unwrap();
        client.child.wait().unwrap();
    }
}

/// The pager's own notes are held up by a trace on a disk that does not answer.
#[test]
fn the_next_is_let_in_before_the_end_of_the_last_is_noted() {
    let (pair, _world) = pair();
    let trace = pair.directory.path().join("slow.memory");
    Trace::empty(SIZE).with(&[1], &[1]).write(&trace).unwrap();
    let (path, listener) = pair.bind("slow");
    let mut slow = Client::start(&path, &orders(true));
    pair.listen("slow", FILE, slow.child.id(), &listener)
        .unwrap();
    let prefetch = json!({"prefetch":
        {"name": FILE, "trace": trace, "budget_bytes": MIB, "sandbox": "slow"}});
    pair.ask(&prefetch, &[]).unwrap();
    fs::remove_file(&trace).unwrap();
    mkfifo(&trace, Mode::S_IRWXU).unwrap();
    slow.say("connect");
    assert_eq!(slow.line(), "ready");
    touch(&mut slow, 9);

    let (path, listener) = pair.bind("one");
    for round in 0..8 {
        let mut client = announced(&pair, &path, &listener);
        client.say("connect");
        assert_eq!(client.line(), "ready");
        touch(&mut client, round);
        client.child.kill().unwrap();
        client.child.wait().unwrap();
        pair.wait("it is not served any more", || {
            pair.seen("one")["uffd"]["pages"].is_null()
        });
        assert_eq!(pair.seen("one")["uffd"]["came"], true, "its end is noted");
    }
}

#[test]
fn what_is_too_large_to_be_kept_is_refused_and_both_go_on() {
    let (pair, world) = pair();
    let before = pair.pids();
    let spec = |bytes: usize| {
        let mut spec = serde_json::to_value(&world.spec).unwrap();
        spec["header"] = "x".repeat(bytes).into();
        json!({"put": {"name": "large", "spec": spec}})
    };
    let room = (64 << 10) - serde_json::to_vec(&spec(0)).unwrap().len();
    let refused = pair.ask(&spec(room), &[]).unwrap_err();
    assert!(refused.contains("bytes"), "{refused}");
    assert_eq!(pair.pids(), before);
    let mut client = pair.client("one", FILE, &orders(false));
    end(before.0);
    touch(&mut client, 3);
}
