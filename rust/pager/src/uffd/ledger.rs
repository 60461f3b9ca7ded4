//! What must outlive the process that answers faults: which pages were given back and which were
//! filled, and the messages that were taken from the kernel and not dealt with yet.
//!
//! It is a memfd, which the keeper holds too. After a death nothing else tells a page that was
//! given back (zeros) from one that nobody has touched yet (the snapshot's).
//!
//! - Reading a REMOVE from the descriptor is what lets its thread go on, so it can't be noted
//!   before. Instead the kernel writes the messages *into the ledger*: one system call takes them
//!   and stores them, and a process that is killed in it finishes it first. A successor finds the
//!   messages there and notes them before it answers anything.
//! - "Given back" is never taken back: from then on the page is zeros or what the VMM wrote.
//! - "Filled" is noted after the page is there. A death between the two costs a second try, which
//!   the kernel refuses because the page is there.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

use super::ioctl::{Message, MESSAGE_BYTES};
use super::memory::Mapping;

/// Messages that one read takes.
pub const MESSAGES_MAX: usize = 16;

const MAGIC: u64 = u64::from_le_bytes(*b"dpuffd01");
const PAGE: u64 = 4096;
/// The number of pages follows the magic; the messages have a place of their own.
const PAGES_AT: usize = 8;
const MESSAGES_AT: usize = 1024;

/// The two facts about pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fact {
    /// They were given back: from then on they are zeros.
    Removed,
    /// They are there, since they were last given back.
    Filled,
}

/// A ledger, mapped.
#[derive(Debug)]
pub struct Ledger {
    file: OwnedFd,
    map: Mapping,
    pages: u64,
}

impl Ledger {
    /// An empty one for so many pages.
    ///
    /// # Errors
    /// Where there is no memory.
    pub fn create(pages: u64) -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create("diapause-uffd", flags)?;
        ftruncate(&file, file_bytes(pages) as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let ledger = Self::map(file, pages)?;
        ledger.word(PAGES_AT).store(pages, Ordering::Relaxed);
        ledger.word(0).store(MAGIC, Ordering::Release);
        Ok(ledger)
    }

    /// The ledger that a predecessor kept for so many pages.
    ///
    /// # Errors
    /// Where it is another file, or one for other pages.
    pub fn open(file: OwnedFd, pages: u64) -> io::Result<Self> {
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "it is no ledger of these pages");
        let sealed = fcntl(&file, FcntlArg::F_GET_SEALS)?;
        let size = fstat(&file)?.st_size.unsigned_abs();
        // A file that somebody could shorten would end this process with SIGBUS.
        if sealed & SealFlag::F_SEAL_SHRINK.bits() == 0 || size != file_bytes(pages) {
            return Err(wrong());
        }
        let ledger = Self::map(file, pages)?;
        let said = (
            ledger.word(0).load(Ordering::Acquire),
            ledger.word(PAGES_AT).load(Ordering::Relaxed),
        );
        (said == (MAGIC, pages)).then_some(ledger).ok_or_else(wrong)
    }

    fn map(file: OwnedFd, pages: u64) -> io::Result<Self> {
        let map = Mapping::shared(&file, file_bytes(pages) as usize)?;
        // The kernel must never have to wait for the page that it writes messages to.
        map.keep_resident(PAGE as usize);
        Ok(Self { file, map, pages })
    }

    /// The pages it is for.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Its file, for the keeper.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its file, for a successor.
    pub fn into_file(self) -> OwnedFd {
        self.file
    }

    /// Takes messages from `read`, which gets the place for them and returns how many it wrote.
    /// They stay in the ledger until [`Self::settle`]; only one thread may be between the two.
    ///
    /// # Errors
    /// Those of `read`; there are no messages then.
    pub fn take(
        &self,
        read: impl FnOnce(&mut [u8]) -> nix::Result<usize>,
    ) -> nix::Result<Vec<Message>> {
        // SAFETY: the range is inside of the mapping, and nobody else in this process looks at it:
        // the caller lets one thread at a time in. Another process does after our death only.
        let place = unsafe {
            let start = self.map.start().add(MESSAGES_AT).as_ptr();
            std::slice::from_raw_parts_mut(start, MESSAGES_MAX * MESSAGE_BYTES)
        };
        let bytes = read(place)?;
        Ok(self.messages(bytes / MESSAGE_BYTES))
    }

    /// What a predecessor took and did not settle.
    pub fn unsettled(&self) -> Vec<Message> {
        let all = self.messages(MESSAGES_MAX).into_iter();
        all.filter(|message| message.event != 0).collect()
    }

    /// Forgets the messages that were taken: what they say was noted.
    pub fn settle(&self, count: usize) {
        for number in 0..count.min(MESSAGES_MAX) {
            // A message's kind is in its first word.
            self.word(MESSAGES_AT + number * MESSAGE_BYTES)
                .store(0, Ordering::Release);
        }
    }

    fn messages(&self, count: usize) -> Vec<Message> {
        let first = self.map.start().as_ptr().wrapping_add(MESSAGES_AT);
        let places = (0..count.min(MESSAGES_MAX))
            .map(|number| first.wrapping_add(number * MESSAGE_BYTES).cast::<Message>());
        // SAFETY: inside of the mapping and aligned (1024 and 32 are multiples of 8); every
        // pattern of bits is a message.
        places
            .map(|place| unsafe { place.read_volatile() })
            .collect()
    }

    /// Which of up to 64 pages from `first` on a fact holds of: bit 0 is the first.
    pub fn get(&self, fact: Fact, first: u64, count: u32) -> u64 {
        let (at, shift) = self.place(fact, first);
        let low = self.word(at).load(Ordering::Acquire) >> shift;
        let high = if shift > 0 && shift + count > 64 {
            self.word(at + 8).load(Ordering::Acquire) << (64 - shift)
        } else {
            0
        };
        (low | high) & mask(count)
    }

    /// Notes a fact of some of 64 pages from `first` on.
    pub fn set(&self, fact: Fact, first: u64, bits: u64) {
        self.change(fact, first, bits, |word, bits| {
            word.fetch_or(bits, Ordering::AcqRel);
        });
    }

    /// The opposite.
    pub fn clear(&self, fact: Fact, first: u64, bits: u64) {
        self.change(fact, first, bits, |word, bits| {
            word.fetch_and(!bits, Ordering::AcqRel);
        });
    }

    /// Notes that a range of pages was given back.
    pub fn remove(&self, first: u64, count: u64) {
        let end = first + count;
        let mut at = first;
        while at < end {
            let step = (64 - at % 64).min(end - at);
            // Zeros first: who finds a page neither filled nor given back would ask the source.
            self.set(Fact::Removed, at, mask(step as u32));
            self.clear(Fact::Filled, at, mask(step as u32));
            at += step;
        }
    }

    /// How many pages a fact holds of.
    pub fn count(&self, fact: Fact) -> u64 {
        let words = (0..self.pages.div_ceil(64)).map(|word| {
            let (at, _) = self.place(fact, word * 64);
            u64::from(self.word(at).load(Ordering::Relaxed).count_ones())
        });
        words.sum()
    }

    fn change(&self, fact: Fact, first: u64, bits: u64, how: impl Fn(&AtomicU64, u64)) {
        let (at, shift) = self.place(fact, first);
        how(self.word(at), bits << shift);
        if shift > 0 && bits >> (64 - shift) != 0 {
            how(self.word(at + 8), bits >> (64 - shift));
        }
    }

    fn place(&self, fact: Fact, page: u64) -> (usize, u32) {
        debug_assert!(page < self.pages);
        let map = match fact {
            Fact::Removed => 0,
            Fact::Filled => 1,
        };
        let start = PAGE + map * map_bytes(self.pages);
        ((start + page / 64 * 8) as usize, (page % 64) as u32)
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at % 8 == 0 && at + 8 <= self.map.size());
        // SAFETY: inside of the mapping and aligned, as was just checked; it lives as long as we
        // do, and is looked at as an atomic number by everybody.
        unsafe { self.map.start().add(at).cast::<AtomicU64>().as_ref() }
    }
}

/// As many low bits.
pub fn mask(count: u32) -> u64 {
    debug_assert!(count <= 64);
    u64::MAX.checked_shr(64 - count).unwrap_or(0)
}

fn map_bytes(pages: u64) -> u64 {
    pages.div_ceil(8 * PAGE).max(1) * PAGE
}

fn file_bytes(pages: u64) -> u64 {
    PAGE + 2 * map_bytes(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGES: u64 = 40_000;

    #[test]
    fn a_successor_finds_what_was_taken_and_not_settled() {
        let ledger = Ledger::create(PAGES).unwrap();
        let taken = ledger.take(|place| {
            place[..8].fill(1);
            place[32] = 0x15;
            place[40..48].copy_from_slice(&4096_u64.to_le_bytes());
            Ok(64)
        });
        assert_eq!(taken.unwrap().len(), 2);
        ledger.settle(1);
        let successor = Ledger::open(ledger.into_file(), PAGES).unwrap();
        let left = successor.unsettled();
        assert_eq!(
            (left.len(), left[0].event, left[0].args[0]),
            (1, 0x15, 4096)
        );
        successor.settle(MESSAGES_MAX);
        assert!(successor.unsettled().is_empty());
    }

    #[test]
    fn other_files_are_no_ledgers() {
        let ledger = Ledger::create(PAGES).unwrap();
        let file = ledger.file().try_clone_to_owned().unwrap();
        assert!(Ledger::open(file, PAGES + 1_000_000).is_err());
        let file = ledger.file().try_clone_to_owned().unwrap();
        assert!(Ledger::open(file, PAGES + 1).is_err());
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(file_bytes(PAGES)).unwrap();
        assert!(Ledger::open(plain.into(), PAGES).is_err());
        let open = memfd_create("x", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&open, file_bytes(PAGES) as i64).unwrap();
        assert!(Ledger::open(open, PAGES).is_err());
    }

    proptest! {
        #[test]
        fn it_holds_what_a_set_holds(
            ranges in prop::collection::vec((0..PAGES - 600, 1_u64..600), 1..20),
            at in 0..PAGES - 64,
            count in 1_u32..=64,
        ) {
            let ledger = Ledger::create(PAGES).unwrap();
            let mut set = BTreeSet::new();
            for (first, pages) in ranges {
                ledger.set(Fact::Filled, first, 1);
                ledger.remove(first, pages);
                set.extend(first..first + pages);
            }
            prop_assert_eq!(ledger.count(Fact::Removed), set.len() as u64);
            prop_assert_eq!(ledger.count(Fact::Filled), 0);
            let got = ledger.get(Fact::Removed, at, count);
            let wanted = (0..u64::from(count)).filter(|bit| set.contains(&(at + bit)));
            prop_assert_eq!(got, wanted.fold(0, |bits, bit| bits | 1 << bit));
            let same = ledger.file().try_clone_to_owned().unwrap();
            let successor = Ledger::open(same, PAGES).unwrap();
            successor.set(Fact::Filled, at, got);
            prop_assert_eq!(ledger.get(Fact::Filled, at, 64), got);
        }
    }
}
