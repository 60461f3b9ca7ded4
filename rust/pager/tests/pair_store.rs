//! A pager that is killed while one of its threads gives the kernel what was brought ahead, and
//! waits in there for a page that is being read: the process can't end before the read is answered,
//! and only the next pager answers it.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)] // VMMs that hand in their memory: other tests have those
#[path = "uffd_support/pair.rs"]
mod pair_of_processes;
mod support;
mod uffd_support;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use diapause_pager::process::Process;
use diapause_pager::trace::{Trace, GRANULE};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use pair_of_processes::Pair;
use serde_json::{json, Value};
use support::{pages, table, Dice, World};

/// Longer than any test.
const NEVER_MS: u64 = 600_000;
const LARGE: u64 = 1 << 30;
const FILE: &str = "one.memory";

/// Damages a frame of the world's build in its place; returns its offset and what was there.
fn damage(world: &World, frame: u64) -> (u64, Vec<u8>) {
    let path = world.build_file(0);
    let good = fs::read(&path).unwrap();
    let entries = table(&world.stores[0].id, &good);
    let entry = entries.frame(frame);
    let (from, length) = (entry.offset, entry.length as usize);
    let was = good[from as usize..from as usize + length].to_vec();
    let wrong: Vec<u8> = was.iter().map(|byte| !byte).collect();
    repair(world, &(from, wrong));
    (from, was)
}

fn repair(world: &World, (at, bytes): &(u64, Vec<u8>)) {
    let file = fs::OpenOptions::new().write(true).open(world.build_file(0));
    file.unwrap().write_all_at(bytes, *at).unwrap();
}

/// Who reads the first two granules with one read of the kernel's.
fn reader(pair: &Pair) -> Child {
    let path = pair.mount().join(FILE);
    assert_ne!(fs::metadata(&path).unwrap().len(), 0); // the kernel knows it
    let mut command = Command::new("dd");
    command.arg(format!("if={}", path.display()));
    command.args(["bs=128K", "count=1", "status=none"]);
    command.stdout(Stdio::piped()).spawn().unwrap()
}

/// The letters of what the threads of a process do; none where it is gone.
fn threads(pid: i32) -> Vec<char> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let stats = tasks.filter_map(|task| fs::read_to_string(task.path().join("stat")).ok());
    stats
        .filter_map(|stat| stat.rsplit(") ").next()?.chars().next())
        .collect()
}

/// Whether a thread that stores waits, for longer than a page that is in memory takes.
fn waits_in_a_store(pid: i32) -> bool {
    let look = || {
        let mut tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
        tasks.find_map(|task| {
            let status = fs::read_to_string(task.path().join("status")).ok()?;
            let waits = status.contains("Name:\tstore\n") && status.contains("State:\tD");
            let switches = status.split_once("voluntary_ctxt_switches:")?.1;
            waits.then(|| switches.to_owned())
        })
    };
    let first = look();
    thread::sleep(Duration::from_millis(50));
    first.is_some() && first == look()
}

fn bring_ahead(pair: &Pair, world: &World, granules: &[u32]) {
    let trace = world.directory.path().join("trace");
    let known = Trace::empty(world.spec.size_bytes).with(&[], granules);
    known.write(&trace).unwrap();
    let ask = json!({"prefetch": {"name": FILE, "trace": trace, "budget_bytes": LARGE}});
    pair.ask(&ask, &[]).unwrap();
}

/// A VMM of the file, as far as the pair is concerned.
fn vmm(pair: &Pair) -> Child {
    let vmm = Command::new("sleep").arg("600").spawn().unwrap();
    let process = Process::open(vmm.id() as i32).unwrap();
    let attach = json!({"attach": {"sandbox": "one", "files": [FILE]}});
    pair.ask(&attach, &[process.as_fd()]).unwrap();
    vmm
}

/// Kills the pager when a store of it waits; returns when the next one answers.
fn kill_in_a_store(pair: &Pair, world: &World) -> i32 {
    bring_ahead(pair, world, &[0]);
    let (dead, _) = pair.pids();
    pair.wait("the store waits", || waits_in_a_store(dead));
    kill(Pid::from_raw(dead), Signal::SIGKILL).unwrap();
    pair.wait("nothing else is left of it", || {
        threads(dead).iter().all(|what| "DZX".contains(*what))
    });
    let (next, _) = pair.pids();
    assert_ne!(next, dead);
    dead
}

#[test]
fn a_pager_that_is_killed_in_a_store_is_replaced_before_it_can_end() {
    let pair = Pair::start(NEVER_MS, NEVER_MS, LARGE);
    let world = World::straight(pages(64, &mut Dice::new(1)));
    pair.put(FILE, &world.spec);
    let mut vmm = vmm(&pair);
    let good = damage(&world, 1);
    let reader = reader(&pair);
    pair.wait("the read is held", || {
        let counted = pair.ask(&json!({"totals": {}}), &[]).unwrap();
        counted.to_string().contains("\"stalls\":1")
    });
    let mut dead = Vec::new();
    for _ in 0..3 {
        dead.push(kill_in_a_store(&pair, &world));
        assert!(dead.iter().all(|pid| threads(*pid).contains(&'D')));
    }

    repair(&world, &good);
    let output = reader.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(output.stdout == world.expected[..2 * GRANULE as usize]);
    pair.wait("nothing is left of them", || {
        dead.iter().all(|pid| threads(*pid).is_empty())
    });
    assert!(fs::read(pair.mount().join(FILE)).unwrap() == world.expected);
    assert!(vmm.try_wait().unwrap().is_none(), "the VMM was killed");
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    let detach = json!({"detach": {"sandbox": "one"}});
    assert_eq!(pair.ask(&detach, &[]).unwrap()["killed"], Value::Null);
}
