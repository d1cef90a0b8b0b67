//! What the kernel's maps say, for people: every frontend with its backends and counters.
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use outrigger_abi as abi;

use super::attach::Pins;
use super::maps::Tables;
use crate::backend::Result;

/// One frontend as the programs see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The unspecified address stands for the node's own.
    pub ip: IpAddr,
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u8,
    /// For clients on this node.
    pub backends: Vec<SocketAddr>,
    /// For clients from outside.
    pub outside: Vec<SocketAddr>,
    /// Since the Service port was first seen, over all of its frontends.
    pub connections: u64,
    pub refused: u64,
}

/// Reads the maps pinned in `pin_dir`, sorted by address. Works beside a running agent and without one.
pub fn frontends(pin_dir: &Path) -> Result<Vec<Line>> {
    let tables = Tables::open(&Pins::at(pin_dir).maps())?;
    let mut found = tables.frontends.entries()?;
    found.sort_by_key(|(key, _)| (key.addr.sort_key(), key.port.host(), key.protocol));
    let slots = tables.slots.entries()?;
    let endpoints = |range: abi::Range| {
        let slots = slots.iter().skip(range.base as usize).take(range.count as usize);
        slots.map(|slot| SocketAddr::new(slot.addr.ip(), slot.port.host())).collect()
    };
    let line = |(key, value): &(abi::FrontendKey, abi::Frontend)| {
        let counters = tables.counters.get(value.service)?;
        Ok(Line {
            ip: key.addr.ip(),
            port: key.port.host(),
            protocol: key.protocol,
            backends: endpoints(value.internal),
            outside: endpoints(value.external),
            connections: counters.connections,
            refused: counters.refused,
        })
    };
    found.iter().map(line).collect()
}
