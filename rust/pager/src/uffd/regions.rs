//! The regions of a VMM's memory, as its handshake says them and as faults find them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Regions of one VMM: Firecracker has two, and one more for each slot of memory hotplug.
pub const REGIONS_MAX: usize = 256;
/// Ordinary pages.
pub const SMALL_BYTES: u64 = 4 << 10;
/// Pages of hugetlbfs.
pub const HUGE_BYTES: u64 = 2 << 20;

/// One range of a VMM's memory and where its bytes are in the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its first address in the VMM.
    #[serde(rename = "base_host_virt_addr")]
    pub base: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where its first byte is in the device.
    pub offset: u64,
    /// Bytes of a page.
    pub page_size: u64,
}

/// Why regions are refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BadRegions {
    /// It is no list of regions.
    Json(String),
    /// There are none.
    Empty,
    /// More than [`REGIONS_MAX`].
    TooMany(usize),
    /// Neither 4096 nor 2 MiB.
    PageSize(u64),
    /// An address, size or offset that is no multiple of the page's size, or no byte at all.
    Unaligned(Region),
    /// An end beyond what 64 bits hold.
    Overflow(Region),
    /// Bytes that the device does not have.
    Beyond(Region),
    /// Two of one address, or of one offset.
    Overlap(Region, Region),
}

impl fmt::Display for BadRegions {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Json(cause) => write!(to, "the message is no list of regions: {cause}"),
            Self::Empty => write!(to, "the list of regions is empty"),
            Self::TooMany(count) => write!(to, "{count} regions, {REGIONS_MAX} are allowed"),
            Self::PageSize(size) => write!(to, "pages of {size} bytes"),
            Self::Unaligned(region) => write!(to, "{region} is not made of whole pages"),
            Self::Overflow(region) => write!(to, "{region} has no end"),
            Self::Beyond(region) => write!(to, "{region} is beyond the end of the device"),
            Self::Overlap(one, other) => write!(to, "{one} and {other} overlap"),
        }
    }
}

impl fmt::Display for Region {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            base, size, offset, ..
        } = self;
        write!(to, "region {base:#x} of {size} bytes at offset {offset}")
    }
}

/// A region as Firecracker writes it. `page_size_kib` is older and means bytes too.
#[derive(Deserialize)]
struct Said {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    #[serde(default)]
    page_size: Option<u64>,
    #[serde(default)]
    page_size_kib: Option<u64>,
}

/// Regions that were checked, in the order of their addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Regions {
    list: Vec<Region>,
    first_bits: Vec<u64>,
    bits: u64,
}

/// What became of a message so far.
#[derive(Debug)]
pub enum Message {
    /// It may go on.
    Half,
    /// It is whole.
    Whole(Vec<Region>),
}

/// Reads the text of a handshake, of which more may come.
///
/// # Errors
/// Where it can't become a list of regions any more.
pub fn parse(text: &[u8]) -> Result<Message, BadRegions> {
    let said: Vec<Said> = match serde_json::from_slice(text) {
        Ok(said) => said,
        Err(error) if error.is_eof() => return Ok(Message::Half),
        Err(error) => return Err(BadRegions::Json(error.to_string())),
    };
    let regions: Result<_, _> = said.into_iter().map(Region::try_from).collect();
    regions.map(Message::Whole)
}

impl TryFrom<Said> for Region {
    type Error = BadRegions;

    fn try_from(said: Said) -> Result<Self, BadRegions> {
        let page_size = match (said.page_size, said.page_size_kib) {
            (Some(one), Some(other)) if one != other => {
                let cause = format!("page_size is {one}, page_size_kib {other}");
                return Err(BadRegions::Json(cause));
            }
            (Some(size), _) | (None, Some(size)) => size,
            (None, None) => return Err(BadRegions::Json("a region without page_size".into())),
        };
        Ok(Self {
            base: said.base_host_virt_addr,
            size: said.size,
            offset: said.offset,
            page_size,
        })
    }
}

impl Region {
    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.size / self.page_size
    }

    /// The address of one of its pages.
    pub fn address(&self, page: u64) -> u64 {
        self.base + page * self.page_size
    }

    fn check(&self, device_bytes: u64) -> Result<(), BadRegions> {
        if ![SMALL_BYTES, HUGE_BYTES].contains(&self.page_size) {
            return Err(BadRegions::PageSize(self.page_size));
        }
        let whole = |bytes: u64| bytes % self.page_size == 0;
        if self.size == 0 || ![self.base, self.size, self.offset].into_iter().all(whole) {
            return Err(BadRegions::Unaligned(*self));
        }
        let address_end = self.base.checked_add(self.size);
        match (address_end, self.offset.checked_add(self.size)) {
            (Some(_), Some(end)) if end <= device_bytes => Ok(()),
            (Some(_), Some(_)) => Err(BadRegions::Beyond(*self)),
            _ => Err(BadRegions::Overflow(*self)),
        }
    }
}

impl Regions {
    /// Checks regions for a device of this size.
    ///
    /// # Errors
    /// The first thing that is wrong with them.
    pub fn new(mut list: Vec<Region>, device_bytes: u64) -> Result<Self, BadRegions> {
        if list.is_empty() {
            return Err(BadRegions::Empty);
        }
        if list.len() > REGIONS_MAX {
            return Err(BadRegions::TooMany(list.len()));
        }
        list.iter()
            .try_for_each(|region| region.check(device_bytes))?;
        list.sort_unstable_by_key(|region| region.offset);
        apart(&list, |region| region.offset)?;
        list.sort_unstable_by_key(|region| region.base);
        apart(&list, |region| region.base)?;
        let mut bits = 0;
        let first_bits = list.iter().map(|region| {
            let first = bits;
            bits += region.pages();
            first
        });
        Ok(Self {
            first_bits: first_bits.collect(),
            list,
            bits,
        })
    }

    /// All of them, by address.
    pub fn list(&self) -> &[Region] {
        &self.list
    }

    /// How many pages they have together.
    pub fn pages(&self) -> u64 {
        self.bits
    }

    /// The number of a region's first page among all.
    pub fn first_bit(&self, region: usize) -> u64 {
        self.first_bits[region]
    }

    /// The region and the page of an address.
    pub fn find(&self, address: u64) -> Option<(usize, u64)> {
        let number = self.list.partition_point(|region| region.base <= address);
        let number = number.checked_sub(1)?;
        let region = &self.list[number];
        let inside = address - region.base;
        (inside < region.size).then(|| (number, inside / region.page_size))
    }

    /// The whole pages of a range of addresses, as (first, count) among all pages.
    pub fn pages_of(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let regions = self.list.iter().zip(&self.first_bits);
        regions.filter_map(move |(region, first_bit)| {
            let from = start.max(region.base) - region.base;
            let to = end
                .min(region.base + region.size)
                .checked_sub(region.base)?;
            // The kernel gives back whole pages only; a huge page that is given back in part stays.
            let (from, to) = (from.div_ceil(region.page_size), to / region.page_size);
            (from < to).then(|| (first_bit + from, to - from))
        })
    }
}

fn apart(list: &[Region], first: impl Fn(&Region) -> u64) -> Result<(), BadRegions> {
    let near = list.windows(2);
    let mut overlaps = near.filter(|pair| first(&pair[0]) + pair[0].size > first(&pair[1]));
    match overlaps.next() {
        Some(pair) => Err(BadRegions::Overlap(pair[0], pair[1])),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn region(base: u64, size: u64, offset: u64, page_size: u64) -> Region {
        Region {
            base,
            size,
            offset,
            page_size,
        }
    }

    #[test]
    fn firecrackers_messages_are_read() {
        let text = br#"[{"base_host_virt_addr":65536,"size":8192,"offset":0,"page_size":4096,
            "page_size_kib":4096,"new":{"x":[1]}},
            {"base_host_virt_addr":4194304,"size":2097152,"offset":2097152,
            "page_size_kib":2097152}]"#;
        let Ok(Message::Whole(list)) = parse(text) else {
            panic!("{:?}", parse(text))
        };
        let wanted = vec![
            region(65536, 8192, 0, SMALL_BYTES),
            region(4 * MIB, 2 * MIB, 2 * MIB, HUGE_BYTES),
        ];
        assert_eq!(list, wanted);
        for half in 0..text.len() {
            assert!(matches!(parse(&text[..half]), Ok(Message::Half)), "{half}");
        }
        // What the keeper keeps is the same text.
        let again = serde_json::to_vec(&list).unwrap();
        assert!(matches!(parse(&again), Ok(Message::Whole(same)) if same == list));
    }

    #[test]
    fn what_is_no_list_of_regions_is_refused() {
        for text in [
            "null",
            "{}",
            "[1]",
            "[{}]",
            "x",
            "[] x",
            r#"[{"base_host_virt_addr":1,"size":1,"offset":1}]"#,
            r#"[{"base_host_virt_addr":-1,"size":1,"offset":1,"page_size":4096}]"#,
            r#"[{"base_host_virt_addr":1.5,"size":1,"offset":1,"page_size":4096}]"#,
            r#"[{"base_host_virt_addr":1,"size":1,"offset":18446744073709551616,"page_size":1}]"#,
            r#"[{"base_host_virt_addr":1,"size":1,"offset":1,"page_size":1,"page_size_kib":2}]"#,
            r#"[{"base_host_virt_addr":1,"size":1,"size":1,"offset":1,"page_size":1}]"#,
        ] {
            assert!(
                matches!(parse(text.as_bytes()), Err(BadRegions::Json(_))),
                "{text}"
            );
        }
        let deep = "[".repeat(10_000);
        assert!(matches!(parse(deep.as_bytes()), Err(BadRegions::Json(_))));
    }

    #[test]
    fn each_fault_of_a_list_has_its_name() {
        let new = |list: &[Region]| Regions::new(list.to_vec(), 64 * MIB);
        let good = region(MIB, MIB, 0, SMALL_BYTES);
        assert_eq!(new(&[good]).unwrap().pages(), 256);
        assert_eq!(new(&[]), Err(BadRegions::Empty));
        let many = vec![good; REGIONS_MAX + 1];
        assert_eq!(new(&many), Err(BadRegions::TooMany(REGIONS_MAX + 1)));
        for size in [0, 1, 4095, 8192, 1 << 30, u64::MAX] {
            let bad = region(MIB, MIB, 0, size);
            assert_eq!(new(&[bad]), Err(BadRegions::PageSize(size)));
        }
        for bad in [
            region(MIB + 1, MIB, 0, SMALL_BYTES),
            region(MIB, MIB + 512, 0, SMALL_BYTES),
            region(MIB, MIB, 2048, SMALL_BYTES),
            region(MIB, 0, 0, SMALL_BYTES),
            region(MIB, 2 * MIB, 0, HUGE_BYTES),
            region(2 * MIB, MIB, 0, HUGE_BYTES),
            region(2 * MIB, 2 * MIB, MIB, HUGE_BYTES),
        ] {
            assert_eq!(new(&[bad]), Err(BadRegions::Unaligned(bad)));
        }
        let top = !4095_u64;
        for bad in [
            region(top, 8192, 0, SMALL_BYTES),
            region(MIB, 8192, top, SMALL_BYTES),
        ] {
            assert_eq!(new(&[bad]), Err(BadRegions::Overflow(bad)));
        }
        let bad = region(MIB, MIB, 63 * MIB + 4096, SMALL_BYTES);
        assert_eq!(new(&[bad]), Err(BadRegions::Beyond(bad)));
        for (base, offset) in [(2 * MIB - 4096, 8 * MIB), (8 * MIB, MIB - 4096), (MIB, 0)] {
            let other = region(base, MIB, offset, SMALL_BYTES);
            let error = new(&[other, good]).unwrap_err();
            assert!(matches!(error, BadRegions::Overlap(..)), "{error}");
        }
    }

    proptest! {
        #[test]
        fn an_address_is_found_where_it_is(
            sizes in prop::collection::vec((0_u64..3, 1_u64..9), 1..9),
            at in 0_u64..80,
        ) {
            let (mut base, mut offset, mut list) = (4096, 0, Vec::new());
            for (gap, pages) in sizes {
                base += gap * 4096;
                list.push(region(base, pages * 4096, offset, SMALL_BYTES));
                base += pages * 4096;
                offset += pages * 4096;
            }
            let regions = Regions::new(list.clone(), offset).unwrap();
            let address = at * 4096 + 17;
            let by_hand = list.iter().position(|r| (r.base..r.base + r.size).contains(&address));
            let found = regions.find(address);
            prop_assert_eq!(found.map(|(number, _)| number), by_hand);
            let whole: Vec<_> = regions.pages_of(at * 4096, at * 4096 + 4096).collect();
            let wanted = found.map(|(number, page)| (regions.first_bit(number) + page, 1));
            prop_assert_eq!(whole, wanted.into_iter().collect::<Vec<_>>());
            let all: u64 = regions.pages_of(0, u64::MAX).map(|(_, count)| count).sum();
            prop_assert_eq!(all, regions.pages());
        }
    }
}
