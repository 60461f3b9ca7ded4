//! The outbox against a model: whatever is cut, the host gets every frame once, in order.

use std::io;

use diapause_agent::frame::{decode_all, kind};
use diapause_agent::outbox::Outbox;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Push(usize),
    Flush(usize),
    Acknowledge,
    Cut,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0usize..3000).prop_map(Step::Push),
        4 => (0usize..5000).prop_map(Step::Flush),
        2 => Just(Step::Acknowledge),
        1 => Just(Step::Cut),
    ];
    prop::collection::vec(step, 1..120)
}

/// Sends up to `budget` bytes onto the connection.
fn flush(outbox: &mut Outbox, mut budget: usize, connection: &mut Vec<u8>) {
    let outcome = outbox.flush(0, |bytes| {
        let count = bytes.len().min(budget);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        budget -= count;
        connection.extend_from_slice(&bytes[..count]);
        Ok(count)
    });
    assert!(outcome.is_ok());
}

/// What the host takes from a connection: each frame that is the next one.
fn receive(connection: &[u8], received: &mut Vec<(u64, usize)>) {
    decode_all(connection, 4096, |event| {
        let (header, payload, _) = event.expect("only whole frames and a cut");
        let next = received.last().map_or(1, |(seq, _)| seq + 1);
        assert!(header.seq <= next, "a gap");
        if header.seq == next {
            received.push((header.seq, payload.len()));
        }
    });
}

proptest! {
    #[test]
    fn every_frame_arrives_once_and_in_order(steps in steps()) {
        let (mut outbox, mut connection) = (Outbox::default(), Vec::new());
        let (mut sizes, mut received) = (Vec::new(), Vec::new());
        for step in steps {
            match step {
                Step::Push(size) => {
                    outbox.push(kind::STDOUT, 1, &vec![1; size]);
                    sizes.push(size);
                }
                Step::Flush(budget) => flush(&mut outbox, budget, &mut connection),
                Step::Acknowledge => {
                    receive(&connection, &mut received);
                    prop_assert!(outbox.acknowledge(received.len() as u64));
                }
                Step::Cut => {
                    receive(&connection, &mut received);
                    connection.clear();
                    prop_assert!(outbox.rewind(received.len() as u64));
                }
            }
        }
        flush(&mut outbox, usize::MAX, &mut connection);
        receive(&connection, &mut received);
        let got: Vec<usize> = received.iter().map(|(_, size)| *size).collect();
        prop_assert_eq!(got, sizes);
        prop_assert!(outbox.acknowledge(received.len() as u64));
        prop_assert!(outbox.has_room());
    }
}

#[test]
fn what_was_never_sent_can_not_be_acknowledged() {
    let mut outbox = Outbox::default();
    outbox.push(kind::EXIT, 1, b"{}");
    assert!(!outbox.acknowledge(1));
    let mut connection = Vec::new();
    flush(&mut outbox, 10, &mut connection);
    assert!(!outbox.acknowledge(1), "half a frame");
    flush(&mut outbox, 1000, &mut connection);
    assert!(!outbox.acknowledge(u64::MAX));
    assert!(outbox.acknowledge(1));
    assert!(outbox.acknowledge(0));
    assert!(!outbox.rewind(u64::MAX) && !outbox.rewind(0));
}

#[test]
fn a_host_that_acknowledges_nothing_meets_a_limit() {
    let mut outbox = Outbox::default();
    while outbox.has_room() {
        outbox.push(kind::STDOUT, 1, &[0; 30_000]);
    }
    assert!(!outbox.is_over_limit());
    while !outbox.is_over_limit() {
        outbox.push(kind::CREDIT, 1, &[0; 8]);
    }
}
