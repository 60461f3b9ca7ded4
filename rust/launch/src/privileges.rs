//! Rights: signals and limits as a stranger has them, the user, and not one capability.

use std::io;

use nix::errno::Errno;
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::sys::stat::{umask, Mode};
use nix::unistd::{setgroups, setresgid, setresuid, Gid, Uid};

use crate::failure::{At, Failure, Stage};
use crate::plan::{Limits, User};

const SIGNALS_MAX: libc::c_long = 64;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const CAPABILITIES_MAX: libc::c_ulong = 64;
const CAP_SETPCAP: libc::c_ulong = 8;
/// No root by number, no change of capabilities by a change of user, none raised to ambient; each
/// with its lock, and the lock of `KEEP_CAPS`.
const SECURE_BITS: libc::c_ulong = 0b1110_1111;

/// Every signal as a new program has it, and none held back.
pub fn default_signals() -> Result<(), Failure> {
    // By the kernel's own call: libc keeps two signals for itself and refuses to touch them, and
    // they may have been inherited as ignored.
    let default = [0_u64; 4]; // handler, flags, restorer, mask
    for signal in 1..=SIGNALS_MAX {
        // SAFETY: the kernel reads the four words of a `sigaction`, all zero, and writes nothing;
        // no handler of ours is involved. KILL and STOP refuse, and are the default already.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null_mut::<u64>(),
                std::mem::size_of::<u64>(),
            )
        };
    }
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
        .at(Stage::Process, || "sigprocmask")
}

/// Resource limits, and the mode of what it might make. A limit is never raised.
pub fn limit(limits: &Limits) -> Result<(), Failure> {
    umask(Mode::from_bits_truncate(0o077));
    let wanted = [
        (Resource::RLIMIT_CORE, Some(0)),
        (Resource::RLIMIT_FSIZE, limits.file_bytes),
        (Resource::RLIMIT_NOFILE, limits.descriptors),
        (Resource::RLIMIT_NPROC, limits.threads),
    ];
    for (resource, value) in wanted {
        let Some(value) = value else { continue };
        let (_, hard) = getrlimit(resource).at(Stage::Limits, || format!("{resource:?}"))?;
        let value = value.min(hard);
        setrlimit(resource, value, value).at(Stage::Limits, || format!("{resource:?}"))?;
    }
    Ok(())
}

/// The user, then no capability in any set, locked, and no program that brings one back.
pub fn drop_all(user: User) -> Result<(), Failure> {
    if has_setpcap() {
        for capability in 0..CAPABILITIES_MAX {
            // An older kernel knows fewer.
            match control(libc::PR_CAPBSET_DROP, capability) {
                Err(Errno::EINVAL) if capability > CAP_SETPCAP => break,
                outcome => outcome.at(Stage::Privileges, || format!("bounding {capability}"))?,
            }
        }
        control(libc::PR_SET_SECUREBITS, SECURE_BITS).at(Stage::Privileges, || "securebits")?;
    }
    if let User::Own(id) = user {
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        setgroups(&[]).at(Stage::Privileges, || "setgroups")?;
        setresgid(gid, gid, gid).at(Stage::Privileges, || "setresgid")?;
        setresuid(uid, uid, uid).at(Stage::Privileges, || "setresuid")?;
    }
    control(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong,
    )
    .at(Stage::Privileges, || "ambient capabilities")?;
    no_capabilities().at(Stage::Privileges, || "capset")?;
    control(libc::PR_SET_NO_NEW_PRIVS, 1).at(Stage::Privileges, || "no_new_privs")
}

/// Without it the bounding set can't be emptied; then there is no capability to bound either.
fn has_setpcap() -> bool {
    let mut header = [CAPABILITY_VERSION_3, 0];
    let mut sets = [0_u32; 6];
    // SAFETY: capget writes two structures of three words; they are here and outlive the call.
    let asked = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) };
    asked == 0 && sets[0] & (1 << CAP_SETPCAP) != 0
}

fn no_capabilities() -> io::Result<()> {
    let mut header = [CAPABILITY_VERSION_3, 0];
    let sets = [0_u32; 6];
    // SAFETY: capset reads two structures of three words; they are here and outlive the call.
    if unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn control(option: libc::c_int, value: libc::c_ulong) -> Result<(), Errno> {
    // SAFETY: these options take numbers only; the unused ones have to be zero.
    Errno::result(unsafe { libc::prctl(option, value, 0_u64, 0_u64, 0_u64) }).map(drop)
}
