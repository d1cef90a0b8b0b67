//! What a running proxy shows of itself: Services, where a packet would go, and what lives now.
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use outrigger_dataplane::sight::{Event, Traffic, What, service_of};
use outrigger_dataplane::{BackendError, Counted, Live, View};
use outrigger_desired::trace::{self, Flow, Verdict};
use outrigger_desired::{Address, Endpoint, Entry, Family, Frontend, Protocol, ServicePortName};
use serde_json::{Value, json};

/// Every Service port whose name begins so, with its frontends, backends and counters.
pub fn services(view: &View<'_>, name: &str) -> Value {
    let counted = view.backend.counted(view.table).unwrap_or_default().services;
    let mut ports: BTreeMap<&ServicePortName, Vec<(&Frontend, &Entry)>> = BTreeMap::new();
    for (frontend, entry) in view.table.iter().filter(|(_, entry)| entry.service.service.as_str().starts_with(name)) {
        ports.entry(&entry.service).or_default().push((frontend, entry));
    }
    let port = |(name, mut frontends): (&ServicePortName, Vec<(&Frontend, &Entry)>)| {
        frontends.sort_by_key(|(frontend, _)| **frontend);
        json!({
            "service": name.service.as_str(), "port": &*name.port, "counted": counted.get(name).map(counts),
            "frontends": frontends.into_iter().map(|(frontend, entry)| described(frontend, entry)).collect::<Vec<_>>(),
        })
    };
    Value::Array(ports.into_iter().map(port).collect())
}

fn counts(counted: &Counted) -> Value {
    let backend = |(backend, traffic): (&SocketAddr, &Traffic)| {
        let (sent, received) = traffic.bytes.unzip();
        json!({
            "address": backend.to_string(), "connections": traffic.connections, "failed": traffic.failed, "sent": sent, "received": received,
        })
    };
    let connects = counted.connect.as_ref().map(|connect| (connect.nanoseconds, connect.buckets.iter().sum::<u64>()));
    let mean = connects.filter(|(_, count)| *count > 0).map(|(nanoseconds, count)| nanoseconds as f64 / 1e9 / count as f64);
    let drops: serde_json::Map<_, _> = counted.drops.iter().map(|(reason, count)| (reason.name().to_owned(), json!(count))).collect();
    json!({
        "connections": counted.connections, "refused": counted.refused(), "drops": drops, "meanConnectSeconds": mean,
        "backends": counted.backends.iter().map(backend).collect::<Vec<_>>(),
    })
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

/// Connections that live now.
pub fn live(view: &View<'_>, pods: &Pods) -> Result<Vec<Value>, BackendError> {
    let described = |live: Live| {
        let service = service_of(view.table, live.frontend, live.protocol);
        parties("live", "translated", service, live.protocol, live.source, Some(live.frontend), Some(live.backend), pods)
    };
    Ok(view.backend.live(view.table)?.into_iter().map(described).collect())
}

/// Something that happened, for people and their programs.
pub fn event(event: &Event, pods: &Pods) -> Value {
    let (what, verdict, reason) = match event.what {
        What::Opened => ("opened", "translated", None),
        What::Closed => ("closed", "translated", None),
        What::Refused(reason) if reason.is_silent() => ("dropped", "dropped", Some(reason.name())),
        What::Refused(reason) => ("refused", "refused", Some(reason.name())),
    };
    let mut value = parties(what, verdict, event.service.as_ref(), event.protocol, event.source, event.frontend, event.backend, pods);
    let (sent, received) = event.bytes.unzip();
    let seconds = event.took.map(|took| took.as_secs_f64());
    for (name, extra) in [
        ("reason", json!(reason)),
        ("count", json!((event.count != 1).then_some(event.count))),
        ("sent", json!(sent)),
        ("received", json!(received)),
        ("seconds", json!(seconds)),
    ] {
        if !extra.is_null() {
            value[name] = extra;
        }
    }
    value
}

/// This node's pods, `namespace/name` by address.
pub type Pods = HashMap<IpAddr, String>;

#[expect(clippy::too_many_arguments, reason = "each is a field of the answer")]
fn parties(
    what: &str,
    verdict: &str,
    service: Option<&ServicePortName>,
    protocol: u8,
    source: Option<SocketAddr>,
    frontend: Option<SocketAddr>,
    backend: Option<SocketAddr>,
    pods: &Pods,
) -> Value {
    let pod = |address: Option<SocketAddr>| pods.get(&address?.ip());
    // Of some clients only the address is known.
    let source_text = source.map(|source| if source.port() == 0 { source.ip().to_string() } else { source.to_string() });
    json!({
        "event": what, "verdict": verdict, "service": service.map(ToString::to_string),
        "protocol": Protocol::of_number(protocol).map(|protocol| protocol.to_string()),
        "source": source_text, "sourcePod": pod(source),
        "frontend": frontend.map(|frontend| frontend.to_string()),
        "backend": backend.map(|backend| backend.to_string()), "backendPod": pod(backend),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use outrigger_dataplane::sight::Reason;
    use outrigger_desired::ServiceName;

    use super::*;

    #[test]
    fn what_happened_is_told_with_what_is_known_of_it() {
        let service = ServicePortName { service: ServiceName::new("default", "web"), port: "http".into() };
        let pods = Pods::from([("10.0.0.1".parse().unwrap(), "default/client".to_owned())]);
        let told = |what, backend: Option<&str>, bytes, took| {
            let event_of = Event {
                what,
                count: 1,
                service: Some(service.clone()),
                protocol: 6,
                source: Some("10.0.0.1:0".parse().unwrap()),
                frontend: Some("10.96.0.1:80".parse().unwrap()),
                backend: backend.map(|backend| backend.parse().unwrap()),
                bytes,
                took,
            };
            event(&event_of, &pods)
        };
        let closed = told(What::Closed, Some("10.0.0.2:8080"), Some((1, 2)), Some(Duration::from_millis(1500)));
        assert_eq!(
            closed,
            json!({
                "event": "closed", "verdict": "translated", "service": "default/web:http", "protocol": "TCP", "source": "10.0.0.1",
                "sourcePod": "default/client", "frontend": "10.96.0.1:80", "backend": "10.0.0.2:8080", "backendPod": null,
                "sent": 1, "received": 2, "seconds": 1.5,
            })
        );
        let refused = told(What::Refused(Reason::NoEndpoint), None, None, None);
        assert_eq!((&refused["event"], &refused["reason"]), (&json!("refused"), &json!("no_endpoint")));
        assert_eq!(told(What::Refused(Reason::SourceRange), None, None, None)["verdict"], "dropped");
    }
}
