//! The root that a VMM sees: a read-only tmpfs with read-only binds of what it needs, a `/proc` of
//! its own processes alone, and nothing else of the host.

use std::ffi::CStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{symlink, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::unistd::pivot_root;

use crate::failure::{At, Failure, Stage};
use crate::plan::c_text;

const OPEN_TREE_CLONE: libc::c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
const MOUNT_ATTR_RDONLY: u64 = 1;
const MOUNT_ATTR_NOSUID: u64 = 2;
const MOUNT_ATTR_NODEV: u64 = 4;
const MOUNT_ATTR_NOEXEC: u64 = 8;

/// `struct mount_attr`, 32 bytes since it exists (Linux 5.12).
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// What is put into the new root.
enum Source {
    Link(PathBuf),
    Mount { tree: OwnedFd, is_directory: bool },
}

/// Builds the root in this process's own mount namespace and makes it `/`.
pub fn enter(visible: &[String], hidden: &[String]) -> Result<(), Failure> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .at(Stage::Root, || "making mounts private")?;
    // All taken before the new root covers a part of the old one.
    let sources = visible
        .iter()
        .map(|path| Ok((path.as_str(), take(path)?)))
        .collect::<Result<Vec<_>, Failure>>()?;
    let place = ["/tmp", "/run", "/mnt", "/usr"]
        .into_iter()
        .find(|path| Path::new(path).is_dir())
        .ok_or_else(|| Failure::new(Stage::Root, "no directory to build it on"))?;
    let place = Path::new(place);
    empty(place, "mode=755,size=256k,nr_inodes=512")?;
    for (path, source) in sources {
        put(&place.join(&path[1..]), source).at(Stage::Root, || path)?;
    }
    for path in hidden {
        let covered = place.join(&path[1..]);
        if covered.is_dir() {
            empty(&covered, "mode=000,size=4k,nr_inodes=2")?;
            set_attributes(None, &c_path(&covered)?, MOUNT_ATTR_RDONLY, false)
                .at(Stage::Root, || path)?;
        }
    }
    own_proc(&place.join("proc"))?;
    make_root(place)
}

/// A detached copy of what lies at `path`, read-only; a link is copied as a link.
fn take(path: &str) -> Result<Source, Failure> {
    let name = || path;
    let found = fs::symlink_metadata(path).at(Stage::Root, name)?;
    if found.is_symlink() && path.matches('/').count() == 1 {
        return Ok(Source::Link(fs::read_link(path).at(Stage::Root, name)?));
    }
    let found = fs::metadata(path).at(Stage::Root, name)?;
    let kind = found.file_type();
    let tree = open_tree(path)?;
    // A device that can't be opened would be of no use.
    let devices = if kind.is_char_device() {
        0
    } else {
        MOUNT_ATTR_NODEV
    };
    let attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | devices;
    set_attributes(Some(&tree), c"", attributes, true).at(Stage::Root, name)?;
    Ok(Source::Mount {
        tree,
        is_directory: found.is_dir(),
    })
}

fn put(place: &Path, source: Source) -> io::Result<()> {
    if let Some(parent) = place.parent() {
        fs::create_dir_all(parent)?;
    }
    match source {
        Source::Link(target) => symlink(target, place),
        Source::Mount { tree, is_directory } => {
            if is_directory {
                fs::create_dir_all(place)?;
            } else {
                File::create(place)?;
            }
            let target = std::ffi::CString::new(place.as_os_str().as_encoded_bytes())?;
            // SAFETY: both paths are NUL-terminated and outlive the call.
            let moved = unsafe {
                libc::syscall(
                    libc::SYS_move_mount,
                    tree.as_raw_fd(),
                    c"".as_ptr(),
                    libc::AT_FDCWD,
                    target.as_ptr(),
                    MOVE_MOUNT_F_EMPTY_PATH,
                )
            };
            answered(moved)
        }
    }
}

/// `subset=pid`: nothing of the kernel's own settings and tables is in it.
fn own_proc(place: &Path) -> Result<(), Failure> {
    fs::create_dir(place).at(Stage::Root, || "/proc")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    let options = Some("subset=pid,hidepid=invisible");
    mount(Some("proc"), place, Some("proc"), flags, options).at(Stage::Root, || "mounting /proc")
}

/// Swaps the roots and lets go of the old one.
fn make_root(place: &Path) -> Result<(), Failure> {
    let root = || "pivot_root";
    std::env::set_current_dir(place).at(Stage::Root, root)?;
    pivot_root(".", ".").at(Stage::Root, root)?;
    // The old root lies over the new one now: this is the old one.
    umount2(".", MntFlags::MNT_DETACH).at(Stage::Root, || "leaving the old root")?;
    std::env::set_current_dir("/").at(Stage::Root, root)?;
    fs::set_permissions("/", Permissions::from_mode(0o555)).at(Stage::Root, root)?;
    let attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    set_attributes(None, c"/", attributes, false).at(Stage::Root, || "making it read-only")
}

fn empty(place: &Path, options: &str) -> Result<(), Failure> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("diapause"), place, Some("tmpfs"), flags, Some(options))
        .at(Stage::Root, || "mounting a tmpfs")
}

fn open_tree(path: &str) -> Result<OwnedFd, Failure> {
    let name = c_text(path)?;
    let flags =
        OPEN_TREE_CLONE | libc::O_CLOEXEC as libc::c_uint | libc::AT_RECURSIVE as libc::c_uint;
    // SAFETY: the path is NUL-terminated and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, name.as_ptr(), flags) };
    answered(fd).at(Stage::Root, || path)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Sets attributes of a mount: of a detached tree, or of what lies at a path.
fn set_attributes(
    tree: Option<&OwnedFd>,
    path: &CStr,
    attributes: u64,
    recursive: bool,
) -> io::Result<()> {
    let arguments = MountAttributes {
        set: attributes,
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    let mut flags = if recursive { libc::AT_RECURSIVE } else { 0 };
    if tree.is_some() {
        flags |= libc::AT_EMPTY_PATH;
    }
    let directory = tree.map_or(libc::AT_FDCWD, AsRawFd::as_raw_fd);
    // SAFETY: the structure is the kernel's and, like the path, outlives the call.
    answered(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory,
            path.as_ptr(),
            flags,
            &raw const arguments,
            size_of::<MountAttributes>(),
        )
    })
}

fn answered(value: libc::c_long) -> io::Result<()> {
    if value < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn c_path(path: &Path) -> Result<std::ffi::CString, Failure> {
    std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).at(Stage::Root, || "a path")
}
