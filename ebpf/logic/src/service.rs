//! Which Service an address belongs to, and which of its backends a new connection gets.

use outrigger_abi::{
    Addr, Affinity, AffinityKey, Endpoint, Frontend, FrontendKey, Range, Slot, frontend_flags, node_address_flags,
};

/// Binary search ends after this many steps: 65,536 backends.
const MAX_SEARCH: u32 = 17;
/// How often a lookup is repeated when the set it met was given away meanwhile.
const RETRIES: u32 = 2;
const SECOND: u64 = 1_000_000_000;

/// What the decisions read and write: the maps, the clock, chance. Elements are lent, not copied: the programs have 512 bytes
/// of stack.
pub trait Tables {
    fn frontend(&self, key: &FrontendKey) -> Option<&Frontend>;
    fn slot(&self, index: u32) -> Option<&Slot>;
    /// `node_address_flags`.
    fn node_address(&self, addr: &Addr) -> Option<u32>;
    fn affinity(&self, key: &AffinityKey) -> Option<&Affinity>;
    fn remember(&self, key: &AffinityKey, affinity: &Affinity);
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
    Packet { source: Addr, outside: bool },
}

impl Client {
    #[inline(always)]
    const fn is_host(self) -> bool {
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

/// A backend that the flow had before, with the place where it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    pub backend: Endpoint,
    pub base: u32,
    pub index: u32,
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
    Drop(u32),
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
pub fn choose<T: Tables>(tables: &T, key: &FrontendKey, client: Client, hint: Option<Hint>) -> Verdict {
    let mut service = 0;
    let mut attempt = 0;
    while attempt < RETRIES {
        attempt += 1;
        let Some(frontend) = find(tables, key, client) else { return Verdict::Pass };
        let (range, drop) = if client.is_outside() {
            (frontend.external, frontend_flags::DROP_EXTERNAL)
        } else {
            (frontend.internal, frontend_flags::DROP_INTERNAL)
        };
        service = frontend.service;
        if range.count == 0 {
            return if frontend.flags & drop != 0 { Verdict::Drop(service) } else { Verdict::Refuse(service) };
        }
        if let Some((slot, index)) = pick(tables, frontend, range, client, hint) {
            return Verdict::To(Choice {
                service,
                frontend_flags: frontend.flags,
                backend: slot.endpoint(),
                slot_flags: slot.flags,
                base: range.base,
                index,
            });
        }
    }
    Verdict::Refuse(service)
}

/// The flow's own backend while it is in the set, else the client's by affinity, else any.
#[inline(always)]
fn pick<'a, T: Tables>(
    tables: &'a T,
    frontend: &Frontend,
    range: Range,
    client: Client,
    hint: Option<Hint>,
) -> Option<(&'a Slot, u32)> {
    if let Some(hint) = hint
        && let Some(found) = locate(tables, frontend.service, range, &hint)
    {
        return Some(found);
    }
    if frontend.affinity == 0 {
        return any(tables, frontend.service, range);
    }
    let key = client.affinity_key(frontend.service);
    let now = tables.now();
    let found = match tables.affinity(&key) {
        Some(old) if now.wrapping_sub(old.seen) <= frontend.affinity as u64 * SECOND => {
            locate(tables, frontend.service, range, &Hint { backend: old.backend, base: old.base, index: old.index })
        }
        _ => None,
    };
    let (slot, index) = match found {
        Some(found) => found,
        None => any(tables, frontend.service, range)?,
    };
    tables.remember(&key, &Affinity { seen: now, backend: slot.endpoint(), base: range.base, index, zero: 0 });
    Some((slot, index))
}

#[inline(always)]
fn any<T: Tables>(tables: &T, service: u32, range: Range) -> Option<(&Slot, u32)> {
    let index = scale(tables.random(), range.count);
    let slot = tables.slot(range.base.wrapping_add(index))?;
    (slot.service == service).then_some((slot, index))
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
    let wanted = hint.backend.sort_key();
    let (mut low, mut high) = (0, range.count);
    let mut step = 0;
    while step < MAX_SEARCH && low < high {
        step += 1;
        let middle = low + (high - low) / 2;
        let slot = tables.slot(range.base.wrapping_add(middle))?;
        if is_it(slot) {
            return Some((slot, middle));
        }
        if slot.endpoint().sort_key() < wanted {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    None
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
