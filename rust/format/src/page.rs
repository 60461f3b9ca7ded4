//! The page, and the digests of its formats.

/// Bytes of a page, of memory and disk alike.
pub const PAGE_SIZE: usize = 4096;

/// A BLAKE3-256 digest.
pub type Digest = [u8; 32];

/// Whether all bytes are zero. Wide words, early exit each 256 bytes: a page that is not zero
/// usually says so at once.
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut chunks = bytes.chunks_exact(256);
    let body = chunks.by_ref().all(|chunk| {
        let words = chunk.chunks_exact(8);
        words.fold(0u64, |sum, word| sum | crate::bytes::u64_at(word, 0)) == 0
    });
    body && chunks.remainder().iter().all(|byte| *byte == 0)
}

/// The BLAKE3-256 digest of bytes in memory.
pub fn digest(bytes: &[u8]) -> Digest {
    *blake3::hash(bytes).as_bytes()
}

/// The first 16 bytes of the BLAKE3 digest: what frames and captured pages are verified by.
pub fn digest16(bytes: &[u8]) -> [u8; 16] {
    crate::bytes::array_at(blake3::hash(bytes).as_bytes(), 0)
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

/// Reads 64 lower-case hex digits; None for anything else.
pub fn parse_hex32(text: &str) -> Option<Digest> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, pair) in digest.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(digest)
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_set_byte_anywhere_is_not_zero() {
        let mut page = [0u8; PAGE_SIZE];
        assert!(is_zero(&page));
        for at in 0..PAGE_SIZE {
            page[at] = 1;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
        assert!(is_zero(&[]) && is_zero(&[0; 7]) && !is_zero(&[0, 0, 9]));
    }

    #[test]
    fn hex_is_read_back_and_nothing_else_is() {
        let digest: Digest = std::array::from_fn(|at| (at * 37) as u8);
        assert_eq!(parse_hex32(&hex(&digest)), Some(digest));
        assert_eq!(parse_hex32(&hex(&digest).to_uppercase()), None);
        assert_eq!(parse_hex32("00"), None);
        assert_eq!(parse_hex32(&"g".repeat(64)), None);
    }
}
