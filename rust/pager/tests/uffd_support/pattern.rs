//! Memory whose every word says where it belongs.

/// Words of a small page.
pub const WORDS: usize = 512;

/// A word of a small page of the device: page and seed can be told from it. Some pages are zeros.
pub fn word(seed: u64, page: u64, word: usize) -> u64 {
    if page % 5 == 3 {
        return 0;
    }
    mix(seed ^ page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (word as u64) << 48) | 1
}

/// A number that looks like chance.
pub fn mix(mut number: u64) -> u64 {
    number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// The next number of a sequence.
pub fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mix(*state)
}
