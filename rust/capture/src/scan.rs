//! Which pages of another process's guest RAM were written.
//!
//! Facts about the kernel that this relies on:
//! - RAM is a private mapping of a file, so a page that was written since the process began is an
//!   anonymous page: present or swapped, and not a file page (`private`).
//! - Under asynchronous write-protect (the tracker), `PAGE_IS_WRITTEN` is exact from the first
//!   re-arming scan on, and the rule above no longer holds: the markers look like swap entries.
//! - A scan that re-arms forgets what it returns. Scanning and re-arming are therefore separate
//!   calls here, and the caller re-arms last, while the vCPUs stand.
//! - `PAGEMAP_SCAN` (Linux 6.7) stops when its vector is full and says where (`walk_end`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Bytes of a page, of memory and disk alike.
pub const PAGE_SIZE: u64 = 4096;

/// `_IOWR('f', 16, struct pm_scan_arg)`, 96 bytes.
const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;
const SCAN_WP_MATCHING: u64 = 1;
const SCAN_CHECK_WPASYNC: u64 = 2;
const IS_WRITTEN: u64 = 1 << 1;
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const REGIONS: usize = 16 * 1024;

/// A run of pages, counted from the start of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First page.
    pub first: u64,
    /// Number of pages, never zero.
    pub count: u64,
}

/// Guest RAM as it lies in the VMM: one linear device of whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// Address of its first byte in the VMM.
    pub start: u64,
    /// Address behind its last byte.
    pub end: u64,
}

impl RamRange {
    /// Number of pages.
    pub fn page_count(&self) -> u64 {
        (self.end - self.start) / PAGE_SIZE
    }
}

/// How the dirty set is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyRule {
    /// Anonymous pages: written since the process began. Wrong once tracking is armed.
    Private,
    /// Pages written since the last re-arming scan.
    Tracked,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The file whose private mapping is guest RAM, as `/proc/PID/maps` names it.
#[derive(Clone, Debug)]
pub struct MemoryFile {
    /// Its inode number.
    pub inode: u64,
    /// `st_dev`; on btrfs and overlayfs not what the map says, so the path will do as well.
    pub device: u64,
    /// Its absolute path.
    pub path: String,
}

impl MemoryFile {
    /// Asks the file system about `path`.
    ///
    /// # Errors
    /// What the file system said.
    pub fn at(path: &str) -> io::Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let found = std::fs::metadata(path)?;
        Ok(Self {
            inode: found.ino(),
            device: found.dev(),
            path: path.to_owned(),
        })
    }
}

/// Finds the mapping of the memory file in `/proc/PID/maps`.
///
/// # Errors
/// `NotFound` when the file isn't mapped, `InvalidData` when its mappings don't make one linear
/// range of `size_bytes`.
pub fn find_ram(pid: i32, file: &MemoryFile, size_bytes: u64) -> io::Result<RamRange> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut range: Option<RamRange> = None;
    for line in maps.lines() {
        let Some(found) = parse_mapping(line, file) else {
            continue;
        };
        range = match range {
            None => Some(found),
            Some(so_far) if so_far.end == found.start => Some(RamRange {
                start: so_far.start,
                end: found.end,
            }),
            Some(_) => return Err(invalid("guest RAM is mapped more than once")),
        };
    }
    let range = range.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "the VMM does not map the memory file",
        )
    })?;
    if range.end - range.start != size_bytes {
        return Err(invalid(
            "guest RAM is mapped with another size than recorded",
        ));
    }
    Ok(range)
}

fn invalid(cause: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, cause)
}

/// `START-END PERMS OFFSET MAJOR:MINOR INODE PATH`, when it is the wanted file's.
fn parse_mapping(line: &str, file: &MemoryFile) -> Option<RamRange> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (major, minor) = fields.nth(2)?.split_once(':')?;
    let found_inode: u64 = fields.next()?.parse().ok()?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let found_device = libc::makedev(hex(major)? as u32, hex(minor)? as u32);
    let same_place = found_device == file.device || line.ends_with(&file.path);
    let same = found_inode == file.inode && same_place;
    // A file that was made anew at its place: whoever mapped the old one goes on with that.
    let replaced = line
        .strip_suffix(" (deleted)")
        .is_some_and(|rest| rest.ends_with(&file.path));
    if !same && !replaced {
        return None;
    }
    Some(RamRange {
        start: hex(start)?,
        end: hex(end)?,
    })
}

/// The pages of `ram` that `rule` calls dirty, ascending, as maximal runs.
///
/// # Errors
/// What the kernel said; `PermissionDenied` (EPERM) under `Tracked` when nothing tracks the range.
pub fn dirty_runs(pagemap: &File, ram: RamRange, rule: DirtyRule) -> io::Result<Vec<Run>> {
    let mut arg = ScanArg {
        size: 96,
        ..ScanArg::default()
    };
    match rule {
        DirtyRule::Tracked => {
            arg.flags = SCAN_CHECK_WPASYNC;
            arg.category_mask = IS_WRITTEN;
            arg.return_mask = IS_WRITTEN;
        }
        DirtyRule::Private => {
            arg.category_inverted = IS_FILE;
            arg.category_mask = IS_FILE;
            arg.category_anyof_mask = IS_PRESENT | IS_SWAPPED;
            // Returning one constant category lets the kernel merge neighbours into one region.
            arg.return_mask = IS_FILE;
        }
    }
    match scan(pagemap, ram, &mut arg) {
        Err(error) if rule == DirtyRule::Private && is_unknown_request(&error) => {
            anonymous_by_pread(pagemap, ram)
        }
        outcome => outcome,
    }
}

/// The pages of `ram` that its process has mapped, ascending, as maximal runs: read or written
/// since it began. Not those that were swapped out, which look like what tracking marks.
///
/// # Errors
/// What the kernel said; there is no other way before Linux 6.7.
pub fn present_runs(pagemap: &File, ram: RamRange) -> io::Result<Vec<Run>> {
    let mut arg = ScanArg {
        size: 96,
        category_mask: IS_PRESENT,
        return_mask: IS_PRESENT,
        ..ScanArg::default()
    };
    scan(pagemap, ram, &mut arg)
}

/// Re-arms tracking over all of `ram`; what had been written is forgotten, so its pages must be
/// safe by now.
///
/// # Errors
/// What the kernel said; EPERM when nothing tracks the range.
pub fn rearm(pagemap: &File, ram: RamRange) -> io::Result<()> {
    let mut arg = ScanArg {
        size: 96,
        flags: SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
        category_mask: IS_WRITTEN,
        return_mask: IS_WRITTEN,
        ..ScanArg::default()
    };
    scan(pagemap, ram, &mut arg).map(|_| ())
}

/// Whether the tracker registered `ram`, asked without changing anything.
///
/// # Errors
/// What the kernel said, other than that nothing tracks the range or that it can't.
pub fn is_tracked(pagemap: &File, ram: RamRange) -> io::Result<bool> {
    let first = RamRange {
        start: ram.start,
        end: ram.start + PAGE_SIZE,
    };
    match dirty_runs(pagemap, first, DirtyRule::Tracked) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(false),
        Err(error) if is_unknown_request(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_unknown_request(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL))
}

fn scan(pagemap: &File, ram: RamRange, arg: &mut ScanArg) -> io::Result<Vec<Run>> {
    let mut regions = vec![PageRegion::default(); REGIONS];
    let mut runs: Vec<Run> = Vec::new();
    arg.vec = regions.as_mut_ptr() as u64;
    arg.vec_len = regions.len() as u64;
    arg.end = ram.end;
    let mut at = ram.start;
    while at < ram.end {
        arg.start = at;
        arg.walk_end = 0;
        // SAFETY: `arg` is the 96-byte structure of this request; `vec` points at `vec_len`
        // regions that outlive the call, and the kernel writes at most that many.
        let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut *arg) };
        if found < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        for region in &regions[..found as usize] {
            push_run(&mut runs, ram, region.start, region.end);
        }
        if arg.walk_end <= at {
            return Err(invalid("PAGEMAP_SCAN did not advance"));
        }
        at = arg.walk_end;
    }
    // The kernel works in batches of 512 regions and, having come to the end in a later one, says
    // that it stopped where the first ended: what lies behind comes twice.
    Ok(merge_runs(&runs, &[]))
}

fn push_run(runs: &mut Vec<Run>, ram: RamRange, start: u64, end: u64) {
    debug_assert!(ram.start <= start && start < end && end <= ram.end);
    let first = (start - ram.start) / PAGE_SIZE;
    let count = (end - start) / PAGE_SIZE;
    match runs.last_mut() {
        Some(last) if last.first + last.count == first => last.count += count,
        _ => runs.push(Run { first, count }),
    }
}

/// The same as `Private` for kernels without `PAGEMAP_SCAN`: one 64-bit entry a page.
fn anonymous_by_pread(pagemap: &File, ram: RamRange) -> io::Result<Vec<Run>> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE: u64 = 1 << 61;
    let mut runs = Vec::new();
    let mut entries = vec![0u8; 512 * 1024];
    let mut at = ram.start;
    while at < ram.end {
        let wanted = entries.len().min(((ram.end - at) / PAGE_SIZE * 8) as usize);
        pagemap.read_exact_at(&mut entries[..wanted], at / PAGE_SIZE * 8)?;
        for entry in entries[..wanted].chunks_exact(8) {
            let bits = u64::from_le_bytes(entry.try_into().expect("eight bytes"));
            if bits & (PRESENT | SWAPPED) != 0 && bits & FILE == 0 {
                push_run(&mut runs, ram, at, at + PAGE_SIZE);
            }
            at += PAGE_SIZE;
        }
    }
    Ok(runs)
}

/// The union of two ascending lists of runs, as maximal runs.
pub fn merge_runs(left: &[Run], right: &[Run]) -> Vec<Run> {
    let mut all: Vec<Run> = left.iter().chain(right).copied().collect();
    all.sort_by_key(|run| run.first);
    let mut merged: Vec<Run> = Vec::with_capacity(all.len());
    for run in all {
        match merged.last_mut() {
            Some(last) if run.first <= last.first + last.count => {
                last.count = last.count.max(run.first + run.count - last.first);
            }
            _ => merged.push(run),
        }
    }
    merged
}

/// How many pages the runs hold.
pub fn count_pages(runs: &[Run]) -> u64 {
    runs.iter().map(|run| run.count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages_of(runs: &[Run]) -> Vec<u64> {
        runs.iter()
            .flat_map(|run| run.first..run.first + run.count)
            .collect()
    }

    proptest! {
        #[test]
        fn merge_is_the_union_in_maximal_runs(
            left in proptest::collection::btree_set(0u64..300, 0..80),
            right in proptest::collection::btree_set(0u64..300, 0..80),
        ) {
            let as_runs = |pages: &std::collections::BTreeSet<u64>| {
                pages.iter().map(|page| Run { first: *page, count: 1 }).collect::<Vec<_>>()
            };
            let merged = merge_runs(&as_runs(&left), &as_runs(&right));
            let expected: Vec<u64> = left.union(&right).copied().collect();
            prop_assert_eq!(pages_of(&merged), expected);
            prop_assert!(merged.windows(2).all(|w| w[0].first + w[0].count < w[1].first));
        }
    }

    #[test]
    fn a_mapping_is_recognised_by_its_inode_and_its_device_or_path() {
        let line = "7f00a0000000-7f00c0000000 rw-p 00000000 fe:00 4242   /home/memory";
        let file = MemoryFile {
            inode: 4242,
            device: libc::makedev(0xfe, 0),
            path: "/x".into(),
        };
        let range = parse_mapping(line, &file).expect("found by its device");
        assert_eq!(range.page_count(), 131_072);
        let elsewhere = MemoryFile {
            device: libc::makedev(0, 51),
            ..file.clone()
        };
        assert_eq!(parse_mapping(line, &elsewhere), None);
        let by_path = MemoryFile {
            path: "/home/memory".into(),
            ..elsewhere
        };
        assert!(parse_mapping(line, &by_path).is_some());
        assert_eq!(
            parse_mapping(
                line,
                &MemoryFile {
                    inode: 4243,
                    ..by_path
                }
            ),
            None
        );
        assert_eq!(parse_mapping("garbage", &file), None);
    }

    #[test]
    fn the_private_rule_finds_exactly_the_pages_written_by_a_real_process() {
        let file = tempfile::tempfile().expect("temp file");
        let size = 64 * PAGE_SIZE;
        file.set_len(size).expect("length");
        let memory = PrivateMapping::of(&file, size as usize);
        memory.read(5);
        for page in [0usize, 7, 8, 9, 63] {
            memory.write(page, 1);
        }
        let pagemap = File::open("/proc/self/pagemap").expect("pagemap");
        let ram = RamRange {
            start: memory.0 as u64,
            end: memory.0 as u64 + size,
        };
        let runs = dirty_runs(&pagemap, ram, DirtyRule::Private).expect("scan");
        assert_eq!(pages_of(&runs), vec![0, 7, 8, 9, 63]);
        assert_eq!(anonymous_by_pread(&pagemap, ram).expect("pread"), runs);
        assert!(!is_tracked(&pagemap, ram).expect("asked"));
    }

    #[test]
    fn a_scan_of_more_regions_than_the_kernel_takes_at_once_names_each_page_once() {
        for regions in [511u64, 512, 513, 600, 1024, 1025, 2000] {
            let file = tempfile::tempfile().expect("temp file");
            let size = 4096 * PAGE_SIZE;
            file.set_len(size).expect("length");
            let memory = PrivateMapping::of(&file, size as usize);
            let written: Vec<u64> = (0..regions).map(|region| 2 * region).collect();
            for page in &written {
                memory.write(*page as usize, 1);
            }
            let pagemap = File::open("/proc/self/pagemap").expect("pagemap");
            let ram = RamRange {
                start: memory.0 as u64,
                end: memory.0 as u64 + size,
            };
            let runs = dirty_runs(&pagemap, ram, DirtyRule::Private).expect("scan");
            assert_eq!(pages_of(&runs), written, "{regions} regions");
        }
    }

    struct PrivateMapping(*mut u8, usize);

    impl PrivateMapping {
        fn of(file: &File, size: usize) -> Self {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a new private mapping of an open file, unmapped on drop.
            let start = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    size,
                    protection,
                    libc::MAP_PRIVATE,
                    file.as_raw_fd(),
                    0,
                )
            };
            assert_ne!(start, libc::MAP_FAILED);
            Self(start.cast(), size)
        }

        fn write(&self, page: usize, value: u8) {
            // SAFETY: the page lies inside the mapping.
            unsafe { self.0.add(page * 4096).write_volatile(value) }
        }

        fn read(&self, page: usize) -> u8 {
            // SAFETY: the page lies inside the mapping.
            unsafe { self.0.add(page * 4096).read_volatile() }
        }
    }

    impl Drop for PrivateMapping {
        fn drop(&mut self) {
            // SAFETY: unmaps exactly what `of` mapped.
            unsafe { libc::munmap(self.0.cast(), self.1) };
        }
    }
}
