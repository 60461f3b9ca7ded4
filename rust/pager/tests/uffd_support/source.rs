//! The pattern as a device, in parts as builds have them.

use diapause_pager::build::{Frame, Unreadable};
use diapause_pager::device::{Origin, Part};
use diapause_pager::uffd::Pages;

use super::pattern::{word, WORDS};

const PAGE: u64 = 4096;

/// A device of the pattern.
#[derive(Debug)]
pub struct Pattern {
    /// What the words are made of.
    pub seed: u64,
    /// Its size.
    pub size_bytes: u64,
}

impl Pages for Pattern {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&self, offset: u64, size: usize, parts: &mut Vec<Part>) -> Result<Origin, Unreadable> {
        let (mut page, end) = (offset / PAGE, (offset + size as u64) / PAGE);
        while page < end {
            if page % 5 == 3 {
                parts.push(Part::Zeros(PAGE as usize));
                page += 1;
                continue;
            }
            // Parts of several kinds and sizes.
            let next_zero = page + (8 - page % 5) % 5;
            let last = end.min(next_zero);
            let bytes: Vec<u8> = (page..last)
                .flat_map(|page| (0..WORDS).map(move |at| (page, at)))
                .flat_map(|(page, at)| word(self.seed, page, at).to_le_bytes())
                .collect();
            parts.push(if page % 2 == 0 {
                Part::Bytes(bytes)
            } else {
                let frame: Frame = [&[7; 4096][..], &bytes].concat().into();
                Part::Frame(frame, 4096, bytes.len())
            });
            page = last;
        }
        Ok(Origin::Local)
    }
}
