//! Unsigned LEB128 of at most five bytes (35 bits: page counts up to 2^32), always in its shortest
//! form, and zigzag for signed differences.

use crate::error::{FormatError, Result};

const LEN_MAX: usize = 5;

pub(crate) fn put(to: &mut Vec<u8>, mut value: u64) {
    debug_assert!(value < 1 << 35);
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

/// Reads one value at `*at` and moves past it.
#[inline]
pub(crate) fn take(from: &[u8], at: &mut usize, part: &'static str) -> Result<u64> {
    match from.get(*at) {
        Some(&byte) if byte < 0x80 => {
            *at += 1;
            Ok(u64::from(byte))
        }
        _ => take_long(from, at, part),
    }
}

/// Reads a whole column of `count` values into `into`; the column has nothing else.
///
/// Most values have one byte, so eight of them are tried at once.
pub(crate) fn take_column(
    from: &[u8],
    count: usize,
    into: &mut Vec<u64>,
    part: &'static str,
) -> Result<()> {
    const LONG: u64 = 0x8080_8080_8080_8080;
    into.clear();
    into.reserve(count);
    let mut at = 0;
    while into.len() < count {
        if let Some(eight) = from[at..]
            .first_chunk::<8>()
            .filter(|_| count - into.len() >= 8)
        {
            if u64::from_le_bytes(*eight) & LONG == 0 {
                into.extend(eight.iter().map(|byte| u64::from(*byte)));
                at += 8;
                continue;
            }
        }
        into.push(take(from, &mut at, part)?);
    }
    if at != from.len() {
        return Err(FormatError::NotCanonical {
            what: "a column is longer than its extents",
        });
    }
    Ok(())
}

fn take_long(from: &[u8], at: &mut usize, part: &'static str) -> Result<u64> {
    let mut value = 0u64;
    for step in 0..LEN_MAX {
        let byte = *from
            .get(*at + step)
            .ok_or(FormatError::Truncated { part })?;
        value |= u64::from(byte & 0x7f) << (7 * step);
        if byte < 0x80 {
            if byte == 0 && step > 0 {
                return Err(FormatError::NotCanonical {
                    what: "a number is longer than it has to be",
                });
            }
            *at += step + 1;
            return Ok(value);
        }
    }
    Err(FormatError::OutOfRange {
        part,
        found: value,
        limit: (1 << 35) - 1,
    })
}

pub(crate) fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

pub(crate) fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_put_is_taken(value in 0u64..1 << 35, delta in -(1i64 << 33)..1 << 33) {
            let mut bytes = Vec::new();
            put(&mut bytes, value);
            put(&mut bytes, zigzag(delta));
            let mut at = 0;
            prop_assert_eq!(take(&bytes, &mut at, "value").unwrap(), value);
            prop_assert_eq!(unzigzag(take(&bytes, &mut at, "delta").unwrap()), delta);
            prop_assert_eq!(at, bytes.len());
        }
    }

    proptest! {
        #[test]
        fn a_column_is_taken_as_its_values_are(
            values in prop::collection::vec(prop_oneof![9 => 0u64..128, 1 => 0u64..1 << 35], 0..99),
        ) {
            let mut bytes = Vec::new();
            values.iter().for_each(|value| put(&mut bytes, *value));
            let mut taken = vec![7];
            take_column(&bytes, values.len(), &mut taken, "column").unwrap();
            prop_assert_eq!(&taken, &values);
            bytes.push(1);
            prop_assert!(take_column(&bytes, values.len(), &mut taken, "column").is_err());
            prop_assert!(take_column(&bytes, values.len() + 2, &mut taken, "column").is_err());
        }
    }

    #[test]
    fn long_forms_and_short_ends_are_refused() {
        let wrong = |bytes: &[u8]| take(bytes, &mut 0, "value").unwrap_err();
        assert!(matches!(
            wrong(&[0x80, 0x00]),
            FormatError::NotCanonical { .. }
        ));
        assert!(matches!(
            wrong(&[]),
            FormatError::Truncated { part: "value" }
        ));
        assert!(matches!(wrong(&[0x80]), FormatError::Truncated { .. }));
        assert!(matches!(wrong(&[0xff; 6]), FormatError::OutOfRange { .. }));
    }
}
