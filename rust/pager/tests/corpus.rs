//! Replays the fuzzing corpora: what once was interesting stays checked without a fuzzer.
#![allow(clippy::unwrap_used)]

use std::path::Path;

#[path = "../fuzz/checks.rs"]
mod checks;

fn replay(name: &str, check: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let mut count = 0;
    for file in std::fs::read_dir(&directory).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        check(&bytes);
        // Cut and flipped versions reach deeper than the corpus alone.
        for at in (0..bytes.len()).step_by(bytes.len() / 256 + 1) {
            check(&bytes[..at]);
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            check(&flipped);
        }
        count += 1;
    }
    assert!(count >= 10, "{} has {count} files", directory.display());
}

#[test]
fn requests_of_the_kernel() {
    replay("requests", checks::request);
}

#[test]
fn packets_of_clients() {
    replay("packets", checks::packet);
}
