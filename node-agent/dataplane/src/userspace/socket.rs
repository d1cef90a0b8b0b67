//! Sockets as the forwarder needs them: listening at addresses that are routed here, and connecting in a client's name.
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt};

const IPV6_TRANSPARENT: libc::c_int = 75;
const IPV6_FREEBIND: libc::c_int = 78;

/// A socket that doesn't block, of the address' family.
fn open(address: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    if address.is_ipv6() {
        // IPv4 has sockets of its own.
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    Ok(socket)
}

/// Bound to an address of the node, or to one that a route leads here.
pub(super) fn bound(address: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let socket = open(address, kind)?;
    if kind == SockType::Stream {
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    }
    match address {
        SocketAddr::V4(_) => setsockopt(&socket, sockopt::IpFreebind, &true)?,
        // Unlike IPv4's, IPv6's local routes alone don't let a socket be bound.
        SocketAddr::V6(_) => enable_v6(&socket, IPV6_FREEBIND)?,
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket)
}

/// To connect to `target` from, as `source` where given.
pub(super) fn from(source: Option<IpAddr>, target: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let socket = open(target, kind)?;
    if let Some(source) = source {
        match target {
            SocketAddr::V4(_) => setsockopt(&socket, sockopt::IpTransparent, &true)?,
            SocketAddr::V6(_) => enable_v6(&socket, IPV6_TRANSPARENT)?,
        }
        bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(source, 0)))?;
    }
    Ok(socket)
}

fn enable_v6(socket: &OwnedFd, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads one integer, which outlives the call.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IPV6, option, (&raw const on).cast(), size_of_val(&on) as libc::socklen_t)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
