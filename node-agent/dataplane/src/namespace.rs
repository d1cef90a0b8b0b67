//! Network namespaces: the node's own, and those of the pods under its cgroup.
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// A network namespace to work in.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

impl Namespace {
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::open(path)? })
    }

    /// The calling thread's.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Runs `work` inside, on a thread of its own, so that no other work is moved along.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.file, CloneFlags::CLONE_NEWNET)?)
    }
}

/// What the programs know the calling thread's network namespace by.
pub fn cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut cookie = 0_u64;
    let mut size = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to `cookie`; both outlive the call.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, (&raw mut cookie).cast(), &raw mut size) };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// An address of the calling thread's namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub ip: IpAddr,
    /// The interface that it sits on.
    pub interface: String,
    pub loopback: bool,
}

pub fn addresses() -> io::Result<Vec<Address>> {
    let mut found = Vec::new();
    for interface in nix::ifaddrs::getifaddrs()? {
        let loopback = interface.flags.contains(nix::net::if_::InterfaceFlags::IFF_LOOPBACK);
        let Some(address) = interface.address else { continue };
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        let ip = v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())));
        found.extend(ip.map(|ip| Address { ip, interface: interface.interface_name, loopback }));
    }
    Ok(found)
}

/// The interfaces of the calling thread's namespace, but for loopback.
pub fn interfaces() -> io::Result<BTreeSet<String>> {
    use nix::net::if_::InterfaceFlags;
    let found = nix::ifaddrs::getifaddrs()?.filter(|interface| !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK));
    Ok(found.map(|interface| interface.interface_name).collect())
}

/// Tells when interfaces or addresses of the namespace that it was opened in change.
pub struct Changes {
    socket: netlink_sys::Socket,
}

impl Changes {
    pub fn open() -> io::Result<Self> {
        /// RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR.
        const GROUPS: u32 = 0x1 | 0x10 | 0x100;
        let mut socket = netlink_sys::Socket::new(netlink_sys::constants::NETLINK_ROUTE)?;
        socket.bind(&netlink_sys::SocketAddr::new(0, GROUPS))?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket })
    }

    /// Whether something changed since the last question.
    pub fn any(&self) -> bool {
        let mut any = false;
        loop {
            match self.socket.recv_from_full() {
                Ok(_) => any = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return any,
                // Some were lost.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(_) => return true,
            }
        }
    }
}

/// The node's own namespace, and one for each other that a process under the cgroup lives in. Processes that end meanwhile are
/// skipped.
pub fn below(cgroup: &Path, node: &Namespace) -> io::Result<Vec<Namespace>> {
    let node = Namespace { file: node.file.try_clone()? };
    let mut found = HashMap::from([(node.file.metadata()?.ino(), node)]);
    collect(cgroup, &mut found)?;
    Ok(found.into_values().collect())
}

fn collect(cgroup: &Path, found: &mut HashMap<u64, Namespace>) -> io::Result<()> {
    for pid in fs::read_to_string(cgroup.join("cgroup.procs"))?.lines() {
        let path = format!("/proc/{pid}/ns/net");
        let Ok(meta) = fs::metadata(&path) else { continue };
        if let std::collections::hash_map::Entry::Vacant(vacant) = found.entry(meta.ino())
            && let Ok(namespace) = Namespace::open(Path::new(&path))
        {
            vacant.insert(namespace);
        }
    }
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            match collect(&entry.path(), found) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}
