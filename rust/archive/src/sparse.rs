//! Which pieces of a file hold data: found by asking the file system, carried as text in the
//! stream (GNU's sparse format 1.0).

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::unistd::{lseek, Whence};

use crate::limits::{FILE_BYTES_MAX, PIECES_MAX};

/// A decimal number in a map, with its line end.
const LINE_MAX: usize = 21;

/// Ascending (offset, length) of the pieces with data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Map(Vec<(u64, u64)>);

impl Map {
    /// The pieces of a file of `size` bytes: ascending, apart or touching, inside. None otherwise.
    pub fn new(pieces: Vec<(u64, u64)>, size: u64) -> Option<Self> {
        let mut end = 0u64;
        for (offset, length) in &pieces {
            let next = offset.checked_add(*length)?;
            if *offset < end || next > size {
                return None;
            }
            end = next;
        }
        Some(Self(pieces))
    }

    /// What a file's holes leave; None where it has none, or too many pieces.
    pub fn of(file: impl AsFd, size: u64) -> Option<Self> {
        let mut pieces = Vec::new();
        let mut at = 0u64;
        while at < size {
            let data = match lseek(&file, at as i64, Whence::SeekData) {
                Ok(data) => data as u64,
                Err(Errno::ENXIO) => break, // a hole up to the end
                Err(_) => return None,
            };
            let hole = lseek(&file, data as i64, Whence::SeekHole).ok()? as u64;
            if data >= size || hole <= data || pieces.len() == PIECES_MAX {
                // It is being written, or too broken up: sent whole.
                return (data >= size).then_some(Self(pieces));
            }
            pieces.push((data, hole.min(size) - data));
            at = hole;
        }
        let all: u64 = pieces.iter().map(|piece| piece.1).sum();
        (all < size).then_some(Self(pieces))
    }

    /// The pieces.
    pub fn pieces(&self) -> &[(u64, u64)] {
        &self.0
    }

    /// Bytes of data in all of them.
    pub fn data_bytes(&self) -> u64 {
        self.0.iter().map(|piece| piece.1).sum()
    }

    /// As the stream has it: the count, then offset and length of each, a line a number.
    pub fn encode(&self) -> Vec<u8> {
        let mut text = format!("{}\n", self.0.len());
        for (offset, length) in &self.0 {
            text.push_str(&format!("{offset}\n{length}\n"));
        }
        text.into_bytes()
    }
}

/// Reads a map from the front of an entry's data, byte by byte, so that nothing is kept that is
/// beyond the limits.
#[derive(Default)]
pub struct MapParser {
    line: Vec<u8>,
    count: Option<usize>,
    numbers: Vec<u64>,
}

impl MapParser {
    /// Takes one byte; true once the map is whole. An error says what is wrong.
    pub fn take(&mut self, byte: u8) -> Result<bool, &'static str> {
        if byte != b'\n' {
            if !byte.is_ascii_digit() || self.line.len() >= LINE_MAX {
                return Err("its map of holes is not a list of numbers");
            }
            self.line.push(byte);
            return Ok(false);
        }
        let text = std::mem::take(&mut self.line);
        let number: Option<u64> = std::str::from_utf8(&text).ok().and_then(|t| t.parse().ok());
        let number = number.ok_or("its map of holes is not a list of numbers")?;
        match self.count {
            None if number > PIECES_MAX as u64 => return Err("its map of holes is too long"),
            None => self.count = Some(number as usize),
            Some(_) => self.numbers.push(number),
        }
        Ok(self
            .count
            .is_some_and(|count| self.numbers.len() == 2 * count))
    }

    /// The map of a file of `size` bytes.
    pub fn finish(self, size: u64) -> Result<Map, &'static str> {
        let pieces = self.numbers.chunks_exact(2).map(|pair| (pair[0], pair[1]));
        let map = Map::new(pieces.collect(), size.min(FILE_BYTES_MAX));
        map.ok_or("its map of holes contradicts itself")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &[u8], size: u64) -> Result<Map, &'static str> {
        let mut parser = MapParser::default();
        for byte in text {
            if parser.take(*byte)? {
                return parser.finish(size);
            }
        }
        Err("unfinished")
    }

    #[test]
    fn a_map_comes_back() {
        let map = Map::new(vec![(0, 10), (4096, 5), (8192, 0)], 8192).unwrap();
        assert_eq!(parse(&map.encode(), 8192), Ok(map));
        assert_eq!(parse(b"0\n", 100), Ok(Map::default()));
    }

    #[test]
    fn a_map_that_lies_is_refused() {
        for text in [
            &b"1\n5\n6\n"[..],
            b"2\n0\n5\n4\n1\n",
            b"-1\n",
            b"99999999999999999999999\n",
            b"\n",
            b"1\n18446744073709551615\n2\n",
            b"9999999\n",
            b"x\n",
            b"1\n1",
        ] {
            assert!(parse(text, 10).is_err(), "{}", text.escape_ascii());
        }
    }
}
