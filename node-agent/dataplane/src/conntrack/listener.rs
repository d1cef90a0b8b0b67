//! Connections through Services as connection tracking tells of them, while somebody watches.
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use netlink_sys::constants::NETLINK_NETFILTER;
use outrigger_desired::{Protocol, Table};

use super::{CT_DELETE, CT_NEW, CTA_ID, Tracked, is_served, read_tracked};
use crate::netlink::{Attributes, Connection, Message};
use crate::sight::{Event, Reason, What, service_of};

/// NFNLGRP_CONNTRACK_NEW, _UPDATE and _DESTROY.
const GROUPS: u32 = 0b111;
const CTA_PROTOINFO: u16 = 4;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
const CTA_COUNTERS_ORIG: u16 = 9;
const CTA_COUNTERS_REPLY: u16 = 10;
const CTA_COUNTERS_BYTES: u16 = 2;
/// `enum tcp_conntrack`.
const SYN_RECV: u8 = 2;
const ESTABLISHED: u8 = 3;
const TIME_WAIT: u8 = 7;
const CLOSE: u8 = 8;
/// Connections whose end was not heard of don't pile up.
const MAX_KNOWN: usize = 1 << 16;

pub struct Listener {
    connection: Connection,
    known: HashMap<[u8; 4], Known>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    since: Instant,
    opened: bool,
}

/// What one message says of a connection.
struct Told {
    id: [u8; 4],
    gone: bool,
    /// Only of TCP, and only where it changed.
    state: Option<u8>,
    bytes: Option<(u64, u64)>,
}

impl Listener {
    pub fn open() -> io::Result<Self> {
        let connection = Connection::listen(NETLINK_NETFILTER, GROUPS)?;
        connection.allow_many_messages()?;
        Ok(Self { connection, known: HashMap::new() })
    }

    /// What happened since the last call.
    pub fn events(&mut self, table: &Table) -> io::Result<Vec<Event>> {
        let Self { connection, known } = self;
        let (mut events, now) = (Vec::new(), Instant::now());
        let whole = connection.heard(|message| {
            if let Some((tracked, told)) = read(&message)
                && is_served(table, &tracked)
                && let Some(what) = step(known, &tracked, &told, now)
            {
                events.push(event(table, &tracked, &told, what));
            }
        })?;
        if !whole {
            tracing::warn!("connections came and went faster than they could be listened to");
        }
        if known.len() > MAX_KNOWN {
            known.clear();
        }
        Ok(events)
    }
}

fn step(known: &mut HashMap<[u8; 4], Known>, tracked: &Tracked, told: &Told, now: Instant) -> Option<(What, Option<std::time::Duration>)> {
    let is_tcp = tracked.original.protocol == Protocol::Tcp.number();
    let ended = told.gone || matches!(told.state, Some(TIME_WAIT | CLOSE));
    if ended {
        // What began before the listener did has an end too, but that may have been told before.
        let Known { since, opened } = known.remove(&told.id)?;
        let what = if opened { What::Closed } else { What::Refused(Reason::ConnectFailed) };
        return Some((what, Some(now - since)));
    }
    let entry = known.entry(told.id).or_insert(Known { since: now, opened: false });
    let opens = if is_tcp { told.state.is_some_and(|state| (SYN_RECV..=ESTABLISHED).contains(&state)) } else { true };
    let first = opens && !entry.opened;
    entry.opened |= opens;
    first.then(|| (What::Opened, is_tcp.then(|| now - entry.since)))
}

fn event(table: &Table, tracked: &Tracked, told: &Told, (what, took): (What, Option<std::time::Duration>)) -> Event {
    let (original, reply) = (tracked.original, tracked.reply);
    let frontend = SocketAddr::new(original.destination, original.destination_port);
    Event {
        what,
        count: 1,
        service: service_of(table, frontend, original.protocol).cloned(),
        protocol: original.protocol,
        source: Some(SocketAddr::new(original.source, original.source_port)),
        frontend: Some(frontend),
        backend: Some(SocketAddr::new(reply.source, reply.source_port)),
        bytes: told.bytes,
        took,
    }
}

fn read(message: &Message<'_>) -> Option<(Tracked, Told)> {
    if message.kind != CT_NEW && message.kind != CT_DELETE {
        return None;
    }
    let attributes = message.body.get(4..)?;
    let tracked = read_tracked(attributes)?;
    let find = |attributes, kind| Attributes(attributes).find(|attribute| attribute.kind == kind).map(|attribute| attribute.value);
    let id = *find(attributes, CTA_ID)?.first_chunk()?;
    let state = || find(find(find(attributes, CTA_PROTOINFO)?, CTA_PROTOINFO_TCP)?, CTA_PROTOINFO_TCP_STATE)?.first().copied();
    // Where connections are accounted (net.netfilter.nf_conntrack_acct), with their end.
    let bytes = |kind| Some(u64::from_be_bytes(*find(find(attributes, kind)?, CTA_COUNTERS_BYTES)?.first_chunk()?));
    let bytes = bytes(CTA_COUNTERS_ORIG).zip(bytes(CTA_COUNTERS_REPLY));
    Some((tracked, Told { id, gone: message.kind == CT_DELETE, state: state(), bytes }))
}

#[cfg(test)]
mod tests {
    use super::super::Tuple;
    use super::*;

    #[test]
    fn a_connection_is_told_of_twice() {
        let mut known = HashMap::new();
        let now = Instant::now();
        let ip = "10.0.0.1".parse().unwrap();
        let tuple = |protocol| Tuple { source: ip, destination: ip, protocol, source_port: 1, destination_port: 2 };
        let tracked = |protocol| Tracked { original: tuple(protocol), reply: tuple(protocol), identity: Vec::new() };
        let mut say = |protocol, id: u8, state: Option<u8>, gone| {
            let told = Told { id: [id; 4], gone, state, bytes: None };
            step(&mut known, &tracked(protocol), &told, now).map(|(what, _)| what)
        };
        assert_eq!(say(6, 1, Some(1), false), None, "a SYN alone opens nothing");
        assert_eq!(say(6, 1, Some(SYN_RECV), false), Some(What::Opened));
        assert_eq!(say(6, 1, Some(ESTABLISHED), false), None);
        assert_eq!(say(6, 1, Some(TIME_WAIT), false), Some(What::Closed));
        assert_eq!(say(6, 1, None, true), None, "its entry's end is no news");
        assert_eq!(say(6, 2, Some(1), false), None);
        assert_eq!(say(6, 2, Some(CLOSE), false), Some(What::Refused(Reason::ConnectFailed)));
        assert_eq!(say(17, 3, None, false), Some(What::Opened));
        assert_eq!(say(17, 3, None, true), Some(What::Closed));
    }
}
