//! Which Service an address belongs to, and which of its backends a new connection gets.

use outrigger_abi::sight::Reason;
use outrigger_abi::{
    Addr, Affinity, AffinityKey, BackendKey, Endpoint, Frontend, FrontendKey, MAGLEV_BLOCK, MaglevBlock, Port, Range, Slot, frontend_flags,
    node_address_flags,
};

use crate::hash;

/// Binary search ends after this many steps: 65,536 backends.
const MAX_SEARCH: u32 = 17;
const SECOND: u64 = 1_000_000_000;

/// What the decisions read and write: the maps, the clock, chance. Elements are lent, not copied: the programs have 512 bytes
/// of stack.
pub trait Tables {
    fn frontend(&self, key: &FrontendKey) -> Option<&Frontend>;
    fn slot(&self, index: u32) -> Option<&Slot>;
    fn maglev(&self, index: u32) -> Option<&MaglevBlock>;
    /// `node_address_flags`.
    fn node_address(&self, addr: &Addr) -> Option<u32>;
    /// Whether a Service has the address as its cluster IP, with whatever port.
    fn is_cluster_ip(&self, addr: &Addr) -> bool;
    /// Whether the Service port's source ranges have the client.
    fn allows(&self, service: u32, source: &Addr) -> bool;
    fn affinity(&self, key: &AffinityKey) -> Option<&Affinity>;
    fn remember(&self, key: &AffinityKey, affinity: &Affinity);
    /// How many of the node's sockets are counted for the backend. Below 0 when a count was lost.
    fn connections(&self, backend: &BackendKey) -> i64;
    fn opened(&self, backend: &BackendKey);
    fn closed(&self, backend: &BackendKey);
    /// [`search`], which the kernel need not follow anew for each of its callers.
    fn search(&self, range: Range, wanted: (u64, u64, u16)) -> u32;
    fn random(&self) -> u32;
    /// Nanoseconds of the coarse monotonic clock.
    fn now(&self) -> u64;
}

/// Whose connection it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// A socket's: its network namespace's cookie, and whether that is the node's own namespace.
    Socket { namespace: u64, host: bool },
    /// A packet's, from a pod or from outside.
    Packet { source: Addr, port: Port, outside: bool },
}

impl Client {
    #[inline(always)]
    pub(crate) const fn is_host(self) -> bool {
        matches!(self, Self::Socket { host: true, .. })
    }

    #[inline(always)]
    const fn is_outside(self) -> bool {
        matches!(self, Self::Packet { outside: true, .. })
    }

    #[inline(always)]
    const fn affinity_key(self, service: u32) -> AffinityKey {
        match self {
            Self::Socket { namespace, .. } => AffinityKey::namespace(namespace, service),
            Self::Packet { source, .. } => AffinityKey::address(source, service),
        }
    }
}

/// A backend that the flow had before, with the place where it was found. Not an `Option`: the compiler moves the undefined
/// content of a `None` about, and the kernel refuses programs that do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    pub backend: Endpoint,
    pub base: u32,
    pub index: u32,
}

impl Hint {
    /// No backend has port 0.
    pub const NONE: Self = Self { backend: Endpoint::new(Addr([0; 4]), Port(0)), base: 0, index: 0 };
}

/// A backend for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub service: u32,
    /// `frontend_flags`.
    pub frontend_flags: u32,
    pub backend: Endpoint,
    /// `slot_flags`.
    pub slot_flags: u16,
    pub base: u32,
    pub index: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not a Service's address.
    Pass,
    To(Choice),
    /// No backend. The Service port's index is for counting.
    Refuse(u32),
    Drop(u32, Reason),
}

/// The frontend that `key` names, directly or as a port of this node.
#[inline(always)]
pub fn find<'a, T: Tables>(tables: &'a T, key: &FrontendKey, client: Client) -> Option<&'a Frontend> {
    if let Some(frontend) = tables.frontend(key) {
        return Some(frontend);
    }
    let flags = tables.node_address(&key.addr)?;
    if flags & node_address_flags::HOST_ONLY != 0 && !client.is_host() {
        return None;
    }
    let frontend = tables.frontend(&FrontendKey { addr: key.addr.node(), ..*key })?;
    let reached = flags & node_address_flags::NODE_PORTS != 0 || frontend.flags & frontend_flags::HOST_PORT != 0;
    reached.then_some(frontend)
}

/// Where a new connection (or, with a hint, the next datagram of a flow) goes.
#[inline(always)]
pub fn choose<T: Tables>(tables: &T, key: &FrontendKey, client: Client, hint: Hint) -> Verdict {
    let Some(frontend) = find(tables, key, client) else {
        // Nobody else answers at a cluster IP; without this the client would wait for a packet that is lost.
        return if tables.is_cluster_ip(&key.addr) { Verdict::Refuse(0) } else { Verdict::Pass };
    };
    if frontend.flags & frontend_flags::SOURCE_RANGES != 0 {
        match client {
            Client::Packet { source, .. } if !tables.allows(frontend.service, &source) => {
                return Verdict::Drop(frontend.service, Reason::SourceRange);
            }
            Client::Socket { host: true, .. } if frontend.flags & frontend_flags::NODE_REFUSED != 0 => {
                return Verdict::Drop(frontend.service, Reason::SourceRange);
            }
            // Its packets have a source address, and are judged by it.
            Client::Socket { host: false, .. } => return Verdict::Pass,
            _ => {}
        }
    }
    let Some(range) = backends(frontend, client) else { return none(frontend, client) };
    if let Some((slot, index)) = pick(tables, frontend, range, key, client, hint) {
        return Verdict::To(choice(frontend, range, slot, index));
    }
    // The set was given away between the two lookups: the frontend has another by now.
    let Some(frontend) = find(tables, key, client) else { return Verdict::Pass };
    let Some(range) = backends(frontend, client) else { return none(frontend, client) };
    match slot(tables, frontend.service, range, scale(tables.random(), range.count)) {
        Some((slot, index)) => Verdict::To(choice(frontend, range, slot, index)),
        None => Verdict::Refuse(frontend.service),
    }
}

#[inline(always)]
fn backends(frontend: &Frontend, client: Client) -> Option<Range> {
    let range = if client.is_outside() { frontend.external } else { frontend.internal };
    (range.count != 0).then_some(range)
}

#[inline(always)]
fn none(frontend: &Frontend, client: Client) -> Verdict {
    let drop = if client.is_outside() { frontend_flags::DROP_EXTERNAL } else { frontend_flags::DROP_INTERNAL };
    if frontend.flags & drop != 0 { Verdict::Drop(frontend.service, Reason::LocalPolicy) } else { Verdict::Refuse(frontend.service) }
}

#[inline(always)]
fn choice(frontend: &Frontend, range: Range, slot: &Slot, index: u32) -> Choice {
    Choice {
        service: frontend.service,
        frontend_flags: frontend.flags,
        backend: slot.endpoint(),
        slot_flags: slot.flags,
        base: range.base,
        index,
    }
}

/// The flow's own backend while it is in the set, else the client's by affinity, else a new one.
#[inline(always)]
fn pick<'a, T: Tables>(
    tables: &'a T,
    frontend: &Frontend,
    range: Range,
    dialled: &FrontendKey,
    client: Client,
    mut hint: Hint,
) -> Option<(&'a Slot, u32)> {
    let key = client.affinity_key(frontend.service);
    let now = tables.now();
    // One search serves both: the kernel looks at each of them anew.
    if frontend.affinity != 0
        && hint.backend.port == Port(0)
        && let Some(old) = tables.affinity(&key)
        && now.wrapping_sub(old.seen) <= frontend.affinity as u64 * SECOND
    {
        hint = Hint { backend: old.backend, base: old.base, index: old.index };
    }
    let found = if hint.backend.port == Port(0) { None } else { locate(tables, frontend.service, range, &hint) };
    let (slot, index) = match found {
        Some(found) => found,
        None => slot(tables, frontend.service, range, new(tables, frontend, range, dialled, client))?,
    };
    if frontend.affinity != 0 {
        tables.remember(&key, &Affinity { seen: now, backend: slot.endpoint(), base: range.base, index, zero: 0 });
    }
    Some((slot, index))
}

#[inline(always)]
fn slot<T: Tables>(tables: &T, service: u32, range: Range, index: u32) -> Option<(&Slot, u32)> {
    let slot = tables.slot(range.base.wrapping_add(index))?;
    (slot.service == service).then_some((slot, index))
}

/// The place in the set of a backend for somebody who has none yet.
#[inline(always)]
fn new<T: Tables>(tables: &T, frontend: &Frontend, range: Range, dialled: &FrontendKey, client: Client) -> u32 {
    match client {
        Client::Packet { source, port, outside: true } if frontend.maglev.count != 0 => {
            let place = scale(hash::connection(&source, port, dialled.port, dialled.protocol), frontend.maglev.count);
            let block = tables.maglev(frontend.maglev.base.wrapping_add(place / MAGLEV_BLOCK));
            let index = block.map_or(0, |block| block.get(place));
            // A table that was given to another set meanwhile says anything.
            if index < range.count { index } else { 0 }
        }
        Client::Socket { .. } if frontend.flags & frontend_flags::LEAST_CONNECTIONS != 0 && range.count > 1 => {
            less_loaded(tables, range, dialled.protocol)
        }
        _ => scale(tables.random(), range.count),
    }
}

/// The one with fewer connections of two that chance offers: about as good as the best of all, without looking at all.
#[inline(always)]
fn less_loaded<T: Tables>(tables: &T, range: Range, protocol: u8) -> u32 {
    let first = scale(tables.random(), range.count);
    let mut second = scale(tables.random(), range.count - 1);
    if second >= first {
        second += 1;
    }
    if connections(tables, range.base.wrapping_add(second), protocol) < connections(tables, range.base.wrapping_add(first), protocol) {
        second
    } else {
        first
    }
}

#[inline(always)]
fn connections<T: Tables>(tables: &T, index: u32, protocol: u8) -> i64 {
    tables.slot(index).map_or(0, |slot| tables.connections(&BackendKey::new(slot.endpoint(), protocol)))
}

/// `random` spread evenly over `0..count`.
#[inline(always)]
pub const fn scale(random: u32, count: u32) -> u32 {
    ((random as u64 * count as u64) >> 32) as u32
}

/// Finds `hint`'s backend in the set: where it was when the set is the same, else by binary search.
#[inline(always)]
fn locate<'a, T: Tables>(tables: &'a T, service: u32, range: Range, hint: &Hint) -> Option<(&'a Slot, u32)> {
    let is_it = |slot: &Slot| slot.service == service && slot.endpoint() == hint.backend;
    if hint.base == range.base && hint.index < range.count {
        let slot = tables.slot(range.base.wrapping_add(hint.index))?;
        if is_it(slot) {
            return Some((slot, hint.index));
        }
    }
    let index = tables.search(range, hint.backend.sort_key());
    tables.slot(range.base.wrapping_add(index)).filter(|slot| is_it(slot)).map(|slot| (slot, index))
}

/// The place in the set of the last slot that isn't after `wanted`.
///
/// Written so that the kernel can see through it at once: whichever way a comparison goes, the next step looks the same to it. A
/// search that compares its two ends would be explored once for every path.
#[inline(always)]
pub fn search<T: Tables>(tables: &T, range: Range, wanted: (u64, u64, u16)) -> u32 {
    let (mut first, mut count) = (range.base, range.count);
    let mut step = 0;
    while step < MAX_SEARCH && count > 1 {
        step += 1;
        let half = count / 2;
        if tables.slot(first.wrapping_add(half)).is_some_and(|slot| slot.endpoint().sort_key() <= wanted) {
            first = first.wrapping_add(half);
        }
        count -= half;
    }
    first.wrapping_sub(range.base)
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
