//! What must hold for any stream, for the fuzz target and for the tests that replay its corpus.

use std::fs;

use diapause_archive::{unpack, Trust};

/// Unpacks beside a victim: it must stay as it was, and nothing else may come to be, nor stay.
pub fn nothing_outside(input: &[u8]) {
    let around = tempfile::tempdir().expect("a directory");
    let victim = around.path().join("victim");
    fs::write(&victim, "safe").expect("a file");
    let inside = around.path().join("in");
    fs::create_dir(&inside).expect("a directory");
    let done = unpack(input, &inside, Some(b"top"), Trust::NoSetId, &mut |_, _| {
        true
    });
    assert_eq!(fs::read(&victim).expect("the file"), b"safe");
    assert_eq!(fs::read_dir(around.path()).expect("it is there").count(), 2);
    let made = fs::read_dir(&inside).expect("it is there").count();
    assert_eq!(made, usize::from(done.is_ok()), "all of it or nothing");
}
