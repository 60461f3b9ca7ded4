//! Starts a VMM confined: its own user, namespaces, an empty root, no capability, no descriptor
//! but those it was handed.
//!
//! usage: `diapause-launch NAME PLAN REPORT`, or `diapause-launch wait`
//!
//! NAME is not read: a launcher carries the argument by which its VMM is found, so that one that
//! was left behind at any moment is found as well. PLAN is a descriptor with the plan (`plan.rs`),
//! REPORT one that is written to: `pid N`, the VMM's process as our parent sees it; `exec`, when
//! all is done but that; `failed STAGE: CAUSE`. The report's end after an `exec` and without a
//! failure means that the VMM's program runs; nothing in between is left to guess.
//!
//! The VMM is the first process of its pid namespace and a child of *our* parent: this process
//! ends at once, and whoever asked for the VMM can wait for it. Nothing binds its life to the
//! parent's.
//!
//! `wait` does nothing until its input ends: something to confine when a host is tried out.
//!
//! What was asked for is done whole or not at all: what a host may not grant is found out before,
//! by trying, and is not in the plan then.

mod failure;
mod plan;
mod privileges;
mod root;
mod spawn;

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, RawFd};
use std::process::ExitCode;

use failure::Failure;
use plan::Plan;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    if words.get(1).is_some_and(|word| word == "wait") {
        return wait();
    }
    let [_, _, plan, report] = words.as_slice() else {
        eprintln!(
            "usage: diapause-launch NAME PLAN REPORT (two descriptors) | diapause-launch wait"
        );
        return ExitCode::from(2);
    };
    let (Some(plan), Some(report)) = (inherited(plan), inherited(report)) else {
        eprintln!("diapause-launch: PLAN and REPORT are descriptors that it inherits");
        return ExitCode::from(2);
    };
    let mut report = report;
    match Plan::read(plan).and_then(|plan| spawn::launch(&plan, &mut report)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => tell(&mut report, &failure),
    }
}

fn wait() -> ExitCode {
    match std::io::copy(&mut std::io::stdin(), &mut std::io::sink()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Says what failed; whoever listens may be gone, which changes nothing.
fn tell(report: &mut File, failure: &Failure) -> ExitCode {
    if let Err(error) = report.write_all(format!("failed {failure}\n").as_bytes()) {
        eprintln!("diapause-launch: {failure} (and the report: {error})");
    }
    ExitCode::FAILURE
}

/// A descriptor that was named on the command line, where it is one.
fn inherited(word: &str) -> Option<File> {
    let fd: RawFd = word.parse().ok().filter(|fd| *fd > 2)?;
    // SAFETY: F_GETFD only asks, and -1 says that nothing is open there.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: it is open, was handed to us by number, and nothing else in this process owns it.
    Some(unsafe { File::from_raw_fd(fd) })
}
