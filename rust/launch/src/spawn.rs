//! The process itself: cloned into its namespaces, made poor step by step, and then the VMM.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};

use nix::sched::{unshare, CloneFlags};
use nix::unistd::{execve, getegid, geteuid, sethostname, setsid};

use crate::failure::{At, Failure, Stage};
use crate::plan::{c_text, Plan, User, UIDS};
use crate::{privileges, root};

/// What the kernel kills first when memory is short: a guest, before the daemon that keeps it.
const OOM_SCORE: &str = "300";
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` up to its cgroup, as the kernel has it since 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Starts the plan's program; returns in the launcher, where it has become a process of its own.
/// Without namespaces there is nobody to leave behind: this process becomes the program.
pub fn launch(plan: &Plan, report: &mut File) -> Result<(), Failure> {
    if plan.user == User::Namespace {
        own_user_namespace()?;
    }
    let pid = if plan.namespaces || plan.cgroup.is_some() {
        clone(plan)?
    } else {
        tell_pid(report, std::process::id())?;
        0
    };
    if pid != 0 {
        return tell_pid(report, pid);
    }
    // A failure in the clone is reported by it, and ends it.
    become_vmm(plan, report)
}

fn tell_pid(report: &mut File, pid: u32) -> Result<(), Failure> {
    report
        .write_all(format!("pid {pid}\n").as_bytes())
        .at(Stage::Clone, || "reporting it")
}

/// Our own user alone is known inside, under a number that means nothing elsewhere.
fn own_user_namespace() -> Result<(), Failure> {
    let (uid, gid, inside) = (geteuid(), getegid(), UIDS.start());
    unshare(CloneFlags::CLONE_NEWUSER).at(Stage::UserNamespace, || "unshare")?;
    for (file, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("{inside} {uid} 1")),
        ("gid_map", format!("{inside} {gid} 1")),
    ] {
        fs::write(format!("/proc/self/{file}"), text).at(Stage::UserNamespace, || file)?;
    }
    Ok(())
}

/// A sibling of this process in new namespaces: 0 in it, its pid here.
fn clone(plan: &Plan) -> Result<u32, Failure> {
    let mut flags = libc::CLONE_PARENT;
    if plan.namespaces {
        flags |= libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        if !plan.network {
            flags |= libc::CLONE_NEWNET;
        }
    }
    let mut arguments = CloneArgs {
        flags: flags as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = plan.cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup as u64;
    }
    // SAFETY: without CLONE_VM this is a fork: the child has a copy of this single-threaded
    // process, stack and all. The structure is the kernel's and outlives the call.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<CloneArgs>()) };
    u32::try_from(pid).map_err(|_| Failure::new(Stage::Clone, io::Error::last_os_error()))
}

/// Makes the process poor, in the order in which each step still has the right to do its own.
fn become_vmm(plan: &Plan, report: &mut File) -> Result<(), Failure> {
    own_process(plan)?;
    if plan.namespaces {
        root::enter(&plan.visible, &plan.hidden)?;
    }
    privileges::limit(&plan.limits)?;
    privileges::drop_all(plan.user)?;
    keep_descriptors(&plan.descriptors, report.as_raw_fd())?;
    let program = c_text(&plan.program)?;
    let texts = |list: &[String]| {
        list.iter()
            .map(|text| c_text(text))
            .collect::<Result<Vec<_>, _>>()
    };
    let (arguments, environment) = (texts(&plan.arguments)?, texts(&plan.environment)?);
    report
        .write_all(b"exec\n")
        .at(Stage::Exec, || "reporting it")?;
    let error = execve(&program, &arguments, &environment).unwrap_err();
    Err(Failure::new(
        Stage::Exec,
        format_args!("{}: {error}", plan.program),
    ))
}

/// A session of its own, every signal as a new program has it, first to go when memory is short.
fn own_process(plan: &Plan) -> Result<(), Failure> {
    // Already a leader where whoever started us made us one.
    if let Err(error) = setsid() {
        if error != nix::errno::Errno::EPERM {
            return Err(Failure::new(
                Stage::Process,
                format_args!("setsid: {error}"),
            ));
        }
    }
    privileges::default_signals()?;
    fs::write("/proc/self/oom_score_adj", OOM_SCORE).at(Stage::Process, || "oom_score_adj")?;
    if plan.namespaces {
        sethostname("diapause").at(Stage::Process, || "sethostname")?;
    }
    std::env::set_current_dir("/").at(Stage::Process, || "chdir")
}

/// Everything is closed at the exec but what was handed over; the report's end tells of the exec.
fn keep_descriptors(handed: &[RawFd], report: RawFd) -> Result<(), Failure> {
    // SAFETY: marks descriptors of this process, and closes none before the exec.
    let marked =
        unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    if marked != 0 {
        let error = io::Error::last_os_error();
        return Err(Failure::new(
            Stage::Descriptors,
            format_args!("close_range: {error}"),
        ));
    }
    for fd in handed.iter().filter(|fd| **fd != report) {
        // SAFETY: the plan's check found it open; the call sets a flag of it.
        if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } != 0 {
            let error = io::Error::last_os_error();
            return Err(Failure::new(
                Stage::Descriptors,
                format_args!("{fd}: {error}"),
            ));
        }
    }
    Ok(())
}
