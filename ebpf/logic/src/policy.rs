//! Whether a packet of an isolated pod may pass.
//!
//! A connection is judged by the rules of the direction that it was opened in, each time anew, so that a change of the rules takes
//! effect on it at once. What is kept of it is only who opened it: by that a packet is known for an answer.

use outrigger_abi::policy::{Connection, Direction, OPEN, Opened, Pod, ports};
use outrigger_abi::{Addr, Port, SCTP, TCP, UDP};

use crate::packet::{ACK, SYN};

/// What is silent for longer is no connection any more, where the protocol has no end of its own: conntrack's time for streams.
pub const SILENCE: u64 = 180 * SECOND;
/// A connection's time is written again after this long, so that a busy one isn't written at each packet.
const SECOND: u64 = 1_000_000_000;

/// What the decisions need of the maps.
pub trait Tables {
    fn is_node(&self, addr: &Addr) -> bool;
    /// The ports that a peer may be spoken to on; `ports::NONE` where no prefix has it.
    fn ports(&self, rules: u32, peer: &Addr) -> u32;
    fn has_port(&self, ports: u32, protocol: u8, port: Port) -> bool;
    fn opened(&self, connection: &Connection) -> Option<Opened>;
    fn remember(&self, connection: &Connection, opened: &Opened);
    /// Nanoseconds of the coarse monotonic clock.
    fn now(&self) -> u64;
}

/// What a packet says of who opened its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It opens one: TCP's SYN, SCTP's INIT, an echo request.
    Opens,
    /// It is the answer to that.
    Answers,
    /// It is in the midst of one.
    Continues,
    /// A datagram: any of the three.
    Datagram,
    /// An ICMP error about the connection.
    Error,
    /// Neighbour discovery that doesn't leave the link.
    Neighbour,
    /// A protocol without connections that could be followed.
    Other,
}

#[inline(always)]
pub const fn of_tcp(flags: u8) -> Kind {
    match flags & (SYN | ACK) {
        SYN => Kind::Opens,
        both if both == SYN | ACK => Kind::Answers,
        _ => Kind::Continues,
    }
}

/// By the packet's first chunk.
#[inline(always)]
pub const fn of_sctp(chunk: u8) -> Kind {
    match chunk {
        1 => Kind::Opens,
        2 => Kind::Answers,
        _ => Kind::Continues,
    }
}

/// What an ICMP message that is no error is.
#[inline(always)]
pub const fn of_icmp(v4: bool, message: u8) -> Kind {
    match (v4, message) {
        (true, 8) | (false, 128) => Kind::Opens,
        (true, 0) | (false, 129) => Kind::Answers,
        _ => Kind::Other,
    }
}

/// Neighbour discovery. It has to stay on the link, or it could carry anything anywhere: its destination is the link's, or no router
/// has passed it on.
#[inline(always)]
pub const fn is_neighbour(direction: Direction, message: u8, dst: &Addr, hops: u8) -> bool {
    let link = is_link_local(dst) || u32::from_be(dst.0[0]) >> 16 == 0xff02;
    matches!(message, 133..=137) && (link || (matches!(direction, Direction::Ingress) && hops == 255))
}

/// What is read of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    pub kind: Kind,
    pub local: Addr,
    pub remote: Addr,
    /// In an error: the one that it is about, whose remote end may be another than the error's.
    pub connection: Connection,
    /// The node itself sent it.
    pub from_node: bool,
    /// The pod sent it, to a Service that led it back.
    pub from_itself: bool,
}

/// `pod` is `None` for an interface whose pod isn't known yet: it is closed.
#[inline(always)]
pub fn passes<T: Tables>(tables: &T, pod: Option<&Pod>, direction: Direction, packet: &Packet) -> bool {
    if packet.kind as u32 == Kind::Neighbour as u32 {
        return true;
    }
    if let Some(pod) = pod
        && matches!(direction, Direction::Egress)
        && pod.egress != OPEN
        && !pod.has(&packet.local)
    {
        return false; // not the pod's address
    }
    let exempt = match direction {
        // Others may claim to be the node.
        Direction::Ingress => packet.from_itself || (packet.from_node && is_node(tables, &packet.remote)),
        Direction::Egress => is_node(tables, &packet.remote) || pod.is_some_and(|pod| pod.has(&packet.remote)),
    };
    if exempt {
        return true;
    }
    let Some(pod) = pod else { return false };
    match packet.kind {
        Kind::Other | Kind::Neighbour => allows_all(tables, pod, direction, packet),
        Kind::Error => is_about_allowed(tables, pod, &packet.connection) || allows_all(tables, pod, direction, packet),
        kind => follow(tables, pod, direction, kind, &packet.connection),
    }
}

/// The pod's neighbour is the node, whatever address its end of the link has got.
#[inline(always)]
fn is_node<T: Tables>(tables: &T, addr: &Addr) -> bool {
    is_link_local(addr) || tables.is_node(addr)
}

/// `fe80::/10`; IPv4's link-local addresses may be led off the link.
#[inline(always)]
const fn is_link_local(addr: &Addr) -> bool {
    u32::from_be(addr.0[0]) >> 22 == 0xfe80 >> 6
}

#[inline(always)]
fn allows_all<T: Tables>(tables: &T, pod: &Pod, direction: Direction, packet: &Packet) -> bool {
    let rules = pod.rules(direction);
    rules == OPEN || tables.ports(rules, &packet.remote) == ports::ALL
}

/// Whether the rules allow to open the connection in that direction.
#[inline(always)]
fn allows<T: Tables>(tables: &T, pod: &Pod, direction: Direction, connection: &Connection) -> bool {
    let rules = pod.rules(direction);
    if rules == OPEN {
        return true;
    }
    let port = match direction {
        Direction::Ingress => connection.local_port,
        Direction::Egress => connection.remote_port,
    };
    match tables.ports(rules, &connection.remote) {
        ports::NONE => false,
        ports::ALL => true,
        set => matches!(connection.protocol, TCP | UDP | SCTP) && tables.has_port(set, connection.protocol, port),
    }
}

#[inline(always)]
fn opener(opened: &Opened) -> Direction {
    if opened.direction == Direction::Egress as u32 { Direction::Egress } else { Direction::Ingress }
}

#[inline(always)]
fn is_about_allowed<T: Tables>(tables: &T, pod: &Pod, connection: &Connection) -> bool {
    match tables.opened(connection) {
        Some(opened) => allows(tables, pod, opener(&opened), connection),
        None => false,
    }
}

/// TCP and SCTP say where a connection begins, so an old one can't be taken for a new one.
#[inline(always)]
const fn expires(protocol: u8) -> bool {
    !matches!(protocol, TCP | SCTP)
}

#[inline(always)]
fn follow<T: Tables>(tables: &T, pod: &Pod, direction: Direction, kind: Kind, connection: &Connection) -> bool {
    let now = tables.now();
    let known = match kind {
        Kind::Opens => None,
        _ => tables.opened(connection).filter(|known| !expires(connection.protocol) || now.saturating_sub(known.seen) < SILENCE),
    };
    let by = match &known {
        Some(known) => opener(known),
        None => direction,
    };
    let mut allowed = allows(tables, pod, by, connection);
    let remember = allowed
        && match &known {
            Some(known) => expires(connection.protocol) && now.saturating_sub(known.seen) > SECOND,
            None => begins(pod, direction, kind, connection, now),
        };
    if remember {
        tables.remember(connection, &Opened { seen: now, direction: by as u32, zero: 0 });
    }
    // An answer to what isn't allowed any more may still be something that the pod's peer may send of its own accord.
    if !allowed && by as u32 != direction as u32 {
        allowed = allows(tables, pod, direction, connection);
    }
    allowed
}

/// Whether the first packet that is seen of a connection was sent by who opened it. A connection may be older than the pod's
/// isolation; then the end with the lower port is taken for the server, so that the pod isn't cut from its clients, nor let speak to
/// those whom it may not speak to any more.
#[inline(always)]
fn begins(pod: &Pod, direction: Direction, kind: Kind, connection: &Connection, now: u64) -> bool {
    match kind {
        Kind::Opens => return true,
        Kind::Continues => {}
        Kind::Datagram if now.saturating_sub(pod.since) > SILENCE => return true,
        Kind::Datagram => {}
        _ => return false,
    }
    let (local, remote) = (connection.local_port.host(), connection.remote_port.host());
    match direction {
        Direction::Ingress => local < remote,
        Direction::Egress => remote < local,
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
