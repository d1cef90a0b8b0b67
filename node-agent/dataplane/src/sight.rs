//! What is seen of the traffic: counts for each Service port and backend, and single connections for whoever watches.
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use outrigger_abi::sight::{BUCKETS, FIRST_BOUND};
pub use outrigger_abi::sight::{Latency, Reason};
use outrigger_desired::{Address, Family, Frontend, Protocol, ServicePortName, Table};

use crate::metrics::{Exposition, quoted};

/// More backends of one Service port than this are shown as one, so that a dashboard's store survives large Services.
const MAX_BACKENDS: usize = 64;

/// What was counted for one Service port since this mode first knew it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    pub connections: u64,
    /// New connections that came to nothing.
    pub drops: BTreeMap<Reason, u64>,
    /// Those that were used and are still the Service's.
    pub backends: BTreeMap<SocketAddr, Traffic>,
    /// How long connects took, over all backends; `None` where others connect.
    pub connect: Option<Latency>,
}

/// What one backend got. What a mode doesn't count is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub connections: u64,
    /// Those that it refused or didn't answer.
    pub failed: Option<u64>,
    /// Bytes to the backend and from it, of connections that are over.
    pub bytes: Option<(u64, u64)>,
}

impl Counted {
    pub fn refused(&self) -> u64 {
        self.drops.values().sum()
    }
}

/// All that a backend counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Of Service ports that were used.
    pub services: HashMap<ServicePortName, Counted>,
    /// What came to nothing and was no Service port's.
    pub stray: BTreeMap<Reason, u64>,
    pub maps: Vec<Fill>,
}

/// How full a map of the kernel's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    pub map: &'static str,
    pub entries: u64,
    pub max: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It was led to a backend; over TCP, the backend has answered.
    Opened,
    Closed,
    /// It came to nothing.
    Refused(Reason),
}

/// Something that happened to a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub what: What,
    /// So many at once, where they aren't told apart.
    pub count: u64,
    pub service: Option<ServicePortName>,
    pub protocol: u8,
    /// With port 0 only the client's address is known.
    pub source: Option<SocketAddr>,
    pub frontend: Option<SocketAddr>,
    pub backend: Option<SocketAddr>,
    /// To the backend and from it.
    pub bytes: Option<(u64, u64)>,
    /// How long the connect took, or the connection lived.
    pub took: Option<Duration>,
}

/// The Service port whose frontend this is.
pub fn service_of(table: &Table, frontend: SocketAddr, protocol: u8) -> Option<&ServicePortName> {
    let protocol = Protocol::of_number(protocol)?;
    let at = |address| table.get(&Frontend { address, port: frontend.port(), protocol });
    let ip = frontend.ip();
    at(Address::Ip(ip)).or_else(|| at(Address::Node(Family::of(ip)))).map(|entry| &entry.service)
}

pub(crate) fn merge(into: &mut Latency, more: &Latency) {
    into.nanoseconds += more.nanoseconds;
    into.buckets.iter_mut().zip(more.buckets).for_each(|(sum, count)| *sum += count);
}

impl Counts {
    /// All of it, for `/metrics`. Only what was used, so that ten thousand idle Services cost nothing.
    pub fn render(&self, out: &mut Exposition) {
        let mut services: Vec<_> = self.services.iter().collect();
        services.sort_by_key(|(name, _)| *name);
        let labelled: Vec<(String, &Counted)> = services.iter().map(|(name, counted)| (labels(name), *counted)).collect();
        let backends: Vec<(String, Traffic)> = labelled.iter().flat_map(|(labels, counted)| by_backend(labels, counted)).collect();
        let help = "Connections and flows that were led to a backend.";
        let connections = backends.iter().map(|(labels, traffic)| (labels.clone(), traffic.connections));
        out.family("outrigger_service_connections_total", "counter", help, connections);
        let bytes = backends.iter().filter_map(|(labels, traffic)| Some((labels, traffic.bytes?)));
        let bytes = bytes.flat_map(|(labels, (sent, received))| {
            [("sent", sent), ("received", received)].map(|(direction, bytes)| (format!("{labels},direction=\"{direction}\""), bytes))
        });
        let help = "Bytes to (sent) and from (received) a backend, counted when a connection ends.";
        out.family("outrigger_service_bytes_total", "counter", help, bytes);
        let connects = labelled.iter().filter_map(|(labels, counted)| Some(latency_samples(labels, counted.connect.as_ref()?)));
        let help = "How long TCP connects to backends took.";
        out.suffixed("outrigger_service_connect_duration_seconds", "histogram", help, connects.flatten());
        let drop = |labels: &str, drops: &BTreeMap<Reason, u64>| -> Vec<(String, u64)> {
            let comma = if labels.is_empty() { "" } else { "," };
            drops.iter().map(|(reason, count)| (format!("{labels}{comma}reason=\"{}\"", reason.name()), *count)).collect()
        };
        let drops = labelled.iter().flat_map(|(labels, counted)| drop(labels, &counted.drops)).chain(drop("", &self.stray));
        out.family("outrigger_service_drops_total", "counter", "Connections that came to nothing.", drops);
        let fills = |part: fn(&Fill) -> u64| self.maps.iter().map(move |fill| (format!("map=\"{}\"", fill.map), part(fill)));
        out.family("outrigger_ebpf_map_entries", "gauge", "Elements of an eBPF map.", fills(|fill| fill.entries));
        out.family("outrigger_ebpf_map_max_entries", "gauge", "Elements that an eBPF map has room for.", fills(|fill| fill.max));
    }
}

fn labels(name: &ServicePortName) -> String {
    let (namespace, service) = (quoted(name.service.namespace()), quoted(name.service.name()));
    format!("namespace={namespace},service={service},port={}", quoted(&name.port))
}

fn by_backend(labels: &str, counted: &Counted) -> Vec<(String, Traffic)> {
    let named = |backend: &str, traffic: Traffic| (format!("{labels},backend={}", quoted(backend)), traffic);
    if counted.backends.len() <= MAX_BACKENDS {
        return counted.backends.iter().map(|(backend, traffic)| named(&backend.to_string(), *traffic)).collect();
    }
    let mut sum = Traffic::default();
    for traffic in counted.backends.values() {
        sum.connections += traffic.connections;
        sum.bytes = traffic.bytes.map(|(sent, received)| {
            let (sent_before, received_before) = sum.bytes.unwrap_or_default();
            (sent + sent_before, received + received_before)
        });
    }
    vec![named("", sum)]
}

fn latency_samples(labels: &str, latency: &Latency) -> Vec<(&'static str, String, String)> {
    let seconds = |nanoseconds: u64| nanoseconds as f64 / 1e9;
    let mut total = 0;
    let mut samples = Vec::with_capacity(BUCKETS + 2);
    for (index, count) in latency.buckets.iter().enumerate() {
        total += count;
        let bound = if index == BUCKETS - 1 { "+Inf".into() } else { seconds(FIRST_BOUND << index).to_string() };
        samples.push(("_bucket", format!("{labels},le=\"{bound}\""), total.to_string()));
    }
    samples.push(("_sum", labels.to_owned(), seconds(latency.nanoseconds).to_string()));
    samples.push(("_count", labels.to_owned(), total.to_string()));
    samples
}

#[cfg(test)]
mod tests {
    use outrigger_desired::ServiceName;

    use super::*;

    fn name() -> ServicePortName {
        ServicePortName { service: ServiceName::new("default", "web"), port: "http".into() }
    }

    fn rendered(counted: Counted, stray: BTreeMap<Reason, u64>) -> String {
        let maps = vec![Fill { map: "flows", entries: 3, max: 8 }];
        let mut out = Exposition::default();
        Counts { services: [(name(), counted)].into(), stray, maps }.render(&mut out);
        out.0.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect()
    }

    #[test]
    fn counts_are_labelled_by_service_port_and_backend() {
        let backend = "10.0.0.1:80".parse().unwrap();
        let traffic = Traffic { connections: 2, failed: Some(1), bytes: Some((10, 20)) };
        let counted =
            Counted { connections: 2, drops: [(Reason::NoEndpoint, 5)].into(), backends: [(backend, traffic)].into(), connect: None };
        let of = "namespace=\"default\",service=\"web\",port=\"http\"";
        let expected = format!(
            "outrigger_service_connections_total{{{of},backend=\"10.0.0.1:80\"}} 2\n\
             outrigger_service_bytes_total{{{of},backend=\"10.0.0.1:80\",direction=\"sent\"}} 10\n\
             outrigger_service_bytes_total{{{of},backend=\"10.0.0.1:80\",direction=\"received\"}} 20\n\
             outrigger_service_drops_total{{{of},reason=\"no_endpoint\"}} 5\n\
             outrigger_service_drops_total{{reason=\"no_port\"}} 1\n\
             outrigger_ebpf_map_entries{{map=\"flows\"}} 3\n\
             outrigger_ebpf_map_max_entries{{map=\"flows\"}} 8\n"
        );
        assert_eq!(rendered(counted, [(Reason::NoPort, 1)].into()), expected);
    }

    #[test]
    fn many_backends_are_shown_as_one() {
        let backends = (0..=MAX_BACKENDS as u16).map(|port| {
            let traffic = Traffic { connections: 1, failed: None, bytes: Some((1, 2)) };
            (SocketAddr::from(([10, 0, 0, 1], port)), traffic)
        });
        let text = rendered(Counted { backends: backends.collect(), ..Counted::default() }, BTreeMap::new());
        assert!(
            text.starts_with("outrigger_service_connections_total{namespace=\"default\",service=\"web\",port=\"http\",backend=\"\"} 65\n"),
            "{text}"
        );
        assert!(text.contains("direction=\"received\"} 130\n"), "{text}");
    }

    #[test]
    fn a_histogram_is_cumulative() {
        let mut latency = Latency { nanoseconds: 1_500_000_000, ..Latency::default() };
        latency.buckets[1] = 2;
        latency.buckets[BUCKETS - 1] = 1;
        let text = rendered(Counted { connect: Some(latency), ..Counted::default() }, BTreeMap::new());
        for part in ["le=\"0.000032768\"} 0\n", "le=\"0.000065536\"} 2\n", "le=\"+Inf\"} 3\n", "_sum{", "} 1.5\n", "} 3\n"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
