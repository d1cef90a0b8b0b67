//! What a running proxy shows of itself: Services, where a packet would go, and what lives now.
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;

use outrigger_dataplane::{BackendError, Counted, Live, View};
use outrigger_desired::trace::{self, Flow, Verdict};
use outrigger_desired::{Address, Endpoint, Entry, Family, Frontend, Protocol, ServicePortName, Table};
use serde_json::{Value, json};

/// Every Service port whose name begins so, with its frontends, backends and counters.
pub fn services(view: &View<'_>, name: &str) -> Value {
    let counted: HashMap<ServicePortName, Counted> = view.backend.counted().unwrap_or_default().into_iter().collect();
    let mut ports: BTreeMap<&ServicePortName, Vec<(&Frontend, &Entry)>> = BTreeMap::new();
    for (frontend, entry) in view.table.iter().filter(|(_, entry)| entry.service.service.as_str().starts_with(name)) {
        ports.entry(&entry.service).or_default().push((frontend, entry));
    }
    let port = |(name, mut frontends): (&ServicePortName, Vec<(&Frontend, &Entry)>)| {
        frontends.sort_by_key(|(frontend, _)| **frontend);
        let counts = counted.get(name).map(|counts| json!({"connections": counts.connections, "refused": counts.refused}));
        json!({
            "service": name.service.as_str(), "port": &*name.port, "counted": counts,
            "frontends": frontends.into_iter().map(|(frontend, entry)| described(frontend, entry)).collect::<Vec<_>>(),
        })
    };
    Value::Array(ports.into_iter().map(port).collect())
}

fn described(frontend: &Frontend, entry: &Entry) -> Value {
    let list = |endpoints: &[Endpoint]| {
        let one = |endpoint: &Endpoint| json!({"address": endpoint.socket().to_string(), "local": endpoint.local});
        endpoints.iter().map(one).collect::<Vec<_>>()
    };
    json!({
        "frontend": frontend.to_string(),
        "kind": format!("{:?}", entry.kind),
        "backends": list(&entry.backends),
        "insideBackends": entry.short_circuit.as_deref().map(list),
        "retained": list(&entry.retained),
        "affinitySeconds": entry.affinity.map(|time| time.as_secs()),
        "masquerade": format!("{:?}", entry.masquerade),
        "sourceRanges": entry.source_ranges.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "withoutBackends": format!("{:?}", entry.no_endpoints),
    })
}

/// Where the flow's first packet goes: by the table, by the kernel, and whether the two agree. With the client's port, the kernel may
/// know the very backend.
pub fn trace(view: &View<'_>, flow: &Flow, port: Option<u16>, from_pod: bool) -> Value {
    let around = view.config.surroundings();
    let meant = trace::trace(view.table, &around, flow);
    let inside = from_pod || around.node_ips.contains(&flow.source) || around.cluster_cidrs.iter().any(|net| net.contains(&flow.source));
    let client = port.filter(|_| !inside).map(|port| SocketAddr::new(flow.source, port));
    let (found, chosen, error) = match found(view, flow, !inside, client) {
        Ok((found, chosen)) => (found, chosen, None),
        Err(error) => (None, None, Some(error.to_string())),
    };
    let wanted = match &meant.verdict {
        Verdict::To { backends, .. } => Some(backends.clone()),
        Verdict::Rejected | Verdict::Dropped if meant.service.is_some() => Some(Vec::new()),
        Verdict::Rejected | Verdict::Dropped | Verdict::PassesBy => None,
    };
    let set = |all: &Option<Vec<SocketAddr>>| all.clone().map(|all| all.into_iter().collect::<HashSet<_>>());
    // A way that has nothing to refuse with need not know of a frontend without backends.
    let agree = set(&wanted) == set(&found) || (wanted.as_ref().is_some_and(Vec::is_empty) && found.is_none());
    let texts = |all: &[SocketAddr]| all.iter().map(SocketAddr::to_string).collect::<Vec<_>>();
    let (verdict, backends, masquerade) = match &meant.verdict {
        Verdict::To { backends, masquerade } => ("to", texts(backends), *masquerade),
        Verdict::PassesBy => ("passes by", Vec::new(), false),
        Verdict::Rejected => ("rejected", Vec::new(), false),
        Verdict::Dropped => ("dropped", Vec::new(), false),
    };
    json!({
        "flow": {"source": flow.source, "destination": flow.destination.to_string(), "protocol": flow.protocol.to_string()},
        "meant": {
            "service": meant.service.map(|name| name.to_string()), "verdict": verdict, "backends": backends,
            "masquerade": masquerade, "reasons": meant.reasons,
        },
        "kernel": {"mode": view.backend.mode().to_string(), "known": found.is_some(), "backends": found.as_deref().map(texts),
            "chosen": chosen.map(|chosen| chosen.to_string()), "error": error},
        "agree": agree && error.is_none(),
    })
}

type Found = (Option<Vec<SocketAddr>>, Option<SocketAddr>);

/// What the kernel may choose among, and what it chooses for `client`.
fn found(view: &View<'_>, flow: &Flow, outside: bool, client: Option<SocketAddr>) -> Result<Found, BackendError> {
    let at = |address| Frontend { address, port: flow.destination.port(), protocol: flow.protocol };
    let ip = flow.destination.ip();
    let around = view.config.surroundings();
    let mut frontend = at(Address::Ip(ip));
    let mut found = view.backend.lookup(&frontend, outside)?;
    let selected = around.nodeport_addresses.is_empty() || around.nodeport_addresses.iter().any(|net| net.contains(&ip));
    if found.is_none() && around.node_ips.contains(&ip) && selected {
        frontend = at(Address::Node(Family::of(ip)));
        found = view.backend.lookup(&frontend, outside)?;
    }
    let chosen = match client {
        Some(client) if found.is_some() => view.backend.choice(&frontend, client)?,
        _ => None,
    };
    Ok((found, chosen))
}

/// What lives at one moment.
pub struct Snapshot {
    live: HashMap<Live, Option<String>>,
    counted: HashMap<ServicePortName, Counted>,
}

impl Snapshot {
    pub fn read(view: &View<'_>) -> Result<Self, BackendError> {
        let live = view.backend.live(view.table)?;
        Ok(Self {
            live: live.into_iter().map(|live| (live.clone(), service(view.table, &live))).collect(),
            counted: view.backend.counted()?.into_iter().collect(),
        })
    }
}

fn service(table: &Table, live: &Live) -> Option<String> {
    let protocol = protocol(live.protocol)?;
    let at = |address| table.get(&Frontend { address, port: live.frontend.port(), protocol });
    let ip = live.frontend.ip();
    at(Address::Ip(ip)).or_else(|| at(Address::Node(Family::of(ip)))).map(|entry| entry.service.to_string())
}

fn protocol(number: u8) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|protocol| protocol.number() == number)
}

/// What a watcher knows already.
#[derive(Default)]
pub struct Seen {
    live: HashMap<Live, Option<String>>,
    counted: Option<HashMap<ServicePortName, Counted>>,
}

impl Seen {
    /// What became different: connections that came and went, and how many came to nothing or were too short to be seen.
    pub fn events(&mut self, now: Snapshot) -> Vec<Value> {
        let mut events = Vec::new();
        let describe = |event: &str, live: &Live, service: &Option<String>| {
            json!({
                "event": event, "verdict": "translated", "service": service,
                "protocol": protocol(live.protocol).map(|protocol| protocol.to_string()),
                "source": live.source.map(|source| source.to_string()),
                "frontend": live.frontend.to_string(), "backend": live.backend.to_string(),
            })
        };
        events.extend(
            now.live.iter().filter(|(live, _)| !self.live.contains_key(live)).map(|(live, service)| describe("open", live, service)),
        );
        events.extend(
            self.live.iter().filter(|(live, _)| !now.live.contains_key(live)).map(|(live, service)| describe("close", live, service)),
        );
        if let Some(before) = &self.counted {
            for (name, counts) in &now.counted {
                let old = before.get(name).copied().unwrap_or_default();
                for (verdict, count) in [
                    ("translated", counts.connections.saturating_sub(old.connections)),
                    ("refused", counts.refused.saturating_sub(old.refused)),
                ] {
                    if count > 0 {
                        events.push(json!({"event": "count", "verdict": verdict, "service": name.to_string(), "connections": count}));
                    }
                }
            }
        }
        self.live = now.live;
        self.counted = Some(now.counted);
        events
    }
}

#[cfg(test)]
mod tests {
    use outrigger_desired::ServiceName;

    use super::*;

    fn live(port: u16) -> Live {
        let address = |ip: &str| SocketAddr::new(ip.parse().unwrap(), port);
        Live { protocol: 6, source: Some(address("10.0.0.1")), frontend: address("10.96.0.1"), backend: address("10.0.0.2") }
    }

    #[test]
    fn a_watcher_is_told_what_became_different() {
        let name = ServicePortName { service: ServiceName::new("default", "web"), port: "".into() };
        let at = |ports: &[u16], connections, refused| Snapshot {
            live: ports.iter().map(|port| (live(*port), Some("default/web".to_owned()))).collect(),
            counted: [(name.clone(), Counted { connections, refused })].into(),
        };
        let mut seen = Seen::default();
        let words = |events: Vec<Value>| {
            let mut words: Vec<String> = events
                .iter()
                .map(|event| {
                    format!("{} {} {}", event["event"].as_str().unwrap(), event["frontend"].as_str().unwrap_or("-"), event["connections"])
                })
                .collect();
            words.sort();
            words
        };
        assert_eq!(words(seen.events(at(&[1], 5, 0))), ["open 10.96.0.1:1 null"]);
        assert_eq!(words(seen.events(at(&[2], 7, 1))), ["close 10.96.0.1:1 null", "count - 1", "count - 2", "open 10.96.0.1:2 null"]);
        assert!(seen.events(at(&[2], 7, 1)).is_empty());
    }
}
