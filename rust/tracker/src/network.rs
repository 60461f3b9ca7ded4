//! Keeps a guest's network away from the host's loopback.
//!
//! QEMU's user network turns what a guest sends to its gateway into a connection to the host's own
//! 127.0.0.1, and QEMU 7.2 has no option against it. So `connect`, `sendto` and `sendmsg` are
//! answered with "connection refused" where they go to this host's loopback or to a link-local
//! address (where clouds keep a machine's credentials). What the guest sees is a closed port.
//!
//! One exception: the host's name server, which QEMU lends the guest as 10.0.2.3, may itself be on
//! the loopback. Port 53 of the addresses in `DIAPAUSE_NET_RESOLVERS` (comma between them) is let
//! through. Without that variable the machine has no network, and nothing here acts.

use std::ffi::{c_int, c_void};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::OnceLock;

use crate::next;

const NAME_SERVICE: u16 = 53;

fn resolvers() -> Option<&'static Vec<IpAddr>> {
    static RESOLVERS: OnceLock<Option<Vec<IpAddr>>> = OnceLock::new();
    RESOLVERS
        .get_or_init(|| Some(parse(&std::env::var("DIAPAUSE_NET_RESOLVERS").ok()?)))
        .as_ref()
}

fn parse(list: &str) -> Vec<IpAddr> {
    list.split(',')
        .filter_map(|word| word.trim().parse().ok())
        .collect()
}

fn is_barred(target: SocketAddr, resolvers: &[IpAddr]) -> bool {
    let address = target.ip().to_canonical();
    let near = match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.octets()[0] == 0 || v4.is_link_local(),
        IpAddr::V6(v6) => {
            v6.is_loopback() || v6.is_unspecified() || v6.segments()[0] & 0xFFC0 == 0xFE80
        }
    };
    near && !(target.port() == NAME_SERVICE && resolvers.contains(&address))
}

/// The internet address behind a pointer that a caller passed; None for every other family.
///
/// # Safety
/// `address` is null or points to `length` readable bytes.
unsafe fn internet(address: *const libc::sockaddr, length: usize) -> Option<SocketAddr> {
    if address.is_null() || length < size_of::<libc::sa_family_t>() {
        return None;
    }
    // SAFETY: the family is the first field, and that much is readable; unaligned reads are allowed
    // for, as callers keep addresses in buffers of bytes.
    let family = c_int::from(unsafe { address.cast::<libc::sa_family_t>().read_unaligned() });
    if family == libc::AF_INET && length >= size_of::<libc::sockaddr_in>() {
        // SAFETY: the length was checked against the type of this family.
        let v4 = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
        let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
        return Some((ip, u16::from_be(v4.sin_port)).into());
    }
    if family == libc::AF_INET6 && length >= size_of::<libc::sockaddr_in6>() {
        // SAFETY: the length was checked against the type of this family.
        let v6 = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
        let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
        return Some((ip, u16::from_be(v6.sin6_port)).into());
    }
    None
}

/// Whether a call to this address has to be refused; says so in `errno`.
///
/// # Safety
/// As `internet`.
unsafe fn refused(address: *const libc::sockaddr, length: usize) -> bool {
    let Some(resolvers) = resolvers() else {
        return false;
    };
    // SAFETY: the caller's promise.
    let Some(target) = (unsafe { internet(address, length) }) else {
        return false;
    };
    if !is_barred(target, resolvers) {
        return false;
    }
    // SAFETY: errno is this thread's own.
    unsafe { *libc::__errno_location() = libc::ECONNREFUSED };
    true
}

type ConnectFn = extern "C" fn(c_int, *const libc::sockaddr, libc::socklen_t) -> c_int;
type SendtoFn = extern "C" fn(
    c_int,
    *const c_void,
    libc::size_t,
    c_int,
    *const libc::sockaddr,
    libc::socklen_t,
) -> libc::ssize_t;
type SendmsgFn = extern "C" fn(c_int, *const libc::msghdr, c_int) -> libc::ssize_t;

/// Stands before libc's `connect`: refuses the host's loopback to a guest's network.
///
/// # Safety
/// As libc's `connect`.
#[no_mangle]
pub unsafe extern "C" fn connect(
    socket: c_int,
    address: *const libc::sockaddr,
    length: libc::socklen_t,
) -> c_int {
    static NEXT: OnceLock<usize> = OnceLock::new();
    // SAFETY: the caller passes an address of that length.
    if unsafe { refused(address, length as usize) } {
        return -1;
    }
    // SAFETY: libc's connect has exactly this signature.
    let connect: ConnectFn = unsafe { std::mem::transmute(next(&NEXT, c"connect")) };
    connect(socket, address, length)
}

/// Stands before libc's `sendto`: refuses the host's loopback to a guest's network.
///
/// # Safety
/// As libc's `sendto`.
#[no_mangle]
pub unsafe extern "C" fn sendto(
    socket: c_int,
    data: *const c_void,
    size: libc::size_t,
    flags: c_int,
    address: *const libc::sockaddr,
    length: libc::socklen_t,
) -> libc::ssize_t {
    static NEXT: OnceLock<usize> = OnceLock::new();
    // SAFETY: the caller passes an address of that length, or none.
    if unsafe { refused(address, length as usize) } {
        return -1;
    }
    // SAFETY: libc's sendto has exactly this signature.
    let sendto: SendtoFn = unsafe { std::mem::transmute(next(&NEXT, c"sendto")) };
    sendto(socket, data, size, flags, address, length)
}

/// Stands before libc's `sendmsg`: refuses the host's loopback to a guest's network.
///
/// # Safety
/// As libc's `sendmsg`.
#[no_mangle]
pub unsafe extern "C" fn sendmsg(
    socket: c_int,
    message: *const libc::msghdr,
    flags: c_int,
) -> libc::ssize_t {
    static NEXT: OnceLock<usize> = OnceLock::new();
    if !message.is_null() {
        // SAFETY: the caller passes a whole message, with an address of that length or none.
        let barred =
            unsafe { refused((*message).msg_name.cast(), (*message).msg_namelen as usize) };
        if barred {
            return -1;
        }
    }
    // SAFETY: libc's sendmsg has exactly this signature.
    let sendmsg: SendmsgFn = unsafe { std::mem::transmute(next(&NEXT, c"sendmsg")) };
    sendmsg(socket, message, flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn barred(target: &str, resolvers: &str) -> bool {
        is_barred(target.parse().expect("an address"), &parse(resolvers))
    }

    #[test]
    fn this_host_is_barred_in_every_spelling() {
        for target in [
            "127.0.0.1:80",
            "127.9.9.9:1",
            "0.0.0.0:80",
            "169.254.169.254:80",
            "[::1]:80",
            "[::]:80",
            "[::ffff:127.0.0.1]:80",
            "[fe80::1]:80",
        ] {
            assert!(barred(target, ""), "{target}");
        }
        for target in ["10.1.2.3:80", "192.168.0.1:22", "[2001:db8::1]:80"] {
            assert!(!barred(target, ""), "{target}");
        }
    }

    #[test]
    fn only_the_name_service_of_the_hosts_own_resolver_is_let_through() {
        assert!(!barred("127.0.0.53:53", "127.0.0.53,9.9.9.9"));
        assert!(barred("127.0.0.53:80", "127.0.0.53"));
        assert!(barred("127.0.0.1:53", "127.0.0.53"));
        assert!(barred("127.0.0.53:53", "nonsense,"));
    }

    #[test]
    fn reads_addresses_of_the_internet_and_no_others() {
        let v4 = libc::sockaddr_in {
            sin_family: libc::AF_INET as libc::sa_family_t,
            sin_port: 80_u16.to_be(),
            sin_addr: libc::in_addr {
                s_addr: u32::from(Ipv4Addr::LOCALHOST).to_be(),
            },
            sin_zero: [0; 8],
        };
        let at = std::ptr::from_ref(&v4).cast::<libc::sockaddr>();
        let whole = size_of::<libc::sockaddr_in>();
        // SAFETY: the pointer is to a whole address, and no length is beyond it.
        unsafe {
            assert_eq!(
                internet(at, whole),
                Some("127.0.0.1:80".parse().expect("an address"))
            );
            assert_eq!(internet(at, whole - 1), None);
            assert_eq!(internet(std::ptr::null(), whole), None);
        }
        let unix = libc::sockaddr {
            sa_family: libc::AF_UNIX as libc::sa_family_t,
            sa_data: [0; 14],
        };
        // SAFETY: as above.
        assert_eq!(unsafe { internet(&unix, size_of_val(&unix)) }, None);
    }
}
