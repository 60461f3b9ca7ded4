//! How fast a device is read, beside the least that could be done for the same bytes.
//!
//! `read_speed [MIB]` writes two builds of so many MiB to a temporary directory: one of frames that
//! are stored as they are, one of compressed frames, warms the page cache, reads each from first to
//! last in windows of 128 KiB and 1 MiB on one and on two threads, and prints a JSON line for each.
//! `pread` is the bare read of the stored bytes, `pread_copy` with a copy behind it as a server
//! makes one, `digest` reads and digests, `zstd` reads and decodes without comparing digests. Each
//! has the best of a few rounds by the clock, and by the threads' own processor time: the latter is
//! what counts on a machine that does other things too.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

mod cases;
#[path = "../tests/support/server.rs"]
mod server;

use cases::{make, noise, words, Case};
use diapause_format::{digest16, Decoder, FRAME_BYTES, PAGE_SIZE};
use diapause_pager::build::{Builds, Frames};
use diapause_pager::device::{Device, Part};
use diapause_pager::frames::bound_malloc;
use diapause_pager::spec::BlobsSpec;
use server::{Act, Server};

const ROUNDS: usize = 5;

/// Nanoseconds that this thread ran.
fn ran_ns() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    stat.split(' ').next().unwrap().parse().unwrap()
}

/// Has windows done on so many threads, each the next that nobody has; bytes of pages a second, of
/// the clock and of a thread's processor time.
fn timed<S>(
    case: &Case,
    window: usize,
    threads: usize,
    start: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, u64) + Sync,
) -> (f64, f64) {
    let (mut best, mut best_ran) = (0f64, 0f64);
    for _ in 0..ROUNDS {
        let (next, ran) = (AtomicU64::new(0), AtomicU64::new(0));
        let began = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut state = start();
                    let before = ran_ns();
                    loop {
                        let at = next.fetch_add(window as u64, Ordering::Relaxed);
                        if at >= case.spec.size_bytes {
                            break;
                        }
                        work(&mut state, at);
                    }
                    ran.fetch_add(ran_ns() - before, Ordering::Relaxed);
                });
            }
        });
        let bytes = case.spec.size_bytes as f64;
        best = best.max(bytes / began.elapsed().as_secs_f64());
        best_ran = best_ran.max(bytes / ran.into_inner() as f64 * 1e9);
    }
    (best, best_ran)
}

/// The stored bytes of a window's frames, read into `stored`; the frames' numbers.
fn stored(case: &Case, window: usize, at: u64, into: &mut [u8]) -> (std::ops::Range<u64>, usize) {
    let frames = at / FRAME_BYTES as u64..(at + window as u64) / FRAME_BYTES as u64;
    let (first, last) = (
        case.table.frame(frames.start),
        case.table.frame(frames.end - 1),
    );
    let length = (last.offset + u64::from(last.length) - first.offset) as usize;
    case.file
        .read_exact_at(&mut into[..length], first.offset)
        .unwrap();
    (frames, length)
}

/// What is least: read; read and copy; read and digest; read and decode.
fn bare(case: &Case, window: usize, threads: usize) {
    let room = || (vec![0u8; window], vec![0u8; window]);
    let pread = timed(case, window, threads, room, |(from, _), at| {
        stored(case, window, at, from);
        black_box(from);
    });
    tell(case, "pread", window, threads, pread);
    let copied = timed(case, window, threads, room, |(from, to), at| {
        let (_, length) = stored(case, window, at, from);
        to[..length].copy_from_slice(&from[..length]);
        black_box(to);
    });
    tell(case, "pread_copy", window, threads, copied);
    let digested = timed(case, window, threads, room, |(from, _), at| {
        let (frames, _) = stored(case, window, at, from);
        let mut rest = &from[..];
        for number in frames {
            let (frame, later) = rest.split_at(case.table.frame(number).length as usize);
            assert_eq!(digest16(frame), case.table.frame(number).digest);
            rest = later;
        }
    });
    tell(case, "digest", window, threads, digested);
    if case.table.frame(0).compressed {
        let start = || (zstd::bulk::Decompressor::new().unwrap(), room());
        let decoded = timed(case, window, threads, start, |(decoder, (from, to)), at| {
            let (frames, _) = stored(case, window, at, from);
            let mut rest = &from[..];
            for (number, to) in frames.zip(to.chunks_mut(FRAME_BYTES)) {
                let (frame, later) = rest.split_at(case.table.frame(number).length as usize);
                decoder.decompress_to_buffer(frame, to).unwrap();
                rest = later;
            }
            black_box(to);
        });
        tell(case, "zstd", window, threads, decoded);
        let start = || (Decoder::new().unwrap(), room());
        let both = timed(case, window, threads, start, |(decoder, (from, to)), at| {
            let (frames, _) = stored(case, window, at, from);
            let mut rest = &from[..];
            for (number, to) in frames.zip(to.chunks_mut(FRAME_BYTES)) {
                let entry = case.table.frame(number);
                let (frame, later) = rest.split_at(entry.length as usize);
                decoder.decode(number, entry, frame, to).unwrap();
                rest = later;
            }
            black_box(to);
        });
        tell(case, "zstd_digest", window, threads, both);
    }
}

fn device(case: &Case, window: usize, threads: usize) {
    let device = Device::open(&case.spec, case.builds.clone()).unwrap();
    let read = timed(
        case,
        window,
        threads,
        Vec::new,
        |parts: &mut Vec<Part>, at| {
            parts.clear();
            device.read(at, window, parts).unwrap();
            black_box(parts);
        },
    );
    tell(case, "device", window, threads, read);
    let start = || (Vec::new(), vec![0u8; window]);
    let copied = timed(case, window, threads, start, |(parts, to), at| {
        parts.clear();
        device.read(at, window, parts).unwrap();
        let mut rest = &mut to[..];
        for part in &*parts {
            let (here, later) = rest.split_at_mut(part.len());
            part.copy_to(here);
            rest = later;
        }
        black_box(to);
    });
    tell(case, "device_copy", window, threads, copied);
}

/// Single pages here and there, each in a frame that is not kept; and again in one that is.
fn faults(case: &Case) {
    let device = Device::open(&case.spec, case.builds.clone()).unwrap();
    let pages = case.spec.size_bytes / PAGE_SIZE as u64;
    let mut parts = Vec::new();
    for (what, step) in [("fault", 5003), ("fault_kept", 0)] {
        let (mut page, mut took) = (1, Vec::new());
        for _ in 0..20_000 {
            page = (page + step) % pages;
            parts.clear();
            let began = Instant::now();
            device
                .read(page * PAGE_SIZE as u64, PAGE_SIZE, &mut parts)
                .unwrap();
            took.push(began.elapsed().as_nanos() as u64);
        }
        took.sort_unstable();
        let [p50, p99] = [took.len() / 2, took.len() / 100 * 99].map(|at| took[at]);
        let line = serde_json::json!({
            "frames": case.name, "what": what, "window_kib": 4, "p50_ns": p50, "p99_ns": p99,
        });
        println!("{line}");
    }
}

/// The same over HTTP from a server that answers each request so much later: pages here and there
/// of 50 MiB, and all of it from first to last.
fn far(case: &Case, directory: &Path, delay: Duration) {
    let server = Server::new(directory.to_owned());
    server.always(Act::Slow(delay));
    let url = format!("{}/", server.url());
    let spec = BlobsSpec::Http {
        url,
        fallback: None,
    };
    let open = || {
        let source = spec.source().unwrap();
        let builds = Arc::new(Builds::new(source, Arc::new(Frames::default())));
        Device::open(&case.spec, builds).unwrap()
    };
    let (device, pages) = (open(), 50 * 256);
    let (mut page, mut took, mut parts) = (1, Vec::new(), Vec::new());
    let whole = Instant::now();
    for _ in 0..2000 {
        page = (page + 5003) % pages;
        parts.clear();
        let began = Instant::now();
        device
            .read(page * PAGE_SIZE as u64, PAGE_SIZE, &mut parts)
            .unwrap();
        took.push(began.elapsed().as_micros() as u64);
    }
    let touched = whole.elapsed();
    took.sort_unstable();
    let [p50, p90, max] = [took.len() / 2, took.len() / 10 * 9, took.len() - 1].map(|at| took[at]);
    let line = serde_json::json!({
        "frames": case.name, "what": "far_fault", "delay_ms": delay.as_millis(), "p50_us": p50,
        "p90_us": p90, "max_us": max, "ms": touched.as_millis(),
        "requests": server.requests().len(),
    });
    println!("{line}");
    server.always(Act::Slow(delay));
    let (device, began) = (open(), Instant::now());
    for at in (0..case.spec.size_bytes).step_by(128 << 10) {
        parts.clear();
        device.read(at, 128 << 10, &mut parts).unwrap();
    }
    let mib_per_s = (case.spec.size_bytes >> 20) as f64 / began.elapsed().as_secs_f64();
    let line = serde_json::json!({
        "frames": case.name, "what": "far_sequential", "delay_ms": delay.as_millis(),
        "mib_per_s": mib_per_s.round(), "requests": server.requests().len(),
    });
    println!("{line}");
}

fn tell(case: &Case, what: &str, window: usize, threads: usize, speed: (f64, f64)) {
    let line = serde_json::json!({
        "frames": case.name,
        "what": what,
        "window_kib": window >> 10,
        "threads": threads,
        "mib_per_s": (speed.0 / 1048576.0).round(),
        "mib_per_cpu_s": (speed.1 / 1048576.0).round(),
    });
    println!("{line}");
}

fn main() {
    bound_malloc();
    let mib = std::env::args()
        .nth(1)
        .map_or(512, |mib| mib.parse().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let cases = [
        make("raw", directory.path(), mib, noise),
        make("compressed", directory.path(), mib, words),
    ];
    for case in &cases {
        let entries = (0..case.table.frame_count()).map(|at| case.table.frame(at));
        let stored: u64 = entries.map(|entry| u64::from(entry.length)).sum();
        let ratio = stored as f64 / case.spec.size_bytes as f64;
        let line = serde_json::json!({"frames": case.name, "stored_share": ratio});
        println!("{line}");
        faults(case);
        far(case, directory.path(), Duration::from_millis(20));
        for window in [128 << 10, 1 << 20] {
            for threads in [1, 2] {
                bare(case, window, threads);
                device(case, window, threads);
            }
        }
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let resident = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap();
    println!("{}", serde_json::json!({"resident": resident}));
}
