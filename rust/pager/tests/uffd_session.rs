//! VMMs in processes of their own, real memory, the real kernel: what they see is right, whatever
//! the source does, and where it can't be they are dead before they see anything else.
#![allow(clippy::unwrap_used)]

mod uffd_support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use diapause_pager::build::Unreadable;
use diapause_pager::uffd::session::Session;
use diapause_pager::uffd::{Limits, OnBad, Options, Pages, Scratch, Server};
use nix::libc::{SIGBUS, SIGKILL};
use serde_json::json;
use uffd_support::{pattern, Client, Street};

const MIB: u64 = 1 << 20;

fn server() -> Server {
    Server::start(Limits::default()).unwrap()
}

fn script(seed: u64) -> serde_json::Value {
    json!({"seed": seed, "regions": [4 * MIB, 2 * MIB + 36864], "mode": "script"})
}

fn size(orders: &serde_json::Value) -> u64 {
    let regions = orders["regions"].as_array().unwrap();
    regions.iter().map(|size| size.as_u64().unwrap()).sum()
}

/// A script client that is served, ready to be told what to do.
fn scripted(server: &Server, options: Options) -> (Street, Client) {
    let orders = script(7);
    let street = Street::new(server, 7, size(&orders), options);
    let client = Client::start(&street.socket, &orders);
    assert_eq!(client.line(), "ready");
    street.house.notes.wait("admitted", 1);
    (street, client)
}

fn page(number: u64) -> String {
    format!("page {number} {}", pattern::word(7, number, 1))
}

fn stressed(seed: u64, window_bytes: u64, threads: u64, seconds: f64) {
    let server = server();
    let orders = json!({"seed": seed, "regions": [24 * MIB, 8 * MIB + 20480], "mode": "stress",
        "threads": threads, "seconds": seconds});
    let options = Options {
        window_bytes,
        ..Options::default()
    };
    let street = Street::new(&server, seed, size(&orders), options);
    let mut client = Client::start(&street.socket, &orders);
    client.is_right();
    street.house.notes.wait("exited", 1);
    assert!(street.house.notes.count("served") > 100);
}

#[test]
fn memory_is_right_under_concurrent_faults_and_removes() {
    for seed in 0..4 {
        stressed(seed, 64 << 10, 4, 1.5);
    }
}

#[test]
fn memory_is_right_page_by_page_and_in_the_largest_window() {
    stressed(11, 4 << 10, 6, 1.5);
    stressed(12, 256 << 10, 6, 1.5);
}

#[test]
fn many_vms_are_served_at_once() {
    let server = server();
    let orders =
        json!({"seed": 3, "regions": [2 * MIB], "mode": "stress", "threads": 2, "seconds": 1.0});
    let street = Street::new(&server, 3, size(&orders), Options::default());
    let clients: Vec<_> = (0..64)
        .map(|_| Client::start(&street.socket, &orders))
        .collect();
    for mut client in clients {
        client.is_right();
    }
    street.house.notes.wait("exited", 64);
    assert!(server.vmms().is_empty());
}

#[test]
fn what_was_read_is_told_before_it_is_answered() {
    let server = server();
    let (street, mut client) = scripted(&server, Options::default());
    let notes = &street.house.notes;
    let gate = notes.gate.lock().unwrap();
    client.say("touch 40");
    assert_eq!(client.line_within(Duration::from_millis(300)), None);
    drop(gate);
    assert_eq!(client.line(), page(40));
    assert_eq!(notes.count(&format!("read {}", 128 << 10)), 1);
}

#[test]
fn memory_is_right_with_a_source_that_is_slow_and_fails() {
    let server = server();
    let orders =
        json!({"seed": 5, "regions": [8 * MIB], "mode": "stress", "threads": 6, "seconds": 1.0});
    let options = Options {
        retry_after: Duration::from_millis(5),
        ..Options::default()
    };
    let street = Street::new(&server, 5, size(&orders), options);
    let count = AtomicU64::new(0);
    street.house.pages.set(move |_, _| {
        let number = count.fetch_add(1, Ordering::Relaxed);
        match pattern::mix(number) % 8 {
            0 => Err(Unreadable::away("builds/x", "chance")),
            1 => Err(Unreadable::damaged("builds/y", "chance")),
            2..5 => {
                thread::sleep(Duration::from_micros(pattern::mix(number) % 3000));
                Ok(())
            }
            _ => Ok(()),
        }
    });
    Client::start(&street.socket, &orders).is_right();
    let notes = &street.house.notes;
    notes.wait("exited", 1);
    assert!(notes.count("served late") > 0 && notes.count("stalled builds/y") > 0);
}

#[test]
fn a_page_that_was_given_back_is_zeros_and_its_neighbours_are_not() {
    let server = server();
    let options = Options {
        window_bytes: 4 << 10,
        ..Options::default()
    };
    let (street, mut client) = scripted(&server, options);
    let mut ask = |line: &str, answer: String| {
        client.say(line);
        assert_eq!(client.line(), answer);
    };
    ask("touch 20", page(20));
    ask("write 20 77", "page 20 77".into());
    ask("remove 20 1", "remove 20".into());
    ask("touch 20", "page 20 0".into());
    ask("write 20 78", "page 20 78".into());
    // Never touched before: the snapshot's bytes are gone all the same.
    ask("remove 40 3", "remove 40".into());
    ask("touch 41", "page 41 0".into());
    ask("touch 39", page(39));
    ask("touch 44", page(44));
    street.house.notes.wait("removed 3", 1);
    let state = server.state(server.vmms()[0]).unwrap();
    assert_eq!(
        (state.removed_pages, state.pages),
        (4, size(&script(7)) / 4096)
    );
}

#[test]
fn a_window_is_clipped_to_its_region_and_brings_its_pages_once() {
    let server = server();
    let (street, mut client) = scripted(&server, Options::default());
    client.say("touch 1");
    assert_eq!(client.line(), page(1));
    street.house.notes.wait("served", 1);
    assert_eq!(street.house.notes.bytes.load(Ordering::Relaxed), 64 << 10);
    client.say("touch 15");
    assert_eq!(client.line(), page(15));
    // The last window of the second region has nine pages.
    let last = size(&script(7)) / 4096 - 1;
    client.say(&format!("touch {last}"));
    assert_eq!(client.line(), page(last));
    street.house.notes.wait("served", 2);
    assert_eq!(
        street.house.notes.bytes.load(Ordering::Relaxed),
        (64 << 10) + 36864
    );
    assert_eq!(street.house.pages.reads.load(Ordering::Relaxed), 2);
}

#[test]
fn a_bad_neighbour_in_the_window_costs_nobody() {
    let server = server();
    let options = Options {
        stall_max: Duration::from_millis(300),
        ..Options::default()
    };
    let (street, mut client) = scripted(&server, options);
    street.house.pages.set(|offset, size| {
        let bad = 5 * 4096;
        if (offset..offset + size as u64).contains(&bad) {
            return Err(Unreadable::damaged("builds/bad", "a frame"));
        }
        Ok(())
    });
    client.say("touch 4");
    assert_eq!(client.line(), page(4));
    client.say("touch 6");
    assert_eq!(client.line(), page(6));
    assert_eq!(street.house.notes.count("stalled builds/bad"), 0);
    client.say("touch 5");
    street.house.notes.wait("killed builds/bad: a frame", 1);
    client.dies_of(SIGKILL);
    assert_eq!(client.line_within(Duration::from_secs(1)), None);
}

#[test]
fn an_access_waits_for_what_is_mended_within_the_bound() {
    let server = server();
    let (street, mut client) = scripted(&server, Options::default());
    let broken = Arc::new(AtomicBool::new(true));
    let same = broken.clone();
    street.house.pages.set(move |_, _| {
        if same.load(Ordering::Relaxed) {
            return Err(Unreadable::away("builds/gone", "no answer"));
        }
        Ok(())
    });
    client.say("touch 30");
    street.house.notes.wait("stalled builds/gone", 1);
    assert_eq!(client.line_within(Duration::from_millis(400)), None);
    let state = server.state(server.vmms()[0]).unwrap();
    assert_eq!(state.stalled + state.waiting, 1);
    // What is given back while it waits is zeros when it is answered; so is nothing else.
    client.say("remove 30 1");
    assert_eq!(client.line(), "remove 30");
    assert_eq!(client.line(), "page 30 0");
    client.say("touch 31");
    street.house.notes.wait("stalled builds/gone", 2);
    broken.store(false, Ordering::Relaxed);
    assert_eq!(client.line(), page(31));
    street.house.notes.wait("served late", 2);
}

#[test]
fn what_is_not_mended_kills_the_vmm_with_the_name_of_the_blob() {
    let server = server();
    let options = Options {
        stall_max: Duration::from_millis(200),
        ..Options::default()
    };
    let (street, mut client) = scripted(&server, options);
    street
        .house
        .pages
        .set(|_, _| Err(Unreadable::damaged("builds/abc", "its digest")));
    let begin = Instant::now();
    client.say("touch 30");
    client.dies_of(SIGKILL);
    assert!(begin.elapsed() >= Duration::from_millis(200));
    street.house.notes.wait("killed builds/abc: its digest", 1);
    assert_eq!(
        client.line_within(Duration::from_secs(1)),
        None,
        "it saw something"
    );
}

#[test]
fn a_page_is_poisoned_where_the_policy_says_so() {
    let server = server();
    let options = Options {
        stall_max: Duration::from_millis(100),
        on_bad: OnBad::Poison,
        ..Options::default()
    };
    let (street, mut client) = scripted(&server, options);
    street
        .house
        .pages
        .set(|_, _| Err(Unreadable::damaged("builds/abc", "its digest")));
    client.say("touch 30");
    client.dies_of(SIGBUS);
    street.house.notes.wait("poisoned builds/abc", 1);
    street.house.notes.wait("exited", 1);
}

#[test]
fn a_source_that_never_answers_or_panics_ends_its_vmm_alone() {
    let server = server();
    let options = Options {
        stall_max: Duration::from_millis(200),
        ..Options::default()
    };
    let (good, mut right) = scripted(&server, Options::default());
    let (hung, mut one) = scripted(&server, options);
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let same = gate.clone();
    hung.house.pages.set(move |_, _| {
        let open = same.0.lock().unwrap();
        drop(same.1.wait_while(open, |open| !*open).unwrap());
        Ok(())
    });
    let (broken, mut other) = scripted(&server, Options::default());
    broken
        .house
        .pages
        .set(|_, _| panic!("a fault of the source"));
    for number in 0..8 {
        one.say(&format!("touch {}", number * 16));
    }
    other.say("touch 1");
    other.dies_of(SIGKILL);
    broken.house.notes.wait("killed the pager failed", 1);
    right.say("touch 2");
    assert_eq!(right.line(), page(2));
    one.dies_of(SIGKILL);
    hung.house
        .notes
        .wait("killed a page was not there within the bound", 1);
    right.say("touch 100");
    assert_eq!(right.line(), page(100));
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    assert_eq!(good.house.notes.count("exited"), 0);
}

#[test]
fn a_vmm_that_is_killed_while_it_waits_leaves_nothing() {
    let server = server();
    let (street, mut client) = scripted(&server, Options::default());
    street
        .house
        .pages
        .set(|_, _| Err(Unreadable::away("builds/gone", "no answer")));
    client.say("touch 30");
    street.house.notes.wait("stalled builds/gone", 1);
    client.child.kill().unwrap();
    client.dies_of(SIGKILL);
    street.house.notes.wait("exited", 1);
    assert!(server.vmms().is_empty());
}

#[test]
fn memory_that_was_not_declared_ends_the_vmm() {
    let server = server();
    let mut orders = script(7);
    orders["mode"] = "hidden".into();
    let street = Street::new(&server, 7, size(&orders), Options::default());
    let mut client = Client::start(&street.socket, &orders);
    assert_eq!(client.line(), "ready");
    client.say(&format!("touch {}", 4 * MIB / 4096 + 1));
    client.dies_of(SIGKILL);
    assert_eq!(
        client.line_within(Duration::from_secs(1)),
        None,
        "it saw something"
    );
    assert_eq!(street.house.notes.count("exited"), 0);
}

#[test]
fn who_drops_the_server_kills_its_vmms_before_the_last_close() {
    for held in [false, true] {
        let server = server();
        let (street, mut client) = scripted(&server, Options::default());
        if held {
            street
                .house
                .pages
                .set(|_, _| Err(Unreadable::away("builds/gone", "no answer")));
            client.say("touch 30");
            street.house.notes.wait("stalled builds/gone", 1);
        }
        drop(server);
        // A client that outlives the descriptor reads zeros, and says so.
        client.try_say("touch 40");
        client.dies_of(SIGKILL);
        assert_eq!(
            client.line_within(Duration::from_secs(1)),
            None,
            "it saw something"
        );
        assert_eq!(
            street
                .house
                .notes
                .count("killed the pager was asked to end it"),
            1
        );
    }
}

/// Fills what is missing ahead of the VMM; how many bytes that were.
fn fill_all(street: &Street, session: &Session, end: u64) -> u64 {
    let (mut at, mut filled, mut scratch) = (0, 0, Scratch::default());
    while at < end {
        let wanted = session.wanted(at, (at + MIB).min(end));
        at = wanted.next;
        if wanted.length > 0 {
            let mut parts = Vec::new();
            let pages = &street.house.pages;
            let length = wanted.length as usize;
            pages.read(wanted.offset, length, &mut parts).unwrap();
            let more = session.fill_ahead(wanted.offset, &parts, |_| (), &mut scratch);
            filled += more.unwrap_or_default();
        }
    }
    filled
}

#[test]
fn every_byte_is_right_while_pages_are_filled_ahead() {
    let server = server();
    let orders = json!({"seed": 7, "regions": [4 * MIB, 2 * MIB + 36864], "mode": "stress",
        "threads": 4, "seconds": 2.0});
    let street = Street::new(&server, 7, size(&orders), Options::default());
    // Faults are answered only when something was filled ahead of them.
    let ahead = Arc::new(AtomicBool::new(false));
    let go = ahead.clone();
    street.house.pages.set(move |_, _| {
        let of_fault = thread::current().name() == Some("uffd");
        while of_fault && !go.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    let mut client = Client::start(&street.socket, &orders);
    assert_eq!(client.line(), "ready");
    street.house.notes.wait("admitted", 1);
    let begin = Instant::now();
    let mut filled = 0;
    while let Some(session) = server.vmms().first().and_then(|id| server.session(*id)) {
        filled += std::thread::scope(|scope| {
            let one = || fill_all(&street, &session, size(&orders));
            let all: Vec<_> = (0..3).map(|_| scope.spawn(one)).collect();
            all.into_iter().map(|one| one.join().unwrap()).sum::<u64>()
        });
        ahead.store(true, Ordering::Relaxed);
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
    client.is_right();
    assert!(filled > 0);
}

#[test]
fn pages_are_filled_ahead_and_those_given_back_are_not() {
    let server = server();
    let (street, mut client) = scripted(&server, Options::default());
    client.say("remove 16 20");
    assert_eq!(client.line(), "remove 16");
    let (id, end) = (server.vmms()[0], size(&script(7)));
    let session = server.session(id).unwrap();
    let pages = fill_all(&street, &session, end) / 4096;
    assert_eq!(pages, end / 4096 - 20);
    let reads = street.house.pages.reads.load(Ordering::Relaxed);
    for number in [0, 15, 36, 700, end / 4096 - 1] {
        client.say(&format!("touch {number}"));
        assert_eq!(client.line(), page(number));
    }
    client.say("touch 17");
    assert_eq!(client.line(), "page 17 0");
    assert_eq!(
        street.house.pages.reads.load(Ordering::Relaxed),
        reads,
        "they were there"
    );
    street.house.notes.wait("served", 1);
    assert_eq!(street.house.notes.count("served"), 1);
}

#[test]
fn a_window_that_crosses_mappings_is_filled_all_the_same() {
    let server = server();
    let (street, mut client) = scripted(&server, Options::default());
    client.say("split 5 3");
    assert_eq!(client.line(), "split 5");
    client.say("touch 1");
    assert_eq!(client.line(), page(1));
    for number in [4, 6, 7, 9, 15] {
        client.say(&format!("touch {number}"));
        assert_eq!(client.line(), page(number));
    }
    street.house.notes.wait("served", 1);
    assert_eq!(street.house.notes.count("served"), 1, "they came together");
}

#[test]
fn a_page_that_is_gone_without_a_word_is_the_end_and_not_old_bytes() {
    let server = server();
    let mut orders = script(7);
    orders["mode"] = "file".into();
    let street = Street::new(&server, 7, size(&orders), Options::default());
    let mut client = Client::start(&street.socket, &orders);
    assert_eq!(client.line(), "ready");
    client.say("write 2 99");
    assert_eq!(client.line(), "page 2 99");
    client.say("remove 4 1");
    assert_eq!(client.line(), "remove 4");
    client.say("punch 2 1");
    assert_eq!(client.line(), "punch 2");
    client.say("touch 2");
    let status = client.end();
    assert!(!status.success());
    assert_eq!(
        client.line_within(Duration::from_secs(1)),
        None,
        "it saw something"
    );
}
