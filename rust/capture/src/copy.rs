//! Copying pages out of a VMM that stands.
//!
//! `process_vm_readv` takes the pages of many runs in one call (at most `IOV_MAX` of them) straight
//! into the destination: no bounce buffer, no page goes through an interpreter. It may return less
//! than asked; what is missing is asked again, and no progress is an error.

use std::io::{self, IoSliceMut};

use nix::sys::uio::{process_vm_readv, RemoteIoVec};
use nix::unistd::Pid;

use crate::scan::{RamRange, Run, PAGE_SIZE};

/// The kernel's bound on vectors in one call.
const IOV_MAX: usize = 1024;
/// Below this a second thread costs more than it brings.
const PARALLEL_BYTES_MIN: usize = 16 << 20;

/// Copies the pages of `runs` one behind the other into `into`, which has exactly their size.
///
/// # Errors
/// What the kernel said (`ESRCH` when the VMM is gone), or `UnexpectedEof` on no progress.
pub fn copy_runs(pid: i32, ram: RamRange, runs: &[Run], into: &mut [u8]) -> io::Result<()> {
    assert_eq!(
        into.len() as u64,
        crate::scan::count_pages(runs) * PAGE_SIZE
    );
    if into.len() < PARALLEL_BYTES_MIN {
        return copy_serial(pid, ram, runs, into);
    }
    let (head, tail) = split_runs(runs, (into.len() as u64 / PAGE_SIZE) / 2);
    let (into_head, into_tail) =
        into.split_at_mut((crate::scan::count_pages(&head) * PAGE_SIZE) as usize);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| copy_serial(pid, ram, &tail, into_tail));
        let first = copy_serial(pid, ram, &head, into_head);
        let second = second
            .join()
            .map_err(|_| io::Error::other("a copying thread panicked"))?;
        first.and(second)
    })
}

/// The first `pages` pages of the runs, and the rest.
pub fn split_runs(runs: &[Run], pages: u64) -> (Vec<Run>, Vec<Run>) {
    let (mut head, mut tail, mut left) = (Vec::new(), Vec::new(), pages);
    for run in runs {
        let taken = run.count.min(left);
        left -= taken;
        if taken > 0 {
            head.push(Run {
                first: run.first,
                count: taken,
            });
        }
        if taken < run.count {
            tail.push(Run {
                first: run.first + taken,
                count: run.count - taken,
            });
        }
    }
    (head, tail)
}

fn copy_serial(pid: i32, ram: RamRange, runs: &[Run], mut into: &mut [u8]) -> io::Result<()> {
    let pid = Pid::from_raw(pid);
    let mut remote: Vec<RemoteIoVec> = Vec::with_capacity(IOV_MAX.min(runs.len()));
    for batch in runs.chunks(IOV_MAX) {
        remote.clear();
        remote.extend(batch.iter().map(|run| RemoteIoVec {
            base: (ram.start + run.first * PAGE_SIZE) as usize,
            len: (run.count * PAGE_SIZE) as usize,
        }));
        let mut pending = &mut remote[..];
        while !pending.is_empty() {
            let wanted: usize = pending.iter().map(|vector| vector.len).sum();
            let (chunk, _) = into.split_at_mut(wanted);
            let copied = process_vm_readv(pid, &mut [IoSliceMut::new(chunk)], pending)?;
            if copied == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            into = &mut std::mem::take(&mut into)[copied..];
            pending = advance(pending, copied);
        }
    }
    assert!(into.is_empty());
    Ok(())
}

/// Drops `copied` bytes from the front of the vectors.
fn advance(mut vectors: &mut [RemoteIoVec], mut copied: usize) -> &mut [RemoteIoVec] {
    while copied > 0 {
        let first = &mut vectors[0];
        if copied < first.len {
            first.base += copied;
            first.len -= copied;
            return vectors;
        }
        copied -= first.len;
        vectors = &mut vectors[1..];
    }
    vectors
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn own_ram(memory: &[u8]) -> RamRange {
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let end = (memory.as_ptr() as u64 + memory.len() as u64) / PAGE_SIZE * PAGE_SIZE;
        RamRange { start, end }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(6))]
        #[test]
        fn runs_arrive_in_order_and_whole(
            pages in proptest::collection::btree_set(0u64..9000, 1..5000),
        ) {
            let byte = |at: u32| (at / 4096 * 31 + at % 251) as u8;
            let memory: Vec<u8> = (0..9001 * 4096).map(byte).collect();
            let ram = own_ram(&memory);
            let singles: Vec<Run> =
                pages.iter().map(|page| Run { first: *page, count: 1 }).collect();
            let runs = crate::scan::merge_runs(&singles, &[]);
            let mut copied = vec![0u8; pages.len() * 4096];
            copy_runs(std::process::id() as i32, ram, &runs, &mut copied).expect("copied");
            let offset = (ram.start - memory.as_ptr() as u64) as usize;
            for (slot, page) in pages.iter().enumerate() {
                let from = offset + *page as usize * 4096;
                prop_assert_eq!(&copied[slot * 4096..][..4096], &memory[from..][..4096]);
            }
        }

        #[test]
        fn a_split_loses_no_page(
            counts in proptest::collection::vec(1u64..20, 0..30),
            at in 0u64..400,
        ) {
            let mut first = 0;
            let runs: Vec<Run> = counts.iter().map(|count| {
                let run = Run { first, count: *count };
                first += count + 1;
                run
            }).collect();
            let (head, tail) = split_runs(&runs, at);
            let total = crate::scan::count_pages(&runs);
            prop_assert_eq!(crate::scan::count_pages(&head), at.min(total));
            prop_assert_eq!(crate::scan::merge_runs(&head, &tail), runs);
        }
    }

    #[test]
    fn a_process_that_is_gone_is_an_error_and_not_zeros() {
        let mut child = std::process::Command::new("true").spawn().expect("spawned");
        let pid = child.id() as i32;
        child.wait().expect("ended");
        let ram = RamRange {
            start: 4096,
            end: 8192,
        };
        let mut page = [0u8; 4096];
        let error =
            copy_runs(pid, ram, &[Run { first: 0, count: 1 }], &mut page).expect_err("gone");
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }
}
