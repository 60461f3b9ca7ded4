//! Any stream is survived, and touches nothing outside: `cargo fuzz run unpack`.
#![no_main]

#[path = "../check.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|input: &[u8]| check::nothing_outside(input));
