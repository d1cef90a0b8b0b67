//! Ends the kernel's connection-tracking entries that still lead to backends which are gone (ctnetlink).
//!
//! An entry outlives the rules that made it: without this a UDP flow, which has no end of its own, would go to a dead backend for as
//! long as its client keeps talking. With its entry gone a flow is translated anew, and a TCP client is told by a reset.
use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_sys::constants::NETLINK_NETFILTER;
use outrigger_desired::{Address, Delta, Entry, Family, Frontend, Protocol, Table};

use crate::backend::Live;
use crate::netlink::{self, Attributes, Builder, Connection};

const CT_GET: u16 = (1 << 8) | 1;
const CT_DELETE: u16 = (1 << 8) | 2;

const CT_NEW: u16 = 1 << 8;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;

mod listener;

pub use listener::Listener;

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
/// when the delta took no backend away. The connection is the caller's to keep: when one is closed the kernel waits until all that nftables
/// gave up is freed.
pub fn sweep(connection: &Connection, table: &Table, delta: &Delta) -> io::Result<usize> {
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
    let mut ended = 0;
    // A dump goes through the kernel's whole table.
    let touched = |family: &Family| match &scope {
        Scope::All => true,
        Scope::Only(frontends) => frontends.iter().any(|frontend| frontend.address.family() == *family),
    };
    for family in Family::ALL.into_iter().filter(touched) {
        for tracked in dump(connection, family)? {
            if is_stale(table, &scope, &tracked) {
                ended += usize::from(delete(connection, family, &tracked)?);
            }
        }
    }
    Ok(ended)
}

/// The translated connections that go through frontends of the table.
pub fn live(table: &Table) -> io::Result<Vec<Live>> {
    let connection = Connection::open(NETLINK_NETFILTER)?;
    let mut all = Vec::new();
    for family in Family::ALL {
        all.extend(dump(&connection, family)?.iter().filter(|tracked| is_served(table, tracked)).map(|tracked| Live {
            protocol: tracked.original.protocol,
            source: Some(SocketAddr::new(tracked.original.source, tracked.original.source_port)),
            frontend: SocketAddr::new(tracked.original.destination, tracked.original.destination_port),
            backend: SocketAddr::new(tracked.reply.source, tracked.reply.source_port),
        }));
    }
    Ok(all)
}

fn is_served(table: &Table, tracked: &Tracked) -> bool {
    let Some(protocol) = Protocol::of_number(tracked.original.protocol) else { return false };
    let at = |address| table.get(&Frontend { address, port: tracked.original.destination_port, protocol });
    let entry = at(Address::Ip(tracked.original.destination)).or_else(|| at(Address::Node(Family::of(tracked.original.destination))));
    entry.is_some_and(|entry| leads_to_answerer(entry, tracked))
}

/// Whether the one who answers is a backend of the entry.
fn leads_to_answerer(entry: &Entry, tracked: &Tracked) -> bool {
    entry.alive().any(|endpoint| endpoint.ip == tracked.reply.source && endpoint.port == tracked.reply.source_port)
}

fn is_stale(table: &Table, scope: &Scope, tracked: &Tracked) -> bool {
    let Some(protocol) = Protocol::of_number(tracked.original.protocol) else { return false };
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
    match table.get(&frontend) {
        Some(entry) => !leads_to_answerer(entry, tracked),
        // The frontend itself is gone; only UDP's get into the scope for that.
        None => matches!(scope, Scope::Only(_)),
    }
}

fn dump(connection: &Connection, family: Family) -> io::Result<Vec<Tracked>> {
    let mut found = Vec::new();
    connection.dump(&message(CT_GET, netlink::DUMP, family, &[]), |message| found.extend(message.body.get(4..).and_then(read_tracked)))?;
    Ok(found)
}

/// False when the entry was gone already.
fn delete(connection: &Connection, family: Family, tracked: &Tracked) -> io::Result<bool> {
    match connection.request(&message(CT_DELETE, netlink::ACK, family, &tracked.identity)) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn message(kind: u16, flags: u16, family: Family, attributes: &[u8]) -> Vec<u8> {
    let family = match family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    };
    let mut builder = Builder::default();
    builder.begin(kind, flags, &[family as u8, 0, 0, 0]);
    builder.raw(attributes);
    builder.end();
    builder.take()
}

fn read_tracked(attributes: &[u8]) -> Option<Tracked> {
    let (mut original, mut reply, mut identity) = (None, None, Vec::new());
    for attribute in Attributes(attributes) {
        match attribute.kind {
            CTA_TUPLE_ORIG => original = read_tuple(attribute.value),
            CTA_TUPLE_REPLY => reply = read_tuple(attribute.value),
            _ => {}
        }
        if matches!(attribute.kind, CTA_TUPLE_ORIG | CTA_ID | CTA_ZONE) {
            identity.extend_from_slice(attribute.whole);
        }
    }
    Some(Tracked { original: original?, reply: reply?, identity })
}

fn read_tuple(attributes: &[u8]) -> Option<Tuple> {
    let (mut source, mut destination) = (None, None);
    let (mut protocol, mut source_port, mut destination_port) = (None, None, None);
    for group in Attributes(attributes) {
        for attribute in Attributes(group.value) {
            let value = attribute.value;
            match (group.kind, attribute.kind) {
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
