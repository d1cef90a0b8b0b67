//! Ends the kernel's connection-tracking entries that still lead to backends which are gone (ctnetlink).
//!
//! An entry outlives the rules that made it: without this a UDP flow, which has no end of its own, would go to a dead backend for as
//! long as its client keeps talking. With its entry gone a flow is translated anew, and a TCP client is told by a reset.
use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_sys::constants::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr as NetlinkAddress};
use outrigger_desired::{Address, Delta, Entry, Family, Frontend, Protocol, Table};

const CT_GET: u16 = (1 << 8) | 1;
const CT_DELETE: u16 = (1 << 8) | 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_TYPE: u16 = 0x3fff;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tuple {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    source_port: u16,
    destination_port: u16,
}

/// An entry of the kernel's table.
#[derive(Clone, Debug)]
struct Tracked {
    original: Tuple,
    reply: Tuple,
    /// The attributes that name it, as the kernel sent them.
    identity: Vec<u8>,
}

/// Which frontends' entries have to be looked at.
enum Scope {
    All,
    Only(HashSet<Frontend>),
}

/// Deletes what no longer fits the table, for the frontends that the delta touches (all when it's full); returns how many. Costs nothing
/// when the delta took no backend away.
pub fn sweep(table: &Table, delta: &Delta) -> io::Result<usize> {
    let scope = if delta.full {
        Scope::All
    } else {
        let mut frontends: HashSet<Frontend> = delta.gone.iter().map(|gone| gone.frontend).collect();
        // A UDP client may have been talking to nobody before; its untranslated flow would go on to nobody.
        let opened = delta.upserts.iter().filter(|upsert| upsert.previous.as_ref().is_none_or(|previous| previous.backends.is_empty()));
        frontends.extend(opened.map(|upsert| upsert.frontend).filter(|frontend| frontend.protocol == Protocol::Udp));
        if frontends.is_empty() {
            return Ok(0);
        }
        Scope::Only(frontends)
    };
    let socket = Socket::new(NETLINK_NETFILTER)?;
    socket.connect(&NetlinkAddress::new(0, 0))?;
    let mut ended = 0;
    for family in Family::ALL {
        for tracked in dump(&socket, family)? {
            if is_stale(table, &scope, &tracked) {
                ended += usize::from(delete(&socket, family, &tracked)?);
            }
        }
    }
    Ok(ended)
}

fn is_stale(table: &Table, scope: &Scope, tracked: &Tracked) -> bool {
    let protocol = match tracked.original.protocol {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        132 => Protocol::Sctp,
        _ => return false,
    };
    let translated = tracked.reply.source != tracked.original.destination || tracked.reply.source_port != tracked.original.destination_port;
    let at = |address| Frontend { address, port: tracked.original.destination_port, protocol };
    let exact = at(Address::Ip(tracked.original.destination));
    let node = at(Address::Node(Family::of(tracked.original.destination)));
    let is_exact = match scope {
        Scope::All => table.get(&exact).is_some(),
        Scope::Only(frontends) => frontends.contains(&exact),
    };
    let frontend = if is_exact { exact } else { node };
    // A local server may listen on a port that is a NodePort elsewhere, so there only translated flows count.
    if !translated && (protocol != Protocol::Udp || !is_exact) {
        return false;
    }
    if let Scope::Only(frontends) = scope
        && !frontends.contains(&frontend)
    {
        return false;
    }
    let leads_there =
        |entry: &Entry| entry.alive().any(|endpoint| endpoint.ip == tracked.reply.source && endpoint.port == tracked.reply.source_port);
    match table.get(&frontend) {
        Some(entry) => !leads_there(entry),
        // The frontend itself is gone; only UDP's get into the scope for that.
        None => matches!(scope, Scope::Only(_)),
    }
}

fn dump(socket: &Socket, family: Family) -> io::Result<Vec<Tracked>> {
    send(socket, CT_GET, NLM_F_REQUEST | NLM_F_DUMP, family, &[])?;
    let mut found = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        for message in Messages(&datagram) {
            match message.kind {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => return error_of(message.body).map(|()| found),
                _ => found.extend(message.body.get(4..).and_then(read_tracked)),
            }
        }
    }
}

/// False when the entry was gone already.
fn delete(socket: &Socket, family: Family, tracked: &Tracked) -> io::Result<bool> {
    send(socket, CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, family, &tracked.identity)?;
    let (datagram, _) = socket.recv_from_full()?;
    let Some(message) = Messages(&datagram).next() else { return Ok(false) };
    match error_of(message.body) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn send(socket: &Socket, kind: u16, flags: u16, family: Family, attributes: &[u8]) -> io::Result<()> {
    let family = match family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    } as u8;
    let length = 20 + attributes.len();
    let mut message = Vec::with_capacity(length);
    message.extend_from_slice(&(length as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence and port: one request at a time
    message.extend_from_slice(&[family, 0, 0, 0]);
    message.extend_from_slice(attributes);
    socket.send(&message, 0).map(|_| ())
}

/// The body of an NLMSG_ERROR: zero is an acknowledgement.
fn error_of(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

struct Message<'a> {
    kind: u16,
    body: &'a [u8],
}

/// The netlink messages of a datagram.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = u32::from_ne_bytes(*self.0.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*self.0.get(4..)?.first_chunk()?);
        let body = self.0.get(16..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, body })
    }
}

/// The attributes of a message: type, value, and the whole attribute with its padding.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(*self.0.first_chunk()?));
        let kind = u16::from_ne_bytes(*self.0.get(2..)?.first_chunk()?) & NLA_TYPE;
        let value = self.0.get(4..length)?;
        let padded = length.next_multiple_of(4).min(self.0.len());
        let (whole, rest) = self.0.split_at(padded);
        self.0 = rest;
        Some((kind, value, whole))
    }
}

fn read_tracked(attributes: &[u8]) -> Option<Tracked> {
    let (mut original, mut reply, mut identity) = (None, None, Vec::new());
    for (kind, value, whole) in Attributes(attributes) {
        match kind {
            CTA_TUPLE_ORIG => original = read_tuple(value),
            CTA_TUPLE_REPLY => reply = read_tuple(value),
            _ => {}
        }
        if matches!(kind, CTA_TUPLE_ORIG | CTA_ID | CTA_ZONE) {
            identity.extend_from_slice(whole);
        }
    }
    Some(Tracked { original: original?, reply: reply?, identity })
}

fn read_tuple(attributes: &[u8]) -> Option<Tuple> {
    let (mut source, mut destination) = (None, None);
    let (mut protocol, mut source_port, mut destination_port) = (None, None, None);
    for (group, value, _) in Attributes(attributes) {
        for (kind, value, _) in Attributes(value) {
            match (group, kind) {
                (1, 1) => source = v4(value),
                (1, 2) => destination = v4(value),
                (1, 3) => source = v6(value),
                (1, 4) => destination = v6(value),
                (2, 1) => protocol = value.first().copied(),
                (2, 2) => source_port = value.first_chunk().map(|port| u16::from_be_bytes(*port)),
                (2, 3) => destination_port = value.first_chunk().map(|port| u16::from_be_bytes(*port)),
                _ => {}
            }
        }
    }
    Some(Tuple {
        source: source?,
        destination: destination?,
        protocol: protocol?,
        source_port: source_port?,
        destination_port: destination_port?,
    })
}

fn v4(value: &[u8]) -> Option<IpAddr> {
    value.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets).into())
}

fn v6(value: &[u8]) -> Option<IpAddr> {
    value.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets).into())
}
