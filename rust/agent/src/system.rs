//! What HELLO does to the guest: the clock, the kernel's random pool, host name and machine id.
//!
//! Invariants: everything is tried, whatever failed before it; a failure is reported, never fatal;
//! files are replaced whole. Without `enabled` nothing is changed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sys::time::TimeSpec;
use nix::time::{clock_gettime, clock_settime, ClockId};

use crate::message::{decode_hex, Hello, Identity};

const ENTROPY_LEN: usize = 64;
const OPERATION_MAX: usize = 64;

mod requests {
    //! The two requests of the kernel's random device.
    #[repr(C)]
    pub struct Pool {
        pub entropy_bits: i32,
        pub size: i32,
        pub bytes: [u8; super::ENTROPY_LEN],
    }
    // The number encodes the fixed part only: two ints.
    nix::ioctl_write_ptr_bad!(add_entropy, nix::request_code_write!(b'R', 0x03, 8), Pool);
    nix::ioctl_none!(reseed, b'R', 0x07);
}

/// The effects of HELLO on the guest.
pub struct System {
    enabled: bool,
    incarnation: String,
}

impl System {
    /// `enabled` is false where nothing may be changed.
    pub fn new(enabled: bool) -> io::Result<Self> {
        let mut bytes = [0; 16];
        io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
        Ok(Self {
            enabled,
            incarnation: crate::message::encode_hex(&bytes),
        })
    }

    /// Whether the system may be changed.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The random name of this agent process.
    pub fn incarnation(&self) -> &str {
        &self.incarnation
    }

    /// Sets the clock, mixes the entropy, takes the identity; returns what failed.
    pub fn apply(&self, hello: &Hello) -> Vec<String> {
        let mut failed = Vec::new();
        let mut attempt = |what: &str, done: io::Result<()>| {
            if let Err(error) = done {
                failed.push(format!("{what}: {error}"));
            }
        };
        let entropy = decode_hex::<ENTROPY_LEN>(&hello.entropy);
        let identity = hello.identity.as_ref();
        if self.enabled {
            attempt(
                "entropy",
                entropy.ok_or_else(invalid).and_then(credit_entropy),
            );
            if let Some(identity) = identity {
                attempt("hostname", set_hostname(identity));
                attempt("identity", write_identity(Path::new("/"), identity));
            }
            // Last, so that what the host checks is as fresh as it can be.
            attempt("clock", set_clock(hello.realtime_ns));
        } else {
            attempt("entropy", entropy.map(drop).ok_or_else(invalid));
            attempt("identity", identity.map_or(Ok(()), check_identity));
        }
        failed
    }

    /// Writes to the kernel's log what the host asks for, and by which id it knows that.
    ///
    /// It is for people: where it can't be written, nothing else changes.
    pub fn note(&self, what: &str, operation: Option<&str>) {
        let line = operation.and_then(|operation| note_line(what, operation));
        if let (true, Some(line)) = (self.enabled, line) {
            let log = File::options().write(true).open("/dev/kmsg");
            let _ = log.and_then(|mut log| log.write_all(line.as_bytes()));
        }
    }
}

/// The line of the kernel's log for one exchange; none for an id that is no id.
fn note_line(what: &str, operation: &str) -> Option<String> {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let is_id = (1..=OPERATION_MAX).contains(&operation.len()) && operation.bytes().all(is_plain);
    // 7, debug: in the log, and not on a console that somebody reads.
    is_id.then(|| format!("<7>diapause-agent: {what} for operation {operation}\n"))
}

fn invalid() -> io::Error {
    io::Error::from(io::ErrorKind::InvalidInput)
}

fn set_clock(realtime_ns: i64) -> io::Result<()> {
    let time = TimeSpec::new(
        realtime_ns.div_euclid(1_000_000_000),
        realtime_ns.rem_euclid(1_000_000_000),
    );
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?)
}

fn credit_entropy(bytes: [u8; ENTROPY_LEN]) -> io::Result<()> {
    let device = File::options().write(true).open("/dev/urandom")?;
    let pool = requests::Pool {
        entropy_bits: 8 * ENTROPY_LEN as i32,
        size: ENTROPY_LEN as i32,
        bytes,
    };
    // SAFETY: the descriptor is open and the kernel only reads `pool`, whose size field is its
    // array's length.
    unsafe { requests::add_entropy(device.as_raw_fd(), &pool) }?;
    // SAFETY: the request takes no argument and the descriptor is open.
    unsafe { requests::reseed(device.as_raw_fd()) }?;
    Ok(())
}

fn check_identity(identity: &Identity) -> io::Result<()> {
    let name = &identity.hostname;
    let named = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.');
    if !named
        || name.is_empty()
        || name.len() > 64
        || decode_hex::<16>(&identity.machine_id).is_none()
    {
        return Err(invalid());
    }
    Ok(())
}

fn set_hostname(identity: &Identity) -> io::Result<()> {
    check_identity(identity)?;
    Ok(nix::unistd::sethostname(&identity.hostname)?)
}

/// Writes `etc/hostname` and `etc/machine-id` below `root`.
pub fn write_identity(root: &Path, identity: &Identity) -> io::Result<()> {
    check_identity(identity)?;
    let etc = root.join("etc");
    replace(&etc, "hostname", &identity.hostname, 0o644)?;
    replace(&etc, "machine-id", &identity.machine_id, 0o444)
}

fn replace(directory: &Path, name: &str, line: &str, mode: u32) -> io::Result<()> {
    let temporary = directory.join(format!(".{name}.diapause"));
    let _ = fs::remove_file(&temporary); // left by an agent that was killed here
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)?;
    writeln!(file, "{line}")?;
    fs::rename(&temporary, directory.join(name))
}

/// Nanoseconds of a clock.
pub fn clock_ns(clock: ClockId) -> i64 {
    clock_gettime(clock).map_or(0, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// The kernel's boot id.
pub fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// A process descriptor: readable once the process has ended.
pub fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else owns it.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd as i32) })
}

/// Makes sure that no descriptor that the agent was started with reaches a command.
pub fn seal_inherited_descriptors() {
    // SAFETY: the call takes three integers and only sets flags on descriptors above the standard
    // ones.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn identity(hostname: &str, machine_id: &str) -> Identity {
        Identity {
            hostname: hostname.into(),
            machine_id: machine_id.into(),
        }
    }

    #[test]
    fn an_identity_replaces_the_files_whole() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        let machine_id = "0123456789abcdef0123456789abcdef";
        for hostname in ["first", "second"] {
            write_identity(root.path(), &identity(hostname, machine_id)).unwrap();
        }
        let file = root.path().join("etc/machine-id");
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            format!("{machine_id}\n")
        );
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o444
        );
        assert_eq!(
            fs::read_to_string(root.path().join("etc/hostname")).unwrap(),
            "second\n"
        );
        assert_eq!(fs::read_dir(root.path().join("etc")).unwrap().count(), 2);
    }

    #[test]
    fn an_identity_that_is_not_one_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let machine_id = "0123456789abcdef0123456789abcdef";
        for wrong in [
            identity("a/b", machine_id),
            identity("", machine_id),
            identity("a", "xyz"),
        ] {
            assert!(write_identity(root.path(), &wrong).is_err());
        }
    }

    #[test]
    fn only_an_id_gets_into_the_kernel_log() {
        assert_eq!(
            note_line("greeted", "0123-ab").as_deref(),
            Some("<7>diapause-agent: greeted for operation 0123-ab\n")
        );
        for wrong in ["", "a b", "a\n<0>panic", "A", &"a".repeat(65)] {
            assert_eq!(note_line("greeted", wrong), None);
        }
    }

    #[test]
    fn two_processes_have_two_incarnations() {
        assert_ne!(
            System::new(false).unwrap().incarnation(),
            System::new(false).unwrap().incarnation()
        );
    }
}
