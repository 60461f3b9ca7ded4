//! The FUSE device and its mount, which has no place in any directory tree.
//!
//! Facts of the kernel that this rests on (tried on Linux 6.18):
//! - `fsmount` gives a mount that is a descriptor and nothing else: files are opened through it
//!   (`/proc/self/fd/N/NAME`), no table of mounts lists it, nobody can unmount it, and it is gone
//!   when the descriptor is. Files that are open stay.
//! - While any process holds the device, a dead server makes accesses wait. When the last one lets
//!   go, pages that the cache has stay, and others fail with SIGBUS or ENOTCONN: never zeros.
//! - A cloned descriptor has a list of its own of what was read and not answered: a reply has to go
//!   to the descriptor that its request came from, and the keeper has to hold the clones as well.
//! - A node that is passed through is never open in another way, nor to another file: such an open
//!   fails with EIO. The file stays alive by whoever has it open, also unlinked and without a
//!   server. What is mapped of it has this mount's name and number for it.
//! - `statx` with AT_STATX_DONT_SYNC asks no server: the holder of the device may call it.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::uio::writev;

use crate::namespace;
use crate::wire::{self, REQUEST_BYTES_MAX};

/// Descriptors that requests are read from, each by a thread of its own.
pub const READERS: usize = 4;

const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const MOUNT_ATTR_NOSUID: libc::c_uint = 2;
const MOUNT_ATTR_NODEV: libc::c_uint = 4;
const MOUNT_ATTR_NOEXEC: libc::c_uint = 8;

nix::ioctl_read!(
    /// Makes a fresh `/dev/fuse` another end of the connection of the one that is named.
    clone_device, 229, 0, u32
);

/// What BACKING_OPEN is told.
#[repr(C)]
pub struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

nix::ioctl_write_ptr!(
    /// Shows the kernel a file that others can be passed through to; returns what it calls it.
    open_backing, 229, 1, BackingMap
);
nix::ioctl_write_ptr!(
    /// Takes that back; who has such a file open keeps it.
    close_backing, 229, 2, u32
);

/// Who may reach the files of a mount, besides having a descriptor of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// Every user: a VMM has one of its own, who may ask for the size of what it was handed.
    Everybody,
    /// The one who mounts.
    OneUser,
}

/// A connection to the kernel: the mount, and the device with its clones.
#[derive(Debug)]
pub struct Fuse {
    mount: OwnedFd,
    devices: Vec<OwnedFd>,
}

impl Fuse {
    /// Makes a new connection, whose INIT waits to be read; in a user namespace where an ordinary
    /// user may not. (Root's VMMs have users of their own, who could not reach such a mount.)
    ///
    /// # Errors
    /// What the kernel says: no device, not allowed, too old.
    pub fn mount() -> io::Result<Self> {
        match Self::mount_for(Audience::Everybody) {
            Err(error)
                if error.kind() == io::ErrorKind::PermissionDenied
                    && !nix::unistd::geteuid().is_root() =>
            {
                namespace::mount()
                    .map_err(|within| io::Error::new(error.kind(), format!("{error}; {within}")))
            }
            other => other,
        }
    }

    /// Makes one with the rights that this process has.
    ///
    /// # Errors
    /// As for [`Fuse::mount`].
    pub fn mount_for(audience: Audience) -> io::Result<Self> {
        let first = open_device()?;
        let mount = mount_of(&first, audience)?;
        let mut devices = vec![first];
        while devices.len() < READERS {
            let clone = open_device()?;
            let mut of = devices[0].as_raw_fd() as u32;
            // SAFETY: the call reads one u32, the number of a descriptor that is open.
            unsafe { clone_device(clone.as_raw_fd(), &raw mut of) }?;
            devices.push(clone);
        }
        Ok(Self { mount, devices })
    }

    /// Takes up a connection from its descriptors, as [`Fuse::descriptors`] gave them.
    pub fn from_descriptors(descriptors: Vec<OwnedFd>) -> Option<Self> {
        let mut all = descriptors.into_iter();
        let (mount, devices) = (all.next()?, all.collect::<Vec<_>>());
        (!devices.is_empty()).then_some(Self { mount, devices })
    }

    /// The mount, then the device and its clones.
    pub fn descriptors(&self) -> impl Iterator<Item = &OwnedFd> {
        std::iter::once(&self.mount).chain(&self.devices)
    }

    /// The mount: files are opened through it, by others.
    pub fn mount_fd(&self) -> &OwnedFd {
        &self.mount
    }

    /// How many ends there are to read from.
    pub fn ends(&self) -> usize {
        self.devices.len()
    }

    /// Reads one request from end `end` into `buffer`; None where the connection has ended.
    ///
    /// # Errors
    /// What the kernel says; never what only has to be tried again.
    pub fn receive<'a>(&self, end: usize, buffer: &'a mut Buffer) -> io::Result<Option<&'a [u8]>> {
        loop {
            match nix::unistd::read(&self.devices[end], buffer.bytes()) {
                Ok(length) => return Ok(Some(&buffer.bytes()[..length])),
                // ENOENT: whoever asked has been killed in between.
                Err(nix::Error::EINTR | nix::Error::EAGAIN | nix::Error::ENOENT) => {}
                Err(nix::Error::ENODEV) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Answers a request that came from end `end`: with data, or with an error (0 or -errno).
    ///
    /// # Errors
    /// What the kernel says; not that whoever asked is gone.
    pub fn reply(&self, end: usize, unique: u64, error: i32, data: &[IoSlice]) -> io::Result<()> {
        let length = data.iter().map(|part| part.len()).sum();
        let head = wire::head(unique, error, length);
        match self.write(end, &head, data) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// Gives the page cache bytes of a file. Waits for a page that somebody is reading: never from
    /// a thread that answers reads.
    ///
    /// # Errors
    /// What the kernel says; ENOENT where it does not know the file (any more).
    pub fn store(&self, node: u64, offset: u64, data: &[IoSlice]) -> io::Result<()> {
        let length: usize = data.iter().map(|part| part.len()).sum();
        let place = wire::store_head(node, offset, length as u32);
        let head = wire::head(0, wire::NOTICE_STORE, place.len() + length);
        let mut parts = vec![IoSlice::new(&place)];
        parts.extend(data.iter().map(|part| IoSlice::new(part)));
        self.write(0, &head, &parts)
    }

    /// Asks the kernel for everything that a server before this one read and did not answer.
    ///
    /// # Errors
    /// What the kernel says; EINVAL before Linux 6.9.
    pub fn ask_again(&self) -> io::Result<()> {
        self.write(0, &wire::head(0, wire::NOTICE_RESEND, 0), &[])
    }

    /// Shows the kernel a file that files of this mount can be passed through to; returns its
    /// number for [`wire::passed_reply`]. It stays with the connection, not with this process.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN or before Linux 6.9; ELOOP for a file on a stacked file system.
    pub fn show(&self, file: BorrowedFd<'_>) -> io::Result<i32> {
        let map = BackingMap {
            fd: file.as_raw_fd(),
            flags: 0,
            padding: 0,
        };
        // SAFETY: the structure is the kernel's and outlives the call; both descriptors are open.
        Ok(unsafe { open_backing(self.devices[0].as_raw_fd(), &raw const map) }?)
    }

    /// Takes a file back that was shown: nobody can be passed through to it from now on.
    ///
    /// # Errors
    /// ENOENT for a number that is none.
    pub fn take_back(&self, backing: i32) -> io::Result<()> {
        let number = backing as u32;
        // SAFETY: the call reads one u32.
        unsafe { close_backing(self.devices[0].as_raw_fd(), &raw const number) }?;
        Ok(())
    }

    fn write(&self, end: usize, head: &[u8], data: &[IoSlice]) -> io::Result<()> {
        let mut parts = Vec::with_capacity(1 + data.len());
        parts.push(IoSlice::new(head));
        parts.extend(data.iter().map(|part| IoSlice::new(part)));
        writev(&self.devices[end], &parts)?;
        Ok(())
    }

    /// Sets how far the kernel reads ahead on this mount; needs root, and is worth a try.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_readahead(&self, kib: u32) -> io::Result<()> {
        let (major, minor) = self.device_number()?;
        let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        std::fs::write(path, kib.to_string())
    }

    /// What the kernel calls the mount; asks no server.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn device_number(&self) -> io::Result<(u32, u32)> {
        // SAFETY: all zeros is a value of this plain structure.
        let mut found: libc::statx = unsafe { std::mem::zeroed() };
        let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
        // SAFETY: the path is NUL-terminated, the structure is the kernel's, both outlive the call.
        let answer = unsafe {
            libc::statx(
                self.mount.as_raw_fd(),
                c"".as_ptr(),
                flags,
                0,
                &raw mut found,
            )
        };
        if answer != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((found.stx_dev_major, found.stx_dev_minor))
    }
}

/// Room for one request.
pub struct Buffer(Box<[u8]>);

impl Buffer {
    /// As much as the kernel wants to see.
    pub fn new() -> Self {
        Self(vec![0; REQUEST_BYTES_MAX].into())
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Self::new()
    }
}

fn open_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")?;
    Ok(device.into())
}

/// Ends a connection by its number, whoever holds its device: what waits for it gets an error. By
/// the kernel's list of connections where the system has it, else by a mount of our own.
///
/// # Errors
/// There is no such connection, or it is another user's.
pub fn abort(connection: u32) -> io::Result<()> {
    let open = |place: String| OpenOptions::new().write(true).open(place);
    let known = open(format!("/sys/fs/fuse/connections/{connection}/abort"));
    let mut file = known.or_else(|_| {
        let list = mounted(&context_of(c"fusectl")?)?;
        open(format!(
            "/proc/self/fd/{}/{connection}/abort",
            list.as_raw_fd()
        ))
    })?;
    file.write_all(b"1")
}

/// A mount of a connection; who has no descriptor of it can't name a file on it.
fn mount_of(device: &OwnedFd, audience: Audience) -> io::Result<OwnedFd> {
    let context = context_of(c"fuse")?;
    let number = |value: u32| std::ffi::CString::new(value.to_string()).unwrap_or_default();
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let fd = number(device.as_raw_fd() as u32);
    let (uid, gid) = (number(uid.as_raw()), number(gid.as_raw()));
    for (key, value) in [
        (c"source", c"diapause"),
        (c"subtype", c"diapause"),
        (c"fd", &fd),
        (c"rootmode", c"40500"),
        (c"user_id", &uid),
        (c"group_id", &gid),
    ] {
        configure(&context, FSCONFIG_SET_STRING, Some(key), Some(value))?;
    }
    let flags = [c"ro", c"default_permissions", c"allow_other"];
    let wanted = match audience {
        Audience::Everybody => &flags[..],
        Audience::OneUser => &flags[..2],
    };
    for flag in wanted {
        configure(&context, FSCONFIG_SET_FLAG, Some(flag), None)?;
    }
    mounted(&context)
}

/// A mount of a kind of file system, to be configured.
fn context_of(kind: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the name is NUL-terminated and outlives the call.
    answered(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })
}

/// What was configured, as a descriptor and nothing else.
fn mounted(context: &OwnedFd) -> io::Result<OwnedFd> {
    configure(context, FSCONFIG_CMD_CREATE, None, None)?;
    let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    // SAFETY: only numbers are passed.
    answered(unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            attributes,
        )
    })
}

fn configure(
    context: &OwnedFd,
    command: libc::c_uint,
    key: Option<&CStr>,
    value: Option<&CStr>,
) -> io::Result<()> {
    let text = |of: Option<&CStr>| of.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: both texts are NUL-terminated, or null where the command has none.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            command,
            text(key),
            text(value),
            0,
        )
    };
    if answer == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(match said_by(context) {
        Some(said) => io::Error::new(error.kind(), format!("{error}: {said}")),
        None => error,
    })
}

/// What the kernel has to say about a mount that failed.
fn said_by(context: &OwnedFd) -> Option<String> {
    let mut file = File::from(context.try_clone().ok()?);
    let mut text = [0; 256];
    let length = file.read(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text[..length]).trim().to_owned())
}

fn answered(value: libc::c_long) -> io::Result<OwnedFd> {
    if value < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(value as i32) })
}
