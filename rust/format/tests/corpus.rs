//! Replays the fuzzing corpora: what once was interesting stays checked without a fuzzer.

use std::path::Path;

#[path = "../fuzz/checks.rs"]
mod checks;

fn replay(name: &str, check: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let files = std::fs::read_dir(&directory).expect("the corpus is committed");
    let mut count = 0;
    for file in files {
        let bytes = std::fs::read(file.expect("entry").path()).expect("readable");
        check(&bytes);
        // Cut and flipped versions reach deeper than the corpus alone.
        for at in (0..bytes.len()).step_by(bytes.len() / 64 + 1) {
            check(&bytes[..at]);
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            check(&flipped);
        }
        count += 1;
    }
    assert!(count >= 4, "{} has {count} files", directory.display());
}

#[test]
fn headers() {
    replay("read_header", checks::header);
}

#[test]
fn builds() {
    replay("read_build", checks::build);
}

#[test]
fn captures() {
    replay("read_capture", checks::capture);
}
