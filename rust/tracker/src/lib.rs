//! The tracker: preloaded into QEMU, it does two things to one file, one to a device, and bars a
//! guest's network from the host's loopback (`network`).
//!
//! 1. The mapping of the memory file is registered with a userfaultfd for *asynchronous*
//!    write-protect, so that `PAGEMAP_SCAN` from another process can list and re-arm the pages
//!    that were written.
//! 2. QEMU 7.2 opens the memory file `O_RDWR` although it maps it privately. The open of exactly
//!    that path is answered with a duplicate of a descriptor that the driver handed over, which is
//!    read-only; QEMU never needs a right on the file itself.
//!
//! 3. QEMU opens `/dev/kvm` by its name, and a confined one has neither the file nor the right: it
//!    is answered with a duplicate of a descriptor that the driver handed over.
//!
//! The environment says which file: `DIAPAUSE_MEMORY_PATH`, the path as QEMU is told to open it,
//! and `DIAPAUSE_MEMORY_FD`, the inherited descriptor. Without both the first two are inert; with
//! `DIAPAUSE_TRACK=off` the first is. `DIAPAUSE_KVM_FD` is the device's descriptor, where there is
//! one.
//!
//! Facts about userfaultfd that this relies on (Linux 6.7 and later):
//! - `UFFD_USER_MODE_ONLY` needs no privilege, and is enough: an asynchronous write-protect fault
//!   is resolved in the kernel, also when the kernel itself writes guest RAM for a read of a disk.
//! - `WP_UNPOPULATED` is needed so that a page that was never touched is tracked too.
//! - Registration alone arms nothing; the first re-arming scan does.
//! - The registration lives as long as the descriptor: it is never closed.

mod network;

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::os::unix::ffi::OsStringExt;
use std::sync::OnceLock;

const UFFD_USER_MODE_ONLY: c_int = 1;
const UFFD_API: u64 = 0xAA;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;
// _IOWR(0xAA, 0x3F, struct uffdio_api) and _IOWR(0xAA, 0x00, struct uffdio_register).
const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// The one file that this library acts on.
struct Memory {
    path: CString,
    fd: c_int,
    device: u64,
    inode: u64,
    track: bool,
}

fn memory() -> Option<&'static Memory> {
    static MEMORY: OnceLock<Option<Memory>> = OnceLock::new();
    MEMORY.get_or_init(read_environment).as_ref()
}

fn read_environment() -> Option<Memory> {
    let path = CString::new(std::env::var_os("DIAPAUSE_MEMORY_PATH")?.into_vec()).ok()?;
    let fd = std::env::var("DIAPAUSE_MEMORY_FD").ok()?.parse().ok()?;
    let (device, inode) = identity(fd)?;
    Some(Memory {
        path,
        fd,
        device,
        inode,
        track: std::env::var_os("DIAPAUSE_TRACK").is_none_or(|word| word != "off"),
    })
}

fn kvm() -> Option<c_int> {
    static KVM: OnceLock<Option<c_int>> = OnceLock::new();
    *KVM.get_or_init(|| std::env::var("DIAPAUSE_KVM_FD").ok()?.parse().ok())
}

fn identity(fd: c_int) -> Option<(u64, u64)> {
    let mut status = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: fstat writes a whole `stat` when it returns 0 and is only read then.
    let status = unsafe {
        if libc::fstat(fd, status.as_mut_ptr()) != 0 {
            return None;
        }
        status.assume_init()
    };
    Some((status.st_dev, status.st_ino))
}

fn complain(what: &str) {
    eprintln!(
        "diapause-tracker: {what}: {}",
        std::io::Error::last_os_error()
    );
}

/// The process's userfaultfd, opened at the first mapping; negative where the kernel refuses.
fn userfaultfd() -> c_int {
    static UFFD: OnceLock<c_int> = OnceLock::new();
    *UFFD.get_or_init(|| {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
        // SAFETY: takes flags only and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as c_int;
        if fd < 0 {
            complain("userfaultfd");
            return -1;
        }
        let features = FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED;
        let mut api = UffdioApi {
            api: UFFD_API,
            features,
            ioctls: 0,
        };
        // SAFETY: `api` is the structure this request reads and writes, and outlives the call.
        if unsafe { libc::ioctl(fd, UFFDIO_API, &mut api) } != 0 {
            complain("asynchronous write-protect");
            return -1;
        }
        fd
    })
}

fn track(start: *mut c_void, length: usize) {
    let uffd = userfaultfd();
    if uffd < 0 {
        return;
    }
    let mut range = UffdioRegister {
        start: start as u64,
        len: length as u64,
        mode: REGISTER_MODE_WP,
        ioctls: 0,
    };
    // SAFETY: the range is the mapping that mmap has just returned; registering it for
    // write-protect changes no byte of it.
    if unsafe { libc::ioctl(uffd, UFFDIO_REGISTER, &mut range) } != 0 {
        complain("register");
    }
}

/// The next definition of a libc function, looked up once.
fn next(cell: &OnceLock<usize>, name: &CStr) -> usize {
    // SAFETY: dlsym with a NUL-terminated name; the result is an address or null.
    *cell.get_or_init(|| unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) as usize })
}

type MmapFn =
    extern "C" fn(*mut c_void, libc::size_t, c_int, c_int, c_int, libc::off64_t) -> *mut c_void;
type OpenFn = extern "C" fn(*const c_char, c_int, c_int) -> c_int;

fn map(
    address: *mut c_void,
    length: libc::size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: libc::off64_t,
) -> *mut c_void {
    static NEXT: OnceLock<usize> = OnceLock::new();
    // SAFETY: libc's mmap64 has exactly this signature on a 64-bit target.
    let mmap64: MmapFn = unsafe { std::mem::transmute(next(&NEXT, c"mmap64")) };
    let start = mmap64(address, length, protection, flags, fd, offset);
    if fd >= 0 && start != libc::MAP_FAILED {
        if let Some(memory) = memory() {
            if memory.track && identity(fd) == Some((memory.device, memory.inode)) {
                track(start, length);
            }
        }
    }
    start
}

/// The inherited descriptor that stands for this path, where there is one.
fn handed(path: *const c_char) -> Option<c_int> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller of open passes a NUL-terminated path.
    let path = unsafe { CStr::from_ptr(path) };
    match memory() {
        Some(memory) if memory.path.as_c_str() == path => Some(memory.fd),
        _ if path == c"/dev/kvm" => kvm(),
        _ => None,
    }
}

fn open_as(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    static NEXT: OnceLock<usize> = OnceLock::new();
    if let Some(fd) = handed(path) {
        // SAFETY: duplicates the inherited descriptor; both stay valid.
        return unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    }
    // SAFETY: libc's open64 reads its third argument only with O_CREAT or O_TMPFILE; passing it
    // always is how the x86-64 and AArch64 calling conventions pass a variadic int.
    let open64: OpenFn = unsafe { std::mem::transmute(next(&NEXT, c"open64")) };
    open64(path, flags, mode)
}

/// Stands before libc's `mmap`: registers the memory file's mapping.
///
/// # Safety
/// As libc's `mmap`.
#[no_mangle]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: libc::size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: libc::off64_t,
) -> *mut c_void {
    map(address, length, protection, flags, fd, offset)
}

/// Stands before libc's `mmap64`: registers the memory file's mapping.
///
/// # Safety
/// As libc's `mmap64`.
#[no_mangle]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: libc::size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: libc::off64_t,
) -> *mut c_void {
    map(address, length, protection, flags, fd, offset)
}

/// Stands before libc's `open`: answers what was handed over with its descriptor.
///
/// # Safety
/// As libc's `open`.
#[no_mangle]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    open_as(path, flags, mode)
}

/// Stands before libc's `open64`: answers what was handed over with its descriptor.
///
/// # Safety
/// As libc's `open64`.
#[no_mangle]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    open_as(path, flags, mode)
}

/// Stands before the fortified `open` without a mode.
///
/// # Safety
/// As libc's `open`.
#[no_mangle]
pub unsafe extern "C" fn __open_2(path: *const c_char, flags: c_int) -> c_int {
    open_as(path, flags, 0)
}

/// Stands before the fortified `open64` without a mode.
///
/// # Safety
/// As libc's `open64`.
#[no_mangle]
pub unsafe extern "C" fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
    open_as(path, flags, 0)
}
