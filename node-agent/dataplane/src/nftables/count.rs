//! What the kernel has counted: sets that it fills itself, with a counter at each element. Only what was used is in them.
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use outrigger_desired::{Family, Table};

use super::ops::{digit, ip_word};
use crate::netlink::{self, Attributes, Builder, Connection};
use crate::sight::{Counted, Counts, Event, Reason, What, service_of};

const SUBSYSTEM: u16 = 10;
const GET_ELEMENTS: u16 = SUBSYSTEM << 8 | 13;
const LIST_TABLE: u16 = 1;
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_EXPRESSION: u16 = 7;
const DATA_VALUE: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const COUNTER_PACKETS: u16 = 2;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tally {
    /// Connections to a backend, by frontend and backend.
    Led,
    NoEndpoint,
    LocalPolicy,
    SourceRange,
    /// By protocol alone: clients choose the ports.
    NoPort,
}

impl Tally {
    pub const ALL: [Self; 5] = [Self::Led, Self::NoEndpoint, Self::LocalPolicy, Self::SourceRange, Self::NoPort];
    const REFUSALS: [(Self, Reason); 4] = [
        (Self::NoEndpoint, Reason::NoEndpoint),
        (Self::LocalPolicy, Reason::LocalPolicy),
        (Self::SourceRange, Reason::SourceRange),
        (Self::NoPort, Reason::NoPort),
    ];

    pub fn name(self, family: Family) -> String {
        let stem = match self {
            Self::Led => "count-led",
            Self::NoEndpoint => "count-no-endpoint",
            Self::LocalPolicy => "count-local-policy",
            Self::SourceRange => "count-source-range",
            Self::NoPort => "count-no-port",
        };
        format!("{stem}{}", digit(family))
    }

    /// Full, a set counts for nobody new; what wasn't met for a day is forgotten.
    pub fn declaration(self, family: Family) -> String {
        let (name, ip) = (self.name(family), if family == Family::V4 { "ipv4_addr" } else { "ipv6_addr" });
        let key = match self {
            Self::Led => format!("{ip} . inet_proto . inet_service . {ip} . inet_service"),
            Self::NoPort => "inet_proto".into(),
            _ => format!("{ip} . inet_proto . inet_service"),
        };
        format!("set {name} {{ type {key}; flags dynamic,timeout; size 65536; timeout 1d; }}")
    }

    /// Counts what is dialled.
    pub fn rule(self, family: Family) -> String {
        let (name, ip, digit) = (self.name(family), ip_word(family), digit(family));
        let key = if self == Self::NoPort { "meta l4proto".into() } else { format!("{ip} daddr . meta l4proto . th dport") };
        format!("meta nfproto ipv{digit} update @{name} {{ {key} counter }}")
    }
}

/// What came to nothing: how often, by reason, address and protocol.
pub(super) type Refused = HashMap<(Reason, u8, Option<SocketAddr>), u64>;

pub(super) fn refused(connection: &Connection, table: &str) -> io::Result<Refused> {
    let mut all = Refused::new();
    for family in Family::ALL {
        for (tally, reason) in Tally::REFUSALS {
            for (key, count) in elements(connection, table, tally, family)? {
                let read = if tally == Tally::NoPort { key.first().map(|protocol| (*protocol, None)) } else { dialled(&key, family) };
                if let Some((protocol, address)) = read {
                    *all.entry((reason, protocol, address)).or_default() += count;
                }
            }
        }
    }
    Ok(all)
}

/// What came to nothing since.
pub(super) fn more(before: &Refused, now: &Refused, table: &Table) -> Vec<Event> {
    let event = |(key, count): (&(Reason, u8, Option<SocketAddr>), &u64)| {
        let (reason, protocol, frontend) = *key;
        let count = count.saturating_sub(before.get(key).copied().unwrap_or_default());
        let service = frontend.and_then(|frontend| service_of(table, frontend, protocol)).cloned();
        let what = What::Refused(reason);
        (count > 0).then_some(Event { what, count, service, protocol, source: None, frontend, backend: None, bytes: None, took: None })
    };
    now.iter().filter_map(event).collect()
}

pub(super) fn counts(connection: &Connection, name: &str, table: &Table) -> io::Result<Counts> {
    let mut counts = Counts::default();
    for family in Family::ALL {
        for (key, count) in elements(connection, name, Tally::Led, family)? {
            let Some((protocol, frontend)) = dialled(&key, family) else { continue };
            let Some(backend) = key.get(frontend_length(family)..).and_then(|rest| socket(rest, family, length(family))) else { continue };
            let Some(service) = frontend.and_then(|frontend| service_of(table, frontend, protocol)) else { continue };
            let counted: &mut Counted = counts.services.entry(service.clone()).or_default();
            counted.connections += count;
            counted.backends.entry(backend).or_default().connections += count;
        }
    }
    for ((reason, protocol, frontend), count) in refused(connection, name)? {
        let service = frontend.and_then(|frontend| service_of(table, frontend, protocol));
        let drops: &mut BTreeMap<Reason, u64> = match service {
            Some(service) => &mut counts.services.entry(service.clone()).or_default().drops,
            None => &mut counts.stray,
        };
        *drops.entry(reason).or_default() += count;
    }
    Ok(counts)
}

/// Each part of a key fills whole words.
fn length(family: Family) -> usize {
    if family == Family::V4 { 4 } else { 16 }
}

fn frontend_length(family: Family) -> usize {
    length(family) + 8
}

/// Protocol and address of a key that begins with them.
fn dialled(key: &[u8], family: Family) -> Option<(u8, Option<SocketAddr>)> {
    let protocol = *key.get(length(family))?;
    Some((protocol, Some(socket(key, family, length(family) + 4)?)))
}

/// The address that the bytes begin with, and the port at its place.
fn socket(bytes: &[u8], family: Family, port: usize) -> Option<SocketAddr> {
    let ip: IpAddr = match family {
        Family::V4 => Ipv4Addr::from(*bytes.first_chunk::<4>()?).into(),
        Family::V6 => Ipv6Addr::from(*bytes.first_chunk::<16>()?).into(),
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes(*bytes.get(port..)?.first_chunk()?)))
}

/// The keys in the set, with how often each was met.
fn elements(connection: &Connection, table: &str, tally: Tally, family: Family) -> io::Result<Vec<(Vec<u8>, u64)>> {
    let mut request = Builder::default();
    request.begin(GET_ELEMENTS, netlink::DUMP, &[libc::NFPROTO_INET as u8, 0, 0, 0]);
    request.text(LIST_TABLE, table);
    request.text(LIST_SET, &tally.name(family));
    request.end();
    let mut found = Vec::new();
    connection.dump(&request.take(), |message| {
        let lists = Attributes(message.body.get(4..).unwrap_or_default()).filter(|attribute| attribute.kind == LIST_ELEMENTS);
        found.extend(lists.flat_map(|list| Attributes(list.value)).filter_map(|element| read(element.value)));
    })?;
    Ok(found)
}

fn read(element: &[u8]) -> Option<(Vec<u8>, u64)> {
    let key = find(find(element, ELEMENT_KEY)?, DATA_VALUE)?;
    let counter = find(find(element, ELEMENT_EXPRESSION)?, EXPRESSION_DATA)?;
    Some((key.to_vec(), u64::from_be_bytes(*find(counter, COUNTER_PACKETS)?.first_chunk()?)))
}

fn find(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    Attributes(attributes).find(|attribute| attribute.kind == kind).map(|attribute| attribute.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_its_key_and_its_counter() {
        let mut builder = Builder::default();
        builder.nest(ELEMENT_KEY, |key| key.attribute(DATA_VALUE, &[10, 96, 0, 1, 6, 0, 0, 0, 0, 80, 0, 0, 10, 0, 0, 1, 31, 144, 0, 0]));
        builder.nest(ELEMENT_EXPRESSION, |expression| {
            expression.text(1, "counter");
            expression.nest(EXPRESSION_DATA, |data| {
                data.attribute(1, &600_u64.to_be_bytes());
                data.attribute(COUNTER_PACKETS, &10_u64.to_be_bytes());
            });
        });
        let (key, count) = read(&builder.take()).unwrap();
        assert_eq!((count, dialled(&key, Family::V4)), (10, Some((6, Some("10.96.0.1:80".parse().unwrap())))));
        let backend = socket(&key[frontend_length(Family::V4)..], Family::V4, length(Family::V4));
        assert_eq!(backend, Some("10.0.0.1:8080".parse().unwrap()));
    }
}
