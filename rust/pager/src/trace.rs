//! What guests touched after earlier resumes of a snapshot, in the order in which it was first
//! asked for: what the next resume is given ahead. `docs/formats/trace.md` is the format.
//!
//! ```text
//!      0  magic "DIAPTRC\0"
//!      8  u32 version, 1
//!     12  u32 bytes of a granule, 65,536
//!     16  u64 bytes of the device
//!     24  u32 resumes that were recorded
//!     28  u32 granules in this trace
//!     32  granules, 8 bytes each, in order: u32 number, u16 resumes that touched it,
//!         u8 resumes since the last that did, u8 0
//!    end  BLAKE3 of all before, 32 bytes
//! ```
//!
//! A trace is a hint: what it says decides when bytes are brought, never which. One that is damaged
//! is as good as none.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use diapause_format::digest;

/// What is asked for and brought as one: what the kernel maps around a fault.
pub const GRANULE: u64 = 64 << 10;
/// Granules of one trace: 4 GiB of a device.
pub const GRANULES_MAX: usize = 64 << 10;
/// A granule that so many resumes in a row did not touch is left out.
const UNTOUCHED_MAX: u8 = 3;

const MAGIC: &[u8; 8] = b"DIAPTRC\0";
const VERSION: u32 = 1;
const HEAD: usize = 32;
const ENTRY: usize = 8;
const DIGEST: usize = 32;
const BYTES_MAX: usize = HEAD + GRANULES_MAX * ENTRY + DIGEST;

/// One granule of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granule {
    /// Its number on the device.
    pub number: u32,
    /// How many resumes touched it.
    pub touched: u16,
    /// How many resumes there were since the last that did.
    pub untouched: u8,
}

/// Granules of one device in the order in which they will be wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Size of the device.
    pub device_bytes: u64,
    /// Resumes that were recorded.
    pub resumes: u32,
    /// The granules, each once.
    pub granules: Vec<Granule>,
}

impl Trace {
    /// Nothing is known of a device.
    pub fn empty(device_bytes: u64) -> Self {
        Self {
            device_bytes,
            resumes: 0,
            granules: Vec::new(),
        }
    }

    /// This and one resume more: `touched` is what it touched, ascending; `asked` the order in
    /// which the kernel asked for what it did not have, with what it read ahead.
    ///
    /// What is known keeps its place. What was asked for in vain comes behind it, and what somebody
    /// else had brought before, whose order nobody saw, comes last.
    #[must_use]
    pub fn with(mut self, asked: &[u32], touched: &[u32]) -> Self {
        let all: HashSet<u32> = touched.iter().copied().collect();
        self.resumes = self.resumes.saturating_add(1);
        for granule in &mut self.granules {
            if all.contains(&granule.number) {
                granule.touched = granule.touched.saturating_add(1);
                granule.untouched = 0;
            } else {
                granule.untouched = granule.untouched.saturating_add(1);
            }
        }
        self.granules.retain(|one| one.untouched < UNTOUCHED_MAX);
        let mut there: HashSet<u32> = self.granules.iter().map(|one| one.number).collect();
        let in_order = asked.iter().filter(|number| all.contains(number));
        for number in in_order.chain(touched) {
            if there.insert(*number) {
                self.granules.push(Granule {
                    number: *number,
                    touched: 1,
                    untouched: 0,
                });
            }
        }
        self.granules.truncate(GRANULES_MAX);
        self
    }

    /// Its bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.granules.len() * ENTRY + DIGEST);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((GRANULE as u32).to_le_bytes());
        bytes.extend(self.device_bytes.to_le_bytes());
        bytes.extend(self.resumes.to_le_bytes());
        bytes.extend((self.granules.len() as u32).to_le_bytes());
        for granule in &self.granules {
            bytes.extend(granule.number.to_le_bytes());
            bytes.extend(granule.touched.to_le_bytes());
            bytes.extend([granule.untouched, 0]);
        }
        bytes.extend(digest(&bytes));
        bytes
    }

    /// The trace that these bytes are.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, &'static str> {
        if bytes.len() > BYTES_MAX {
            return Err("it is too large");
        }
        let body = bytes.len().checked_sub(DIGEST).filter(|body| *body >= HEAD);
        let (body, sum) = bytes.split_at(body.ok_or("it is too short")?);
        if &body[..8] != MAGIC || u32::from_le_bytes(field(body, 8)) != VERSION {
            return Err("it is no trace of version 1");
        }
        if digest(body) != sum {
            return Err("its digest differs");
        }
        let device_bytes = u64::from_le_bytes(field(body, 16));
        let count = u32::from_le_bytes(field(body, 28)) as usize;
        if u64::from(u32::from_le_bytes(field(body, 12))) != GRANULE {
            return Err("it has other granules");
        }
        if body.len() != HEAD + count * ENTRY {
            return Err("it has another length than it says");
        }
        let granules: Vec<_> = body[HEAD..].chunks_exact(ENTRY).map(granule).collect();
        let mut seen = HashSet::with_capacity(count);
        let inside = |one: &Granule| u64::from(one.number) * GRANULE < device_bytes;
        if !granules
            .iter()
            .all(|one| inside(one) && seen.insert(one.number))
        {
            return Err("it names a granule twice, or one that is none");
        }
        Ok(Self {
            device_bytes,
            resumes: u32::from_le_bytes(field(body, 24)),
            granules,
        })
    }

    /// Reads one of a device of that size.
    ///
    /// # Errors
    /// Missing, damaged, of a device of another size.
    pub fn read(path: &Path, device_bytes: u64) -> io::Result<Self> {
        let mut bytes = Vec::new();
        // One byte too many is refused by whoever parses it.
        File::open(path)?
            .take(BYTES_MAX as u64 + 1)
            .read_to_end(&mut bytes)?;
        let wrong = |cause| io::Error::new(io::ErrorKind::InvalidData, cause);
        let trace = Self::from_bytes(&bytes).map_err(wrong)?;
        if trace.device_bytes != device_bytes {
            return Err(wrong("it is of a device of another size"));
        }
        Ok(trace)
    }

    /// Writes it whole beside its place, then puts it there. Not synced: it is a hint.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let fresh = path.with_extension("fresh");
        let mut options = File::options();
        options.write(true).create(true).truncate(true);
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let written = options
            .open(&fresh)
            .and_then(|mut file| file.write_all(&self.to_bytes()))
            .and_then(|()| fs::rename(&fresh, path));
        if written.is_err() {
            let _ = fs::remove_file(&fresh);
        }
        written
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

fn granule(bytes: &[u8]) -> Granule {
    Granule {
        number: u32::from_le_bytes(field(bytes, 0)),
        touched: u16::from_le_bytes(field(bytes, 4)),
        untouched: bytes[6],
    }
}

/// Granules as parts of a device, offset and bytes each, neighbours together up to `piece_bytes`.
/// So many of them at a time are sorted by their place: their order among themselves matters less
/// than reads that are whole.
pub fn pieces(
    granules: &mut [u32],
    device_bytes: u64,
    piece_bytes: u64,
    sorted: usize,
) -> Vec<(u64, u64)> {
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    for some in granules.chunks_mut(sorted) {
        some.sort_unstable();
        for number in some {
            let start = u64::from(*number) * GRANULE;
            let length = GRANULE.min(device_bytes - start);
            match pieces.last_mut() {
                Some((first, so_far)) if *first + *so_far == start && *so_far < piece_bytes => {
                    *so_far += length;
                }
                _ => pieces.push((start, length)),
            }
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(trace: &Trace) -> Vec<u32> {
        trace.granules.iter().map(|one| one.number).collect()
    }

    const DEVICE: u64 = 100 * GRANULE;

    #[test]
    fn the_order_is_that_of_the_first_faults() {
        let trace = Trace::empty(DEVICE).with(&[9, 8, 3, 4], &[3, 4, 7, 9]);
        assert_eq!(numbers(&trace), [9, 3, 4, 7]);
        let next = trace.with(&[50, 2], &[2, 4, 9, 50]);
        assert_eq!(numbers(&next), [9, 3, 4, 7, 50, 2]);
        assert_eq!((next.resumes, next.granules[0].touched), (2, 2));
        assert_eq!(
            (next.granules[1].touched, next.granules[1].untouched),
            (1, 1)
        );
    }

    #[test]
    fn what_nobody_touches_any_more_is_left_out() {
        let mut trace = Trace::empty(DEVICE).with(&[], &[1, 2]);
        for _ in 0..UNTOUCHED_MAX {
            assert!(numbers(&trace).contains(&1));
            trace = trace.with(&[], &[2]);
        }
        assert_eq!(numbers(&trace), [2]);
        assert_eq!(trace.granules[0].touched, 1 + u16::from(UNTOUCHED_MAX));
    }

    #[test]
    fn there_is_a_bound() {
        let all: Vec<u32> = (0..GRANULES_MAX as u32 + 9).collect();
        let trace = Trace::empty(1 << 40).with(&[], &all);
        assert_eq!(trace.granules.len(), GRANULES_MAX);
        assert_eq!(Trace::from_bytes(&trace.to_bytes()).unwrap(), trace);
    }

    #[test]
    fn version_1_is_written_as_it_always_was() {
        let golden = include_bytes!("../../../tests/formats/golden/trace.v1");
        let trace = Trace::empty(DEVICE)
            .with(&[9, 8, 3], &[3, 7, 9])
            .with(&[5], &[5, 7, 9]);
        assert_eq!(trace.to_bytes(), golden);
        assert_eq!(Trace::from_bytes(golden).unwrap(), trace);
    }

    #[test]
    fn any_flipped_bit_and_any_truncation_is_an_error() {
        let bytes = Trace::empty(DEVICE).with(&[5], &[5, 7, 9]).to_bytes();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                assert!(Trace::from_bytes(&flipped).is_err(), "{at} {bit}");
            }
            assert!(Trace::from_bytes(&bytes[..at]).is_err(), "{at}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(Trace::from_bytes(&longer).is_err());
    }

    #[test]
    fn what_is_no_granule_of_the_device_is_an_error_behind_a_right_digest() {
        for wrong in [vec![100], vec![5, 5]] {
            let granules = wrong.iter().map(|number| Granule {
                number: *number,
                touched: 1,
                untouched: 0,
            });
            let trace = Trace {
                granules: granules.collect(),
                ..Trace::empty(DEVICE)
            };
            assert!(Trace::from_bytes(&trace.to_bytes()).is_err());
        }
    }

    #[test]
    fn files_are_replaced_whole_and_of_one_device() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.memory");
        assert!(Trace::read(&path, DEVICE).is_err());
        for touched in [[1, 2], [3, 4]] {
            let trace = Trace::empty(DEVICE).with(&[], &touched);
            trace.write(&path).unwrap();
            assert_eq!(Trace::read(&path, DEVICE).unwrap(), trace);
        }
        assert!(Trace::read(&path, DEVICE + GRANULE).is_err());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_trace_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..200)
        ) {
            let _ = Trace::from_bytes(&bytes);
        }

        #[test]
        fn any_history_is_written_and_read(
            rounds in proptest::collection::vec(
                (
                    proptest::collection::vec(0..100u32, 0..30),
                    proptest::collection::btree_set(0..100u32, 0..40),
                ),
                1..6,
            )
        ) {
            let mut trace = Trace::empty(DEVICE);
            for (asked, touched) in rounds {
                let touched: Vec<u32> = touched.into_iter().collect();
                trace = trace.with(&asked, &touched);
                prop_assert!(touched.iter().all(|one| numbers(&trace).contains(one)));
            }
            prop_assert_eq!(Trace::from_bytes(&trace.to_bytes()).unwrap(), trace);
        }
    }

    #[test]
    fn neighbours_are_one_piece_up_to_its_size_and_groups_keep_their_order() {
        let found = pieces(
            &mut [9, 8, 7, 1, 30, 2, 29],
            30 * GRANULE + 4096,
            2 * GRANULE,
            4,
        );
        let wanted = [
            (1, GRANULE),
            (7, 2 * GRANULE),
            (9, GRANULE),
            (2, GRANULE),
            (29, GRANULE + 4096),
        ];
        let wanted: Vec<_> = wanted.map(|(at, length)| (at * GRANULE, length)).into();
        assert_eq!(found, wanted);
    }
}
