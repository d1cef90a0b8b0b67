//! Sockets that a Service led to a backend, in every network namespace of the node: listed, and ended when the backend is gone.
//!
//! Only sockets that a Service led to the backend are ended, never those that dialled it themselves. For TCP the kernel's socket
//! dump hands out the note that the programs left on each socket (`Peer`). For UDP it doesn't; there the socket's cookie finds
//! its entry in the map `datagrams`.
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket, sockopt,
};
use outrigger_abi::{Addr, DatagramKey, Endpoint, Peer, Port, UDP, datagram_direction};

use super::maps::Shared;
use crate::backend::Live;
use crate::namespace::Namespace;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
const SK_DIAG_BPF_STORAGE: u16 = 1;
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;
const NLA_TYPE_MASK: u16 = 0x3fff;
/// nlmsghdr.
const HEADER: usize = 16;
/// inet_diag_req_v2: family, protocol, extensions, padding, states, then the socket's id.
const REQUEST: usize = 56;
/// inet_diag_msg: family, state, timer, retransmits, the socket's id (48 bytes), then five counters.
const REPLY: usize = 72;
const ID: usize = 48;

const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];
const PROTOCOLS: [u8; 2] = [outrigger_abi::TCP, outrigger_abi::UDP];
/// All but LISTEN, CLOSE and TIME_WAIT for TCP. UDP knows ESTABLISHED (connected) and CLOSE (not).
const STATES: u32 = !((1 << 10) | (1 << 7) | (1 << 6));

/// A socket that has a note.
struct Found {
    family: u8,
    protocol: u8,
    id: [u8; ID],
    peer: Peer,
}

/// Ends the sockets whose note `is_doomed`, and counts them. A namespace that can't be looked at doesn't keep the others waiting;
/// the first such error is told at the end.
pub fn end(namespaces: &[Namespace], notes: &Shared, is_doomed: impl Fn(&Peer) -> bool + Sync) -> (usize, Option<io::Error>) {
    let mut ended = 0;
    let failure = walk(namespaces, notes, |diag, found| {
        for doomed in found.iter().filter(|found| is_doomed(&found.peer)) {
            ended += usize::from(destroy(diag, doomed)?);
        }
        Ok(())
    });
    (ended, failure)
}

/// The sockets that were led somewhere. Namespaces that can't be looked at are left out.
pub fn list(namespaces: &[Namespace], notes: &Shared) -> io::Result<Vec<Live>> {
    let mut all = Vec::new();
    let failure = walk(namespaces, notes, |_, found| {
        all.extend(found.iter().map(Found::live));
        Ok(())
    });
    match failure {
        Some(error) if all.is_empty() => Err(error),
        _ => Ok(all),
    }
}

/// Hands the noted sockets of each namespace, family and protocol to `look`, with the connection that they were read by. The first
/// error is told at the end.
fn walk(namespaces: &[Namespace], notes: &Shared, mut look: impl FnMut(&OwnedFd, &[Found]) -> io::Result<()> + Send) -> Option<io::Error> {
    let mut failure = None;
    // One thread walks through all namespaces; it ends in the last one and takes nobody with it.
    std::thread::scope(|scope| {
        let walk = scope.spawn(|| {
            for namespace in namespaces {
                if let Err(error) = namespace.enter().and_then(|()| look_here(notes, &mut look)) {
                    failure.get_or_insert(error);
                }
            }
        });
        walk.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    failure
}

fn look_here(notes: &Shared, look: &mut impl FnMut(&OwnedFd, &[Found]) -> io::Result<()>) -> io::Result<()> {
    for family in FAMILIES {
        for protocol in PROTOCOLS {
            let diag = open()?;
            match dump(&diag, family, protocol, notes) {
                // A kernel without IPv6 or without UDP's half of the dump has no such sockets.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
                found => look(&diag, &found?)?,
            }
        }
    }
    Ok(())
}

impl Found {
    fn live(&self) -> Live {
        let address = |endpoint: &Endpoint| SocketAddr::new(endpoint.addr.ip(), endpoint.port.host());
        let mut source = endpoint(&self.id, 4, 0);
        if let Some(source) = &mut source
            && i32::from(self.family) == libc::AF_INET
        {
            source.addr = Addr::from_v4_word(source.addr.0[0]);
        }
        Live {
            protocol: self.protocol,
            source: source.as_ref().map(address),
            frontend: address(&self.peer.frontend),
            backend: address(&self.peer.backend),
        }
    }
}

fn open() -> io::Result<OwnedFd> {
    let diag = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
    bind(diag.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    setsockopt(&diag, sockopt::RcvBuf, &(1 << 20))?;
    Ok(diag)
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

fn request(family: u8, protocol: u8, id: &[u8; ID]) -> Vec<u8> {
    let mut body = vec![family, protocol, 0, 0];
    body.extend(STATES.to_ne_bytes());
    body.extend(id);
    debug_assert_eq!(body.len(), REQUEST);
    body
}

fn dump(diag: &OwnedFd, family: u8, protocol: u8, notes: &Shared) -> io::Result<Vec<Found>> {
    let mut body = request(family, protocol, &[0; ID]);
    let mut inner = attribute(SK_DIAG_BPF_STORAGE_REQ_MAP_FD, &(notes.peers.as_raw_fd() as u32).to_ne_bytes());
    body.append(&mut attribute(INET_DIAG_REQ_SK_BPF_STORAGES, &std::mem::take(&mut inner)));
    send(diag.as_raw_fd(), &message(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &body), MsgFlags::empty())?;
    let mut found = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let length = recv(diag.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        for (kind, body) in Messages(&buffer[..length]) {
            match kind {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => return error_of(body).map(|()| found),
                SOCK_DIAG_BY_FAMILY => found.extend(read(protocol, body, notes)),
                _ => {}
            }
        }
    }
}

/// A socket that has a note.
fn read(protocol: u8, body: &[u8], notes: &Shared) -> Option<Found> {
    let (head, attributes) = body.split_at_checked(REPLY)?;
    let family = *head.first()?;
    let id: [u8; ID] = head.get(4..4 + ID)?.try_into().ok()?;
    let peer = if protocol == UDP { datagram_peer(family, &id, notes)? } else { stored_peer(attributes)? };
    Some(Found { family, protocol, id, peer })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// An address and a port in network byte order, at their places in `bytes`.
fn endpoint(bytes: &[u8], addr: usize, port: usize) -> Option<Endpoint> {
    let addr = Addr([word(bytes, addr)?, word(bytes, addr + 4)?, word(bytes, addr + 8)?, word(bytes, addr + 12)?]);
    Some(Endpoint::new(addr, Port(half(bytes, port)?)))
}

/// Reads the note that the kernel hands out, as `Peer` lays it out.
fn stored_peer(attributes: &[u8]) -> Option<Peer> {
    let storages = find(attributes, INET_DIAG_SK_BPF_STORAGES)?;
    let bytes = find(find(storages, SK_DIAG_BPF_STORAGE)?, SK_DIAG_BPF_STORAGE_MAP_VALUE)?;
    Some(Peer {
        seen: u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?),
        frontend: endpoint(bytes, 8, 24)?,
        backend: endpoint(bytes, 28, 44)?,
        base: word(bytes, 48)?,
        index: word(bytes, 52)?,
        service: word(bytes, 56)?,
        protocol: half(bytes, 60)?,
        flags: half(bytes, 62)?,
    })
}

/// Where a connected UDP socket was led, by its cookie and its destination.
fn datagram_peer(family: u8, id: &[u8; ID], notes: &Shared) -> Option<Peer> {
    let mut backend = endpoint(id, 20, 2)?;
    if i32::from(family) == libc::AF_INET {
        backend.addr = Addr::from_v4_word(word(id, 20)?);
    }
    let cookie = u64::from(word(id, 40)?) | u64::from(word(id, 44)?) << 32;
    let key = DatagramKey { cookie, endpoint: backend, direction: datagram_direction::REVERSE };
    // An entry that can't be read leaves the socket to time out, as an evicted one does.
    let datagram = notes.datagrams.get(&key).ok().flatten()?;
    Some(Peer { frontend: datagram.endpoint, backend, protocol: UDP.into(), ..Peer::default() })
}

/// True when the socket was there to be ended.
fn destroy(diag: &OwnedFd, found: &Found) -> io::Result<bool> {
    let body = request(found.family, found.protocol, &found.id);
    send(diag.as_raw_fd(), &message(SOCK_DESTROY, NLM_F_ACK, &body), MsgFlags::empty())?;
    let mut buffer = [0; 4096];
    let length = recv(diag.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    for (kind, body) in Messages(&buffer[..length]) {
        if kind == NLMSG_ERROR {
            return match error_of(body) {
                Ok(()) => Ok(true),
                // It ended by itself meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
                Err(error) => Err(error),
            };
        }
    }
    Ok(false)
}

fn error_of(body: &[u8]) -> io::Result<()> {
    let code = body.get(..4).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes);
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut attribute = Vec::with_capacity(4 + payload.len());
    attribute.extend((4 + payload.len() as u16).to_ne_bytes());
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(payload);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?) & NLA_TYPE_MASK;
        let payload = attributes.get(4..length)?;
        if kind == wanted {
            return Some(payload);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

/// The messages in one datagram: kind and body.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = u32::from_ne_bytes(self.0.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(self.0.get(4..6)?.try_into().ok()?);
        let body = self.0.get(HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    }
}
