//! Any stream, in pieces of any size, is survived by the decoder: `cargo fuzz run frames`.
#![no_main]

use diapause_agent::frame::decode_all;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    if let Some((piece, stream)) = input.split_first() {
        decode_all(stream, usize::from(*piece) * 16 + 1, |_| ());
    }
});
