//! Forgets connections that are over, before the map of flows has to do so by itself and may choose one that lives.
use std::collections::HashMap;
use std::time::{Duration, Instant};

use outrigger_abi as abi;

use super::maps::Map;

const INTERVAL: Duration = Duration::from_secs(30);
const SECOND: u64 = 1_000_000_000;
/// How long a silent flow is kept, as conntrack does: closed ones as long as packets of theirs may still come.
const CLOSED: u64 = 60 * SECOND;
const DATAGRAMS: u64 = 180 * SECOND;
const STREAM: u64 = 24 * 3600 * SECOND;

#[derive(Debug, Default)]
pub struct Sweep {
    last: Option<Instant>,
}

impl Sweep {
    /// True when it is time, which then begins anew.
    pub fn is_due(&mut self) -> bool {
        let due = self.last.is_none_or(|last| last.elapsed() >= INTERVAL);
        if due {
            self.last = Some(Instant::now());
        }
        due
    }

    pub fn flows(flows: &Map<abi::Tuple, abi::Flow>) {
        let entries = match flows.entries() {
            Ok(entries) => entries,
            Err(error) => return tracing::warn!(%error, "connections that are over stay in the map of flows"),
        };
        let over = over(&entries, now());
        for tuple in over {
            // One that went meanwhile needs nothing more, and what fails now is swept the next time.
            if let Err(error) = flows.delete(&tuple) {
                tracing::debug!(%error, "a flow stays");
            }
        }
    }
}

/// The clock that the programs use.
pub fn now() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC_COARSE);
    time.map_or(0, |time| time.tv_sec() as u64 * SECOND + time.tv_nsec() as u64)
}

/// Both directions of a connection go together, when the one that was heard of last is old.
fn over(entries: &[(abi::Tuple, abi::Flow)], now: u64) -> Vec<abi::Tuple> {
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
        let ports: Vec<_> = over(&entries, 1000 * SECOND).iter().map(|tuple| (tuple.sport.host(), tuple.dport.host())).collect();
        assert_eq!(ports, [(1, 80), (8080, 1), (4, 80), (8080, 4)]);
    }
}
