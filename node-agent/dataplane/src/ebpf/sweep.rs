//! Forgets connections that are over, before the map of flows has to do so by itself and may choose one that lives.
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use foldhash::{HashMap, HashSet};
use outrigger_abi as abi;

use super::maps::Shared;
use super::sight::Seen;
use super::sys;
use crate::backend::Result;

const INTERVAL: Duration = Duration::from_secs(30);
const SECOND: u64 = 1_000_000_000;
/// How long a silent flow is kept, as conntrack does: closed ones as long as packets of theirs may still come.
const CLOSED: u64 = 60 * SECOND;
const DATAGRAMS: u64 = 180 * SECOND;
const STREAM: u64 = 24 * 3600 * SECOND;

#[derive(Debug, Default)]
pub struct Sweep {
    last: Option<Instant>,
    running: Option<JoinHandle<Result<Seen>>>,
}

impl Sweep {
    /// Does its work when it is time for that, on a thread of its own: a full map takes longer than a change may wait. Returns what the
    /// last one saw, once.
    pub fn run(&mut self, maps: &Arc<Shared>) -> Option<Result<Seen>> {
        if let Some(done) = self.running.take_if(|running| running.is_finished()) {
            return Some(done.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        if self.running.is_some() || self.last.is_some_and(|last| last.elapsed() < INTERVAL) {
            return None;
        }
        self.last = Some(Instant::now());
        let maps = maps.clone();
        let work = move || {
            sweep(&maps);
            Seen::now(&maps)
        };
        match std::thread::Builder::new().name("sweep".into()).spawn(work) {
            Ok(running) => self.running = Some(running),
            Err(error) => tracing::warn!(%error, "connections that are over stay in the map of flows"),
        }
        None
    }
}

fn sweep(maps: &Shared) {
    let Shared { flows, activity, .. } = maps;
    // Flows that are there by now will be seen; for later ones the programs end the doubt.
    activity.doubt();
    let entries = match flows.entries() {
        Ok(entries) => entries,
        Err(error) => return tracing::warn!(%error, "connections that are over stay in the map of flows"),
    };
    let over = over(&entries, sys::now());
    activity.settle(|kind| {
        let origin = if kind == abi::activity::POD { abi::flow_flags::POD } else { 0 };
        entries.iter().any(|(tuple, flow)| flow.flags & abi::flow_flags::POD == origin && !over.contains(tuple))
    });
    // What fails now is swept the next time.
    if let Err(error) = flows.delete_all(&over.into_iter().collect::<Vec<_>>()) {
        tracing::debug!(%error, "flows stay");
    }
}

/// Both directions of a connection go together, when the one that was heard of last is old.
fn over(entries: &[(abi::Tuple, abi::Flow)], now: u64) -> HashSet<abi::Tuple> {
    let by_tuple: HashMap<&abi::Tuple, &abi::Flow> = entries.iter().map(|(tuple, flow)| (tuple, flow)).collect();
    let is_over = |(tuple, flow): &&(abi::Tuple, abi::Flow)| {
        let other = by_tuple.get(&flow.to.reversed());
        let seen = flow.seen.max(other.map_or(0, |other| other.seen));
        let kept = match tuple.protocol {
            _ if flow.flags & abi::flow_flags::CLOSED != 0 => CLOSED,
            abi::TCP => STREAM,
            _ => DATAGRAMS,
        };
        now.saturating_sub(seen) > kept
    };
    entries.iter().filter(is_over).map(|(tuple, _)| *tuple).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_over_when_both_directions_are_silent() {
        let tuple = |sport: u16, dport: u16, protocol| abi::Tuple {
            sport: abi::Port::new(sport),
            dport: abi::Port::new(dport),
            protocol,
            ..abi::Tuple::default()
        };
        let pair = |client: u16, protocol, seen: u64, answered: u64, flags| {
            let (dialled, led) = (tuple(client, 80, protocol), tuple(client, 8080, protocol));
            let flow = |seen: u64, to, flags| abi::Flow { seen: seen * SECOND, to, flags, ..abi::Flow::default() };
            let reply = flags | abi::flow_flags::REPLY;
            [(dialled, flow(seen, led, flags)), (led.reversed(), flow(answered, dialled.reversed(), reply))]
        };
        let entries = [
            pair(1, abi::UDP, 100, 100, 0),
            pair(2, abi::UDP, 100, 900, 0),
            pair(3, abi::TCP, 100, 100, 0),
            pair(4, abi::TCP, 100, 100, abi::flow_flags::CLOSED),
            pair(5, abi::TCP, 980, 100, abi::flow_flags::CLOSED),
        ]
        .concat();
        let ports = over(&entries, 1000 * SECOND).iter().map(|tuple| (tuple.sport.host(), tuple.dport.host())).collect::<HashSet<_>>();
        assert_eq!(ports, HashSet::from_iter([(1, 80), (8080, 1), (4, 80), (8080, 4)]));
    }
}
