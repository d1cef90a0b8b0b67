//! What becomes of a socket's addresses: at connect, at each unconnected send, on the way back to the program.

use outrigger_abi::{
    BackendKey, Datagram, DatagramKey, Endpoint, FrontendKey, Peer, TCP, UDP, datagram_direction, frontend_flags, peer_flags,
};

use crate::service::{Choice, Client, Hint, Tables, Verdict, choose};

/// `IPPROTO_MPTCP`: falls back to TCP on the wire, and is TCP to every Service.
const MPTCP: u32 = 262;
/// A UDP flow that was silent for this long may get another backend, as after the kernel's own timeout for conntrack streams.
const DATAGRAM_IDLE: u64 = 120_000_000_000;

/// What the decisions read and write about the socket at hand.
pub trait Socket {
    fn cookie(&self) -> u64;
    fn datagram(&self, key: &DatagramKey) -> Option<&Datagram>;
    fn set_datagram(&self, key: &DatagramKey, value: &Datagram);
}

/// The protocol number that Services know, if they know the socket's.
#[inline(always)]
pub const fn protocol(socket: u32) -> Option<u8> {
    match socket {
        6 | 17 | 132 => Some(socket as u8),
        MPTCP => Some(TCP),
        _ => None,
    }
}

/// A connect: to whom, and what to note on the socket.
#[inline(always)]
pub fn connect<T: Tables>(tables: &T, dest: Endpoint, protocol: u8, client: Client) -> Verdict {
    choose(tables, &FrontendKey::new(dest.addr, dest.port, protocol), client, Hint::NONE)
}

/// Whether a connect that finds no backend fails. One over UDP asks nobody, so elsewhere none does, and programs connect only to learn
/// their own address: a pod's datagrams are refused one by one, at its interface. The node's own meet no program that could.
#[inline(always)]
pub const fn fails_at_once(protocol: u8, client: Client) -> bool {
    protocol != UDP || client.is_host()
}

/// Notes on the socket where it is led. Field by field, into the storage itself.
#[inline(always)]
pub fn note(peer: &mut Peer, dest: Endpoint, protocol: u8, choice: &Choice, now: u64) {
    peer.seen = now;
    peer.frontend = dest;
    peer.backend = choice.backend;
    peer.base = choice.base;
    peer.index = choice.index;
    peer.service = choice.service;
    peer.protocol = protocol as u16;
    peer.flags = 0;
}

/// Counts a socket that was connected for its backend, where its Service wants to know.
#[inline(always)]
pub fn enter<T: Tables>(tables: &T, peer: &mut Peer, choice: &Choice) {
    if choice.frontend_flags & frontend_flags::LEAST_CONNECTIONS != 0 {
        peer.flags |= peer_flags::COUNTED;
        tables.opened(&BackendKey::new(peer.backend, peer.protocol as u8));
    }
}

/// Ends the socket's count: before its note changes, and when its program has closed it.
#[inline(always)]
pub fn leave<T: Tables>(tables: &T, peer: &mut Peer) {
    if peer.flags & peer_flags::COUNTED != 0 {
        peer.flags &= !peer_flags::COUNTED;
        tables.closed(&BackendKey::new(peer.backend, peer.protocol as u8));
    }
}

/// A datagram from an unconnected socket. `noted` is what the last translated send left on the socket.
///
/// A socket stays with a backend as long as the Service has it: protocols over UDP have sessions too.
#[inline(always)]
pub fn send<T: Tables, S: Socket>(tables: &T, socket: &S, dest: Endpoint, protocol: u8, client: Client, noted: Option<&Peer>) -> Verdict {
    let hint = match noted {
        Some(peer) if peer.frontend != dest => remembered(tables, socket, dest),
        Some(peer) if fresh(tables.now(), peer.seen) => Hint { backend: peer.backend, base: peer.base, index: peer.index },
        _ => Hint::NONE,
    };
    choose(tables, &FrontendKey::new(dest.addr, dest.port, protocol), client, hint)
}

#[inline(always)]
fn fresh(now: u64, seen: u64) -> bool {
    now.wrapping_sub(seen) <= DATAGRAM_IDLE
}

/// The backend that this socket last used for `dest`, when it has talked to another Service since.
#[inline(always)]
fn remembered<T: Tables, S: Socket>(tables: &T, socket: &S, dest: Endpoint) -> Hint {
    let key = DatagramKey { cookie: socket.cookie(), endpoint: dest, direction: datagram_direction::FORWARD };
    match socket.datagram(&key) {
        // The place isn't kept: a base that no set has sends the lookup straight to the search.
        Some(datagram) if fresh(tables.now(), datagram.seen) => Hint { backend: datagram.endpoint, base: u32::MAX, index: 0 },
        _ => Hint::NONE,
    }
}

/// Keeps both directions for the socket that changes between Services; `noted` is what the note of this send will replace.
#[inline(always)]
pub fn note_datagram<S: Socket>(socket: &S, noted: Option<&Peer>, dest: Endpoint, backend: Endpoint, now: u64) {
    if let Some(noted) = noted
        && noted.frontend == dest
        && noted.backend == backend
    {
        return;
    }
    let mut key = DatagramKey { cookie: socket.cookie(), endpoint: dest, direction: datagram_direction::FORWARD };
    let mut value = Datagram { seen: now, endpoint: backend, zero: 0 };
    socket.set_datagram(&key, &value);
    key.endpoint = backend;
    key.direction = datagram_direction::REVERSE;
    value.endpoint = dest;
    socket.set_datagram(&key, &value);
}

/// Keeps the way back for a UDP socket that is connected: by it the agent finds the socket when the backend goes.
#[inline(always)]
pub fn note_connected<S: Socket>(socket: &S, dest: Endpoint, backend: Endpoint, now: u64) {
    let key = DatagramKey { cookie: socket.cookie(), endpoint: backend, direction: datagram_direction::REVERSE };
    socket.set_datagram(&key, &Datagram { seen: now, endpoint: dest, zero: 0 });
}

/// Whom the program shall see as the sender of a datagram, when not `source`. Only a socket that was ever led to a backend
/// (`noted`) can have an answer, so servers pay for one lookup.
#[inline(always)]
pub fn receive<S: Socket>(socket: &S, source: Endpoint, noted: Option<&Peer>) -> Option<Endpoint> {
    let noted = noted?;
    if noted.backend == source {
        return Some(noted.frontend);
    }
    let key = DatagramKey { cookie: socket.cookie(), endpoint: source, direction: datagram_direction::REVERSE };
    socket.datagram(&key).map(|datagram| datagram.endpoint)
}

/// Whom the program shall see as the peer of its connected socket, when not `actual`.
#[inline(always)]
pub fn peer_name(actual: Endpoint, noted: Option<&Peer>) -> Option<Endpoint> {
    let noted = noted?;
    (noted.backend == actual).then_some(noted.frontend)
}

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;
