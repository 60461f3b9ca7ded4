//! Any bytes as a request of the kernel: `cargo fuzz run requests`.
#![no_main]

#[path = "../checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::request(input));
