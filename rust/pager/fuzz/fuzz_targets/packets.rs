//! Any text as a client's packet: `cargo fuzz run packets`.
#![no_main]

#[path = "../checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::packet(input));
