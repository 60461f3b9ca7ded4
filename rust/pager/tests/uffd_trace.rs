//! The real pager fills memory that was handed in ahead of its VMM, from a trace, and records one:
//! every byte is right, whatever the VMM does meanwhile and whoever dies.
#![allow(clippy::unwrap_used)]

#[path = "uffd_support/pair.rs"]
mod pair_of_processes;
mod support;
mod uffd_support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use diapause_pager::trace::{Trace, GRANULE};
use pair_of_processes::{end, Pair};
use serde_json::{json, Value};
use support::World;
use uffd_support::{pattern, Client};

const MIB: u64 = 1 << 20;
const SEED: u64 = 11;
const REGIONS: [u64; 2] = [6 * MIB, 2 * MIB];
const SIZE: u64 = REGIONS[0] + REGIONS[1];
const FILE: &str = "one.memory";
/// Longer than any test.
const NEVER_MS: u64 = 600_000;
/// Deaths in a row: not so many that the keeper gives up.
const DEATHS: u32 = 25;
const PAGES: u64 = GRANULE / 4096;

/// The client's pattern as a snapshot's memory.
fn world() -> World {
    let words = (0..SIZE / 4096).flat_map(|page| (0..pattern::WORDS).map(move |at| (page, at)));
    let bytes = words.flat_map(|(page, at)| pattern::word(SEED, page, at).to_le_bytes());
    World::straight(bytes.collect())
}

fn pair(stall_ms: u64) -> (Pair, World) {
    let (pair, world) = (Pair::start(NEVER_MS, stall_ms, 1 << 30), world());
    pair.put(FILE, &world.spec);
    (pair, world)
}

fn orders(mode: &str) -> Value {
    json!({"seed": SEED, "regions": REGIONS, "mode": mode, "threads": 3, "seconds": 3.0})
}

fn touch_granule(client: &mut Client, granule: u64) {
    let page = granule * PAGES + 3;
    client.say(&format!("touch {page}"));
    assert_eq!(
        client.line(),
        format!("page {page} {}", pattern::word(SEED, page, 1))
    );
}

fn granules_of(path: &Path) -> Vec<u32> {
    let trace = Trace::read(path, SIZE).unwrap();
    trace.granules.iter().map(|one| one.number).collect()
}

fn write_trace(pair: &Pair, granules: &[u32]) -> PathBuf {
    let path = pair.directory.path().join("given.memory");
    let mut touched = granules.to_vec();
    touched.sort_unstable();
    let trace = Trace::empty(SIZE).with(granules, &touched);
    trace.write(&path).unwrap();
    path
}

fn record(pair: &Pair, sandbox: &str, prior: Option<&Path>) -> Vec<u32> {
    let to = pair.directory.path().join("recorded.memory");
    let trace = json!({"trace": {"sandbox": sandbox, "name": FILE, "prior": prior, "to": to}});
    pair.ask(&trace, &[]).unwrap();
    granules_of(&to)
}

fn prefetch(pair: &Pair, sandbox: Option<&str>, trace: &Path, budget: u64) -> Result<u64, String> {
    let mut what = json!({"name": FILE, "trace": trace, "budget_bytes": budget});
    if let Some(sandbox) = sandbox {
        what["sandbox"] = sandbox.into();
    }
    let said = pair.ask(&json!({ "prefetch": what }), &[])?;
    Ok(said["bytes"].as_u64().unwrap())
}

fn ahead(pair: &Pair, sandbox: &str) -> u64 {
    let seen = pair.seen(sandbox);
    seen["uffd"]["prefetched_pages"].as_u64().unwrap_or(0)
}

fn reads(pair: &Pair, sandbox: &str) -> u64 {
    let seen = pair.seen(sandbox);
    let reads = seen["files"][0]["seen"]["reads"].as_object().unwrap();
    let counts = reads.values().map(|one| one["count"].as_u64().unwrap());
    counts.sum()
}

#[test]
fn what_one_asked_for_is_given_to_the_next_before_it_asks() {
    let (pair, _world) = pair(NEVER_MS);
    let mut one = pair.client("one", FILE, &orders("script"));
    for granule in [90, 2, 127, 40] {
        touch_granule(&mut one, granule);
    }
    one.say("remove 35 4"); // of granule 2: it was asked for all the same
    assert_eq!(one.line(), "remove 35");
    pair.wait("it is counted", || reads(&pair, "one") == 4);
    assert_eq!(record(&pair, "one", None), [90, 2, 127, 40]);
    let trace = pair.directory.path().join("recorded.memory");

    // It is asked for before the VMM comes, and again by whoever did not hear the answer.
    let (path, listener) = pair.bind("two");
    let mut orders = orders("script");
    orders["waits"] = true.into();
    let mut two = Client::start(&path, &orders);
    pair.listen("two", FILE, two.child.id(), &listener).unwrap();
    for _ in 0..2 {
        let bytes = prefetch(&pair, Some("two"), &trace, MIB);
        assert_eq!(bytes.unwrap(), 4 * GRANULE);
    }
    two.say("connect");
    assert_eq!(two.line(), "ready");
    pair.wait("it is brought", || ahead(&pair, "two") == 4 * PAGES);
    let before = reads(&pair, "two");
    for granule in [2, 127, 90, 40] {
        touch_granule(&mut two, granule);
    }
    touch_granule(&mut two, 7);
    pair.wait("it is counted", || reads(&pair, "two") == before + 1);
    let touched = json!({"touched": {"sandbox": "two", "name": FILE}});
    assert_eq!(
        pair.ask(&touched, &[]).unwrap(),
        json!({"pages": 5 * PAGES, "prefetched_pages": 4 * PAGES, "used_pages": null,
            "late": false})
    );
    assert_eq!(record(&pair, "two", Some(&trace)), [90, 2, 127, 40, 7]);
    // The same trace serves the file that other VMMs map, once the kernel knows it.
    let file = pair.mount().join(FILE);
    assert_eq!(fs::metadata(file).unwrap().len(), SIZE);
    assert_eq!(
        prefetch(&pair, None, &trace, MIB).unwrap(),
        5 * GRANULE,
        "a trace is one file for both"
    );
    let stored = || pair.seen("two")["files"][0]["seen"]["stored_bytes"].as_u64();
    pair.wait("it is stored", || stored() == Some(9 * GRANULE));
}

#[test]
fn a_budget_is_kept_and_nothing_is_brought_twice() {
    let (pair, _world) = pair(NEVER_MS);
    let all: Vec<u32> = (0..(SIZE / GRANULE) as u32).rev().collect();
    let trace = write_trace(&pair, &all);
    let mut client = pair.client("one", FILE, &orders("script"));
    touch_granule(&mut client, 126);
    prefetch(&pair, Some("one"), &trace, 10 * GRANULE).unwrap();
    pair.wait("it is brought", || ahead(&pair, "one") >= 9 * PAGES);
    prefetch(&pair, Some("one"), &trace, SIZE).unwrap();
    pair.wait("all of it", || {
        pair.seen("one")["uffd"]["filled_pages"] == SIZE / 4096
    });
    assert_eq!(ahead(&pair, "one"), SIZE / 4096 - PAGES);
    let before = reads(&pair, "one");
    for granule in 0..SIZE / GRANULE {
        touch_granule(&mut client, granule);
    }
    assert_eq!(reads(&pair, "one"), before);
}

#[test]
fn what_was_given_back_is_not_brought() {
    let (pair, _world) = pair(NEVER_MS);
    let trace = write_trace(&pair, &[4, 5, 6]);
    let mut client = pair.client("one", FILE, &orders("script"));
    let first = 5 * PAGES;
    client.say(&format!("remove {first} {PAGES}"));
    assert_eq!(client.line(), format!("remove {first}"));
    prefetch(&pair, Some("one"), &trace, MIB).unwrap();
    pair.wait("the others", || ahead(&pair, "one") == 2 * PAGES);
    client.say(&format!("touch {first}"));
    assert_eq!(client.line(), format!("page {first} 0"));
    touch_granule(&mut client, 6);
    assert_eq!(ahead(&pair, "one"), 2 * PAGES);
}

#[test]
fn a_pager_that_dies_in_the_middle_is_followed_by_one_that_goes_on() {
    let (pair, _world) = pair(NEVER_MS);
    let all: Vec<u32> = (0..(SIZE / GRANULE) as u32).collect();
    let trace = write_trace(&pair, &all);
    let mut client = pair.client("one", FILE, &orders("script"));
    touch_granule(&mut client, 9);
    prefetch(&pair, Some("one"), &trace, SIZE).unwrap();
    end(pair.pids().0);
    pair.wait("all of it", || {
        pair.seen("one")["uffd"]["filled_pages"] == SIZE / 4096
    });
    touch_granule(&mut client, 100);
    let recorded = record(&pair, "one", None);
    assert_eq!(
        recorded, all,
        "what was there before its start, in its place"
    );
}

#[test]
fn every_byte_is_right_while_it_is_brought_and_the_pager_dies() {
    let (pair, _world) = pair(NEVER_MS);
    let mut random = 5;
    let mut all: Vec<u32> = (0..(SIZE / GRANULE) as u32).collect();
    for at in (1..all.len()).rev() {
        all.swap(at, pattern::next(&mut random) as usize % (at + 1));
    }
    let trace = write_trace(&pair, &all);
    let mut client = pair.client("one", FILE, &orders("stress"));
    prefetch(&pair, Some("one"), &trace, SIZE).unwrap();
    for _ in 0..DEATHS {
        let pause = Duration::from_micros(pattern::next(&mut random) % 30_000);
        std::thread::sleep(pause);
        end(pair.pids().0);
    }
    client.is_right();
    let log = fs::read_to_string(pair.log()).unwrap();
    assert!(!log.contains("brought ahead"), "{log}");
}

#[test]
fn many_at_once_are_right_while_nobody_dies() {
    let (pair, _world) = pair(NEVER_MS);
    let all: Vec<u32> = (0..(SIZE / GRANULE) as u32).collect();
    let trace = write_trace(&pair, &all);
    let names: Vec<String> = (0..6).map(|number| format!("vmm{number}")).collect();
    let mut orders = orders("stress");
    orders["seconds"] = 1.0.into();
    let clients = names.iter().map(|name| {
        let client = pair.client(name, FILE, &orders);
        prefetch(&pair, Some(name), &trace, SIZE).unwrap();
        client
    });
    for mut client in clients.collect::<Vec<_>>() {
        client.is_right();
    }
}

#[test]
fn what_can_not_be_read_is_left_to_the_fault_that_waits_for_it() {
    let (pair, world) = pair(NEVER_MS);
    let build = world.build_file(0);
    let whole = fs::read(&build).unwrap();
    let mut bytes = whole.clone();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 300_000].fill(0xEE);
    fs::write(&build, bytes).unwrap();
    let all: Vec<u32> = (0..(SIZE / GRANULE) as u32).collect();
    let trace = write_trace(&pair, &all);
    let mut client = pair.client("one", FILE, &orders("script"));
    prefetch(&pair, Some("one"), &trace, SIZE).unwrap();
    pair.wait("its end", || {
        fs::read_to_string(pair.log())
            .unwrap()
            .contains("no more of it is brought ahead")
    });
    assert!(ahead(&pair, "one") < SIZE / 4096);
    touch_granule(&mut client, 1);
    let granule = SIZE / GRANULE / 2 + 1;
    let page = granule * PAGES + 3;
    client.say(&format!("touch {page}"));
    pair.wait("it waits", || {
        !pair.seen("one")["uffd"]["stalled"].is_null()
    });
    fs::write(&build, whole).unwrap();
    assert_eq!(
        client.line(),
        format!("page {page} {}", pattern::word(SEED, page, 1))
    );
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (pair, _world) = pair(NEVER_MS);
    let trace = write_trace(&pair, &[1]);
    let _client = pair.client("one", FILE, &orders("script"));
    let refused = prefetch(&pair, Some("two"), &trace, MIB).unwrap_err();
    assert!(refused.contains("no VMM of two"), "{refused}");
    let nothing = pair.directory.path().join("nothing");
    let refused = prefetch(&pair, Some("one"), &nothing, MIB).unwrap_err();
    assert!(refused.contains("No such file"), "{refused}");
    let mut bytes = fs::read(&trace).unwrap();
    bytes[40] ^= 1;
    fs::write(&trace, bytes).unwrap();
    let refused = prefetch(&pair, Some("one"), &trace, MIB).unwrap_err();
    assert!(refused.contains("digest"), "{refused}");
    let long = PathBuf::from("x".repeat(5000));
    let refused = prefetch(&pair, Some("one"), &long, MIB).unwrap_err();
    assert!(refused.contains("4096 bytes at most"), "{refused}");
    assert_eq!(ahead(&pair, "one"), 0);
}
