//! What becomes of a packet that no socket hook saw: one from outside, to a node port or a load balancer's address.
//!
//! Both directions of a connection are kept as flows: what the packet's addresses are, and what they become. A backend on this
//! node gets the client's own address, and its answers are renamed on their way out. A backend elsewhere gets the node's address as
//! the source, so that it answers here; such packets can't pass through the node's own routing (it takes no packet that claims to
//! come from itself) and are sent on at once.

use outrigger_abi::{Addr, Flow, FrontendKey, Port, TCP, Tuple, UDP, Uplink, flow_flags, frontend_flags, slot_flags};

use crate::service::{Choice, Client, Hint, Tables, Verdict, choose, scale};

pub const FIN: u8 = 1 << 0;
pub const SYN: u8 = 1 << 1;
pub const RST: u8 = 1 << 2;
pub const ACK: u8 = 1 << 4;

/// Ports for connections that are sent on to other nodes: below the range that the kernel gives to the node's own connections
/// and beside that of node ports.
const FIRST_PORT: u32 = 2048;
const PORTS: u32 = 28_000;
/// Ports tried for one connection before it is dropped.
const TRIES: u32 = 4;

/// The flows.
pub trait Flows {
    fn flow(&self, tuple: &Tuple) -> Option<&Flow>;
    /// False when there is one already.
    fn add_flow(&self, tuple: &Tuple, flow: &Flow) -> bool;
    fn set_flow(&self, tuple: &Tuple, flow: &Flow);
    fn remove_flow(&self, tuple: &Tuple);
    /// Adds flags to a flow; the flags that it has then, 0 when it is gone.
    fn mark(&self, tuple: &Tuple, flags: u32) -> u32;
}

/// What is read of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    pub tuple: Tuple,
    /// TCP's flags; 0 for UDP.
    pub tcp: u8,
}

impl Packet {
    #[inline(always)]
    const fn opens(&self) -> bool {
        self.tuple.protocol != TCP || self.tcp & (SYN | ACK | RST | FIN) == SYN
    }
}

/// What to do with the packet; the tuple that it gets is handed back beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: it is none of a Service's, or the node itself has to answer.
    Pass,
    Drop,
    /// Rewrite it and let it go its way.
    Rewrite,
    /// Rewrite it and send it on at once.
    Forward,
}

/// A packet that arrives on an uplink.
#[inline(always)]
pub fn arrive<T: Tables, F: Flows>(tables: &T, flows: &F, uplink: &Uplink, packet: &Packet, to: &mut Tuple) -> Action {
    if let Some(flow) = flows.flow(&packet.tuple) {
        let ended = flow.flags & flow_flags::CLOSED != 0;
        if !(ended && packet.opens()) {
            let forward = flow.flags & flow_flags::REDIRECT != 0;
            *to = flow.to;
            follow(flows, packet, to);
            return if forward { Action::Forward } else { Action::Rewrite };
        }
        // The client uses its port again: nothing of the old connection may lead the new one.
        *to = flow.to.reversed();
        flows.remove_flow(to);
        flows.remove_flow(&packet.tuple);
    }
    if !packet.opens() || (packet.tuple.protocol != TCP && packet.tuple.protocol != UDP) {
        return Action::Pass;
    }
    let key = FrontendKey::new(packet.tuple.dst, packet.tuple.dport, packet.tuple.protocol);
    match choose(tables, &key, Client::Packet { source: packet.tuple.src, outside: true }, Hint::NONE) {
        // An address of the node refuses by itself when nothing listens there.
        Verdict::Pass | Verdict::Refuse(_) => Action::Pass,
        Verdict::Drop(_) => Action::Drop,
        Verdict::To(choice) => open(tables, flows, uplink, packet, &choice, to),
    }
}

/// A packet that leaves by an uplink: answers of backends on this node get the frontend's name.
#[inline(always)]
pub fn leave<F: Flows>(flows: &F, packet: &Packet, to: &mut Tuple) -> Action {
    match flows.flow(&packet.tuple) {
        Some(flow) if flow.flags & (flow_flags::REPLY | flow_flags::REDIRECT) == flow_flags::REPLY => {
            *to = flow.to;
            follow(flows, packet, to);
            Action::Rewrite
        }
        _ => Action::Pass,
    }
}

/// Keeps the flows of a new connection.
#[inline(always)]
fn open<T: Tables, F: Flows>(tables: &T, flows: &F, uplink: &Uplink, packet: &Packet, choice: &Choice, to: &mut Tuple) -> Action {
    let mut flow =
        Flow { seen: tables.now(), to: packet.tuple.reversed(), flags: flow_flags::REPLY, service: choice.service, zero: [0; 2] };
    *to = packet.tuple;
    to.dst = choice.backend.addr;
    to.dport = choice.backend.port;
    let local = choice.slot_flags & slot_flags::LOCAL != 0 || choice.frontend_flags & frontend_flags::MASQUERADE_NEVER != 0;
    // The same client port may lead to the same backend by two frontends: the later connection gets another source then.
    let kept = local && flows.add_flow(&to.reversed(), &flow);
    if !kept {
        let source = if packet.tuple.src.is_v4() { uplink.v4 } else { uplink.v6 };
        flow.flags |= flow_flags::REDIRECT;
        if source == Addr::default() || !masquerade(tables, flows, source, &flow, to) {
            return Action::Drop;
        }
    }
    flow.flags &= !flow_flags::REPLY;
    flow.to = *to;
    flows.set_flow(&packet.tuple, &flow);
    if kept { Action::Rewrite } else { Action::Forward }
}

/// Gives the connection the node's address and a port that is free towards this backend.
#[inline(always)]
fn masquerade<T: Tables, F: Flows>(tables: &T, flows: &F, source: Addr, reply: &Flow, to: &mut Tuple) -> bool {
    to.src = source;
    let mut tries = 0;
    while tries < TRIES {
        tries += 1;
        to.sport = Port::new((FIRST_PORT + scale(tables.random(), PORTS)) as u16);
        if flows.add_flow(&to.reversed(), reply) {
            return true;
        }
    }
    false
}

/// Notes the end of a TCP connection. `to` is what the packet becomes, so its reverse is the other direction's flow.
#[inline(always)]
fn follow<F: Flows>(flows: &F, packet: &Packet, to: &Tuple) {
    if packet.tcp & (FIN | RST) == 0 || packet.tuple.protocol != TCP {
        return;
    }
    let other = to.reversed();
    let ended = packet.tcp & RST != 0 || {
        flows.mark(&packet.tuple, flow_flags::FIN);
        flows.mark(&other, 0) & flow_flags::FIN != 0
    };
    if ended {
        flows.mark(&packet.tuple, flow_flags::CLOSED);
        flows.mark(&other, flow_flags::CLOSED);
    }
}

#[cfg(test)]
#[path = "packet_tests.rs"]
mod tests;
