//! What `qemu-img map -U --output=json` says of an overlay without a backing file.
//!
//! The array's entries ascend without overlap. An entry that is not `present` is the parent's; one
//! that is `zero` reads as zeros; one with `data` lies raw in the file at `offset`. Everything else
//! (compressed clusters, a data entry without an offset, parts of pages) is refused: a page would
//! be wrong.

use std::fmt;

use diapause_format::{PAGES_MAX, PAGE_SIZE};
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde::Deserialize;

/// Largest map that is parsed: about a million entries.
pub const MAP_BYTES_MAX: usize = 256 << 20;

/// A run of device pages that the overlay holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OverlayRun {
    /// First page of the device.
    pub page: u64,
    /// Pages, at least 1.
    pub pages: u64,
    /// Where the first byte lies in the file; None for zeros.
    pub offset: Option<u64>,
}

/// One entry of the map; unknown fields (`depth`, `filename`) say nothing that matters here.
#[derive(Deserialize)]
struct Entry {
    start: u64,
    length: u64,
    present: bool,
    zero: bool,
    data: bool,
    offset: Option<u64>,
    #[serde(default)]
    compressed: bool,
}

/// Reads a map of a device of `page_count` pages; runs come out merged.
///
/// # Errors
/// What is wrong with it, in words: it is no blob of ours.
pub fn parse_map(json: &[u8], page_count: u64) -> Result<Vec<OverlayRun>, String> {
    if json.len() > MAP_BYTES_MAX || page_count > PAGES_MAX {
        return Err(format!(
            "a map of {} bytes over {page_count} pages",
            json.len()
        ));
    }
    let mut parser = serde_json::Deserializer::from_slice(json);
    let runs = parser
        .deserialize_seq(Runs { page_count })
        .map_err(|error| error.to_string())?;
    parser.end().map_err(|error| error.to_string())?;
    Ok(runs)
}

/// Turns entries into runs one at a time, so that only runs are ever in memory.
struct Runs {
    page_count: u64,
}

impl<'json> Visitor<'json> for Runs {
    type Value = Vec<OverlayRun>;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "the array of qemu-img map")
    }

    fn visit_seq<A: SeqAccess<'json>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut runs = Vec::new();
        let mut next_page = 0;
        while let Some(entry) = entries.next_element::<Entry>()? {
            let run = read_entry(&entry, next_page, self.page_count).map_err(A::Error::custom)?;
            next_page = (entry.start + entry.length) / PAGE_SIZE as u64;
            if let Some(run) = run {
                add(&mut runs, run);
            }
        }
        Ok(runs)
    }
}

fn read_entry(
    entry: &Entry,
    next_page: u64,
    page_count: u64,
) -> Result<Option<OverlayRun>, String> {
    let page = PAGE_SIZE as u64;
    let Entry { start, length, .. } = *entry;
    if start % page != 0 || length % page != 0 || length == 0 {
        return Err(format!(
            "the entry at {start} of length {length} is not made of pages"
        ));
    }
    let end = start
        .checked_add(length)
        .filter(|end| *end <= page_count * page);
    if end.is_none() || start / page < next_page {
        return Err(format!(
            "the entry at {start} of length {length} is out of place"
        ));
    }
    if entry.compressed {
        return Err(format!("the cluster at {start} is compressed"));
    }
    if !entry.present {
        return Ok(None);
    }
    let offset = match (entry.zero, entry.data, entry.offset) {
        (true, _, _) => None,
        (false, true, Some(offset)) => Some(offset),
        _ => {
            return Err(format!(
                "the entry at {start} has no offset: it can't be read raw"
            ))
        }
    };
    if offset.is_some_and(|offset| offset.checked_add(length).is_none()) {
        return Err(format!(
            "the offset of the entry at {start} is out of range"
        ));
    }
    Ok(Some(OverlayRun {
        page: start / page,
        pages: length / page,
        offset,
    }))
}

/// Appends a run, or makes the last one longer where the two are one.
fn add(runs: &mut Vec<OverlayRun>, run: OverlayRun) {
    if let Some(last) = runs.last_mut() {
        let bytes = last.pages * PAGE_SIZE as u64;
        let continues = last.offset.map(|offset| offset + bytes) == run.offset;
        if last.page + last.pages == run.page && continues {
            last.pages += run.pages;
            return;
        }
    }
    runs.push(run);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(start: u64, length: u64, rest: &str) -> String {
        format!("{{\"start\": {start}, \"length\": {length}, \"depth\": 0, {rest}}}")
    }

    const DATA: &str = "\"present\": true, \"zero\": false, \"data\": true, \"offset\": 327680";
    const ZERO: &str = "\"present\": true, \"zero\": true, \"data\": false";
    const HOLE: &str = "\"present\": false, \"zero\": true, \"data\": false";

    fn parse(entries: &[String]) -> Result<Vec<OverlayRun>, String> {
        parse_map(format!("[{}]", entries.join(", ")).as_bytes(), 64)
    }

    #[test]
    fn holes_are_left_out_and_runs_are_merged() {
        let next = DATA.replace("327680", "335872");
        let runs = parse(&[
            entry(0, 8192, HOLE),
            entry(8192, 8192, DATA),
            entry(16384, 4096, &next),
            entry(20480, 4096, ZERO),
            entry(24576, 4096, ZERO),
        ]);
        let data = OverlayRun {
            page: 2,
            pages: 3,
            offset: Some(327_680),
        };
        let zero = OverlayRun {
            page: 5,
            pages: 2,
            offset: None,
        };
        assert_eq!(runs.unwrap(), [data, zero]);
        assert_eq!(parse(&[]).unwrap(), []);
    }

    #[test]
    fn what_cannot_be_read_raw_is_refused() {
        let refused = |entries: &[String], word: &str| {
            let error = parse(entries).unwrap_err();
            assert!(error.contains(word), "{error}");
        };
        let no_offset = "\"present\": true, \"zero\": false, \"data\": true";
        refused(&[entry(0, 4096, no_offset)], "no offset");
        refused(
            &[entry(0, 4096, &format!("{DATA}, \"compressed\": true"))],
            "compressed",
        );
        refused(&[entry(512, 4096, DATA)], "not made of pages");
        refused(&[entry(0, 100, DATA)], "not made of pages");
        refused(&[entry(0, 0, DATA)], "not made of pages");
        refused(&[entry(0, 65 * 4096, DATA)], "out of place");
        refused(
            &[entry(4096, 4096, DATA), entry(4096, 4096, DATA)],
            "out of place",
        );
        refused(&[entry(u64::MAX - 4095, 4096, DATA)], "out of place");
        refused(
            &[entry(0, 4096, "\"zero\": false, \"data\": true")],
            "present",
        );
        let far = DATA.replace("327680", "18446744073709551615");
        refused(&[entry(0, 4096, &far)], "out of range");
    }

    #[test]
    fn what_is_no_map_is_refused() {
        for json in ["", "{}", "[1]", "[", "[]x", "null", "[{\"start\": -1}]"] {
            assert!(parse_map(json.as_bytes(), 64).is_err(), "{json}");
        }
        assert!(parse_map(b"[]", PAGES_MAX + 1).is_err());
    }
}
