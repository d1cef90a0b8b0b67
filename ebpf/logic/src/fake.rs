//! The maps as plain collections, for the tests.
extern crate std;
use core::cell::{Cell, RefCell};
use std::boxed::Box;
use std::collections::{HashMap, HashSet};
use std::vec::Vec;

use outrigger_abi::sight::Reason;
use outrigger_abi::{
    Addr, Affinity, AffinityKey, BackendKey, Datagram, DatagramKey, Endpoint, Flow, Frontend, FrontendKey, MAGLEV_BLOCK, MaglevBlock, Port,
    Range, Slot, TCP, Tuple, Uplink,
};

use crate::packet::{Action, Flows, Packet, lead, open, refuse};
use crate::service::{Choice, Tables, Verdict};
use crate::socket::Socket;

#[derive(Default)]
pub struct Fake {
    pub frontends: HashMap<FrontendKey, Frontend>,
    pub slots: Vec<Slot>,
    pub maglev: Vec<MaglevBlock>,
    pub connections: RefCell<HashMap<BackendKey, i64>>,
    pub nodes: HashMap<Addr, u32>,
    pub cluster_ips: HashSet<Addr>,
    /// Service port and client.
    pub sources: HashSet<(u32, Addr)>,
    pub affinity: RefCell<HashMap<AffinityKey, Affinity>>,
    pub datagrams: RefCell<HashMap<DatagramKey, Datagram>>,
    /// The node's address on the way to others than itself.
    pub source: Addr,
    pub flows: RefCell<HashMap<Tuple, Flow>>,
    pub refused: RefCell<Vec<(u32, Reason)>>,
    pub random: Cell<u32>,
    pub now: Cell<u64>,
}

pub fn endpoint(text: &str) -> Endpoint {
    let socket: core::net::SocketAddr = text.parse().unwrap();
    Endpoint::new(Addr::from(socket.ip()), Port::new(socket.port()))
}

pub fn tcp(text: &str) -> FrontendKey {
    let endpoint = endpoint(text);
    FrontendKey::new(endpoint.addr, endpoint.port, TCP)
}

impl Fake {
    /// Appends a set of backends for `service`.
    pub fn set(&mut self, service: u32, backends: &[&str]) -> Range {
        let base = self.slots.len() as u32;
        for backend in backends {
            let Endpoint { addr, port, .. } = endpoint(backend);
            self.slots.push(Slot { addr, port, flags: 0, service });
        }
        Range { base, count: backends.len() as u32 }
    }

    /// Appends a Maglev table.
    pub fn table(&mut self, places: &[u16]) -> Range {
        let base = self.maglev.len() as u32;
        for chunk in places.chunks(MAGLEV_BLOCK as usize) {
            let mut block = MaglevBlock::default();
            block.0[..chunk.len()].copy_from_slice(chunk);
            self.maglev.push(block);
        }
        Range { base, count: places.len() as u32 }
    }

    pub fn serve(&mut self, key: FrontendKey, service: u32, backends: &[&str]) -> &mut Frontend {
        let range = self.set(service, backends);
        self.frontends.entry(key).or_insert(Frontend { service, internal: range, external: range, ..Frontend::default() })
    }
}

impl Tables for Fake {
    fn frontend(&self, key: &FrontendKey) -> Option<&Frontend> {
        self.frontends.get(key)
    }
    fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index as usize)
    }
    fn maglev(&self, index: u32) -> Option<&MaglevBlock> {
        self.maglev.get(index as usize)
    }
    fn node_address(&self, addr: &Addr) -> Option<u32> {
        self.nodes.get(addr).copied()
    }
    fn is_cluster_ip(&self, addr: &Addr) -> bool {
        self.cluster_ips.contains(addr)
    }
    fn allows(&self, service: u32, source: &Addr) -> bool {
        self.sources.contains(&(service, *source))
    }
    fn affinity(&self, key: &AffinityKey) -> Option<&Affinity> {
        // Leaked, so that it can be lent while the map changes: tests are short.
        self.affinity.borrow().get(key).map(|affinity| &*Box::leak(Box::new(*affinity)))
    }
    fn remember(&self, key: &AffinityKey, affinity: &Affinity) {
        self.affinity.borrow_mut().insert(*key, *affinity);
    }
    fn connections(&self, backend: &BackendKey) -> i64 {
        self.connections.borrow().get(backend).copied().unwrap_or(0)
    }
    fn opened(&self, backend: &BackendKey) {
        *self.connections.borrow_mut().entry(*backend).or_default() += 1;
    }
    fn closed(&self, backend: &BackendKey) {
        *self.connections.borrow_mut().entry(*backend).or_default() -= 1;
    }
    fn search(&self, range: Range, wanted: (u64, u64, u16)) -> u32 {
        crate::service::search(self, range, wanted)
    }
    fn random(&self) -> u32 {
        self.random.get()
    }
    fn now(&self) -> u64 {
        self.now.get()
    }
}

impl Socket for Fake {
    fn cookie(&self) -> u64 {
        7
    }
    fn datagram(&self, key: &DatagramKey) -> Option<&Datagram> {
        self.datagrams.borrow().get(key).map(|datagram| &*Box::leak(Box::new(*datagram)))
    }
    fn set_datagram(&self, key: &DatagramKey, value: &Datagram) {
        self.datagrams.borrow_mut().insert(*key, *value);
    }
}

impl Flows for Fake {
    fn turn(&self) -> u32 {
        self.random.get()
    }
    fn lead(&self, packet: &Packet, outside: bool) -> Verdict {
        lead(self, packet, outside)
    }
    fn refuse(&self, node: &Uplink, outside: bool, packet: &Packet, service: u32, to: &mut Tuple) -> Action {
        refuse(self, self, node, outside, packet, service, to)
    }
    fn open(&self, node: &Uplink, outside: bool, packet: &Packet, choice: &Choice, to: &mut Tuple) -> Action {
        open(self, self, node, outside, packet, choice, to)
    }
    fn refused(&self, _packet: &Packet, service: u32, reason: Reason) {
        self.refused.borrow_mut().push((service, reason));
    }
    fn source_towards(&self, _from: &Addr, _to: &Addr) -> Addr {
        self.source
    }
    fn flow(&self, tuple: &Tuple) -> Option<&Flow> {
        self.flows.borrow().get(tuple).map(|flow| &*Box::leak(Box::new(*flow)))
    }
    fn add_flow(&self, tuple: &Tuple, flow: &Flow) -> bool {
        let mut flows = self.flows.borrow_mut();
        let free = !flows.contains_key(tuple);
        if free {
            flows.insert(*tuple, *flow);
        }
        free
    }
    fn set_flow(&self, tuple: &Tuple, flow: &Flow) {
        self.flows.borrow_mut().insert(*tuple, *flow);
    }
    fn remove_flow(&self, tuple: &Tuple) {
        self.flows.borrow_mut().remove(tuple);
    }
    fn mark(&self, tuple: &Tuple, flags: u32) -> u32 {
        self.flows.borrow_mut().get_mut(tuple).map_or(0, |flow| {
            flow.flags |= flags;
            flow.flags
        })
    }
}
