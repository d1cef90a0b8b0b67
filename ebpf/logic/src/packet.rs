//! What becomes of a packet that no socket hook saw: one from outside to a node port or a load balancer's address, or one of a pod whose
//! sockets can't be led.
//!
//! Both directions of a connection are kept as flows: what the packet's addresses are, and what they become. A backend on this
//! node gets the client's own address, and its answers are renamed on their way out. A backend elsewhere gets the node's address as
//! the source, so that it answers here; such packets can't pass through the node's own routing (it takes no packet that claims to
//! come from itself) and are sent on at once.

use outrigger_abi::sight::Reason;
use outrigger_abi::{Addr, Flow, FrontendKey, MASQUERADE_PORTS, Port, TCP, Tuple, UDP, Uplink, flow_flags, frontend_flags, slot_flags};

use crate::service::{Choice, Client, Hint, Tables, Verdict, choose};
use crate::sight;

pub const FIN: u8 = 1 << 0;
pub const SYN: u8 = 1 << 1;
pub const RST: u8 = 1 << 2;
pub const ACK: u8 = 1 << 4;

const FIRST_PORT: u32 = MASQUERADE_PORTS.0 as u32;
const PORTS: u32 = MASQUERADE_PORTS.1 as u32 + 1 - FIRST_PORT;
/// Ports tried for one connection before it is dropped.
const TRIES: u32 = 6;

/// The flows.
pub trait Flows {
    /// [`lead`], [`refuse`] and [`open`], which in the programs are calls of their own: the stack is too small for all at once.
    fn lead(&self, packet: &Packet, outside: bool) -> Verdict;
    fn refuse(&self, node: &Uplink, outside: bool, packet: &Packet, service: u32, to: &mut Tuple) -> Action;
    fn open(&self, node: &Uplink, outside: bool, packet: &Packet, choice: &Choice, to: &mut Tuple) -> Action;
    fn flow(&self, tuple: &Tuple) -> Option<&Flow>;
    /// False when there is one already.
    fn add_flow(&self, tuple: &Tuple, flow: &Flow) -> bool;
    fn set_flow(&self, tuple: &Tuple, flow: &Flow);
    fn remove_flow(&self, tuple: &Tuple);
    /// Adds flags to a flow; the flags that it has then, 0 when it is gone.
    fn mark(&self, tuple: &Tuple, flags: u32) -> u32;
    /// Counts up, apart for each CPU.
    fn turn(&self) -> u32;
    /// The node's address on the way from one to the other; all zero when the way has none.
    fn source_towards(&self, from: &Addr, to: &Addr) -> Addr;
    /// Counts a connection that came to nothing.
    fn refused(&self, packet: &Packet, service: u32, reason: Reason);
}

/// What of a packet there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it, or the first fragment.
    Whole,
    /// A later fragment.
    Later,
    /// An ICMP error about a packet; the tuple is the one of that packet's answer, since both go the same way.
    Error,
}

/// What is read of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    pub tuple: Tuple,
    /// TCP's flags; 0 for UDP.
    pub tcp: u8,
    pub part: Part,
}

impl Packet {
    #[inline(always)]
    const fn opens(&self) -> bool {
        matches!(self.part, Part::Whole) && may_open(self.tuple.protocol, self.tcp)
    }

    /// Whether it is the first answer of a new TCP connection.
    #[inline(always)]
    const fn accepts(&self) -> bool {
        matches!(self.part, Part::Whole) && self.tuple.protocol == TCP && self.tcp & (SYN | ACK | RST | FIN) == SYN | ACK
    }
}

/// Whether a packet of this protocol and with these TCP flags may be the first of a connection. All others concern nobody while there are no
/// flows.
#[inline(always)]
pub const fn may_open(protocol: u8, tcp: u8) -> bool {
    protocol != TCP || tcp & (SYN | ACK | RST | FIN) == SYN
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

/// Whether answers are renamed when they leave. Others are sent on from where they arrive.
#[inline(always)]
const fn on_leaving(flow: &Flow) -> bool {
    flow.flags & (flow_flags::REPLY | flow_flags::REDIRECT) == flow_flags::REPLY
}

/// A packet that arrives: from outside, or from a pod. `node` has the node's own addresses.
#[inline(always)]
pub fn arrive<T: Tables, F: Flows>(tables: &T, flows: &F, node: &Uplink, outside: bool, packet: &Packet, to: &mut Tuple) -> Action {
    if let Some(flow) = flows.flow(&packet.tuple) {
        let ended = flow.flags & flow_flags::CLOSED != 0;
        if ended && packet.accepts() {
            // A socket of the node itself has dialled from the port of a connection that is over.
            flows.remove_flow(&packet.tuple);
            return Action::Pass;
        }
        if !(ended && packet.opens()) {
            if on_leaving(flow) {
                return Action::Pass;
            }
            let forward = flow.flags & flow_flags::REDIRECT != 0;
            *to = flow.to;
            // Somebody else may have the port of a connection that is over.
            if !ended {
                follow(flows, packet, to);
            }
            return if forward { Action::Forward } else { Action::Rewrite };
        }
        // The client uses its port again: nothing of the old connection may lead the new one.
        *to = flow.to.reversed();
        if flows.flow(to).is_some_and(|reply| reply.to == packet.tuple.reversed()) {
            flows.remove_flow(to);
        }
        flows.remove_flow(&packet.tuple);
    }
    if !packet.opens() || (packet.tuple.protocol != TCP && packet.tuple.protocol != UDP) {
        return Action::Pass;
    }
    match flows.lead(packet, outside) {
        Verdict::Pass => Action::Pass,
        // An address of the node refuses by itself when nothing listens there.
        Verdict::Refuse(service) if tables.node_address(&packet.tuple.dst).is_some() => {
            flows.refused(packet, service, sight::without_backend(service));
            Action::Pass
        }
        Verdict::Refuse(service) => {
            flows.refused(packet, service, sight::without_backend(service));
            flows.refuse(node, outside, packet, service, to)
        }
        Verdict::Drop(service, reason) => {
            flows.refused(packet, service, reason);
            Action::Drop
        }
        Verdict::To(choice) => flows.open(node, outside, packet, &choice, to),
    }
}

/// Where a packet that opens a connection goes.
#[inline(always)]
pub fn lead<T: Tables>(tables: &T, packet: &Packet, outside: bool) -> Verdict {
    let Tuple { src: source, dst, sport: port, dport, protocol, .. } = packet.tuple;
    choose(tables, &FrontendKey::new(dst, dport, protocol), Client::Packet { source, port, outside }, Hint::NONE)
}

/// A packet that leaves: answers of backends on this node, and of the node itself, get the frontend's name.
#[inline(always)]
pub fn leave<F: Flows>(flows: &F, packet: &Packet, to: &mut Tuple) -> Action {
    match flows.flow(&packet.tuple) {
        Some(flow) if on_leaving(flow) => {
            *to = flow.to;
            follow(flows, packet, to);
            Action::Rewrite
        }
        _ => Action::Pass,
    }
}

/// Lets the node refuse in the frontend's name: nothing ever listens at port 0.
#[inline(always)]
pub fn refuse<T: Tables, F: Flows>(
    tables: &T,
    flows: &F,
    node: &Uplink,
    outside: bool,
    packet: &Packet,
    service: u32,
    to: &mut Tuple,
) -> Action {
    let own = if packet.tuple.src.is_v4() { node.v4 } else { node.v6 };
    if own == Addr::default() {
        return Action::Drop;
    }
    *to = packet.tuple;
    to.dst = own;
    to.dport = Port(0);
    // Closed from the start, and only the way back: the next packet is judged anew.
    let flags = flow_flags::REPLY | flow_flags::CLOSED | if outside { 0 } else { flow_flags::POD };
    let flow = Flow { seen: tables.now(), to: packet.tuple.reversed(), flags, service, zero: [0; 2] };
    flows.add_flow(&to.reversed(), &flow);
    Action::Rewrite
}

/// Keeps the flows of a new connection.
#[inline(always)]
pub fn open<T: Tables, F: Flows>(
    tables: &T,
    flows: &F,
    node: &Uplink,
    outside: bool,
    packet: &Packet,
    choice: &Choice,
    to: &mut Tuple,
) -> Action {
    let origin = if outside { 0 } else { flow_flags::POD };
    let flags = flow_flags::REPLY | origin;
    let mut flow = Flow { seen: tables.now(), to: packet.tuple.reversed(), flags, service: choice.service, zero: [0; 2] };
    *to = packet.tuple;
    to.dst = choice.backend.addr;
    to.dport = choice.backend.port;
    // Answers to pods come back here anyway; a pod that is led to itself wouldn't take them.
    let here = !outside || choice.slot_flags & slot_flags::LOCAL != 0 || choice.frontend_flags & frontend_flags::MASQUERADE_NEVER != 0;
    // The same client port may lead to the same backend by two frontends: the later connection gets another source then.
    let kept = here && to.src != to.dst && claim(flows, &to.reversed(), &flow);
    if !kept && !outside && to.src != to.dst {
        // A pod keeps its address, by which others judge it: only its port changes, and changes back where answers leave to it.
        if !other_port(flows, &flow, to) {
            flows.refused(packet, choice.service, Reason::NoSourcePort);
            return Action::Drop;
        }
    } else if !kept {
        let mut source = flows.source_towards(&to.src, &to.dst);
        if source == Addr::default() {
            // No uplink leads there, so answers come as a pod's packets do.
            flow.flags |= flow_flags::POD;
            source = if packet.tuple.src.is_v4() { node.v4 } else { node.v6 };
        }
        flow.flags |= flow_flags::REDIRECT;
        to.src = source;
        if source == Addr::default() || !other_port(flows, &flow, to) {
            let reason = if source == Addr::default() { Reason::NoRoute } else { Reason::NoSourcePort };
            flows.refused(packet, choice.service, reason);
            return Action::Drop;
        }
    }
    flow.flags = flow.flags & flow_flags::REDIRECT | origin;
    flow.to = *to;
    flows.set_flow(&packet.tuple, &flow);
    if flow.flags & flow_flags::REDIRECT == 0 { Action::Rewrite } else { Action::Forward }
}

/// Gives the connection a source port that is free towards this backend.
///
/// One after the other, so that each rests for as long as can be: a backend remembers connections that it closed for a minute, and takes
/// a new one in an old one's place only when the clock of its client agrees, which that of another client needn't.
#[inline(always)]
fn other_port<F: Flows>(flows: &F, reply: &Flow, to: &mut Tuple) -> bool {
    let mut tries = 0;
    while tries < TRIES {
        tries += 1;
        to.sport = Port::new((FIRST_PORT + flows.turn() % PORTS) as u16);
        if claim(flows, &to.reversed(), reply) {
            return true;
        }
    }
    false
}

/// Adds the flow where there is none, or only that of a connection that is over.
#[inline(always)]
fn claim<F: Flows>(flows: &F, tuple: &Tuple, flow: &Flow) -> bool {
    if flows.flow(tuple).is_some_and(|old| old.flags & flow_flags::CLOSED != 0) {
        flows.remove_flow(tuple);
    }
    flows.add_flow(tuple, flow)
}

/// Notes the end of a TCP connection. `to` is what the packet becomes, so its reverse is the other direction's flow.
#[inline(always)]
fn follow<F: Flows>(flows: &F, packet: &Packet, to: &Tuple) {
    if packet.tcp & (FIN | RST) == 0 || packet.tuple.protocol != TCP {
        return; // an error about a packet doesn't end its connection either: it has no flags
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
