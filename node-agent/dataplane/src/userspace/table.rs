//! What has to be listened on, and which endpoint a client gets. Pure, but for reading the node's own addresses.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use outrigger_desired::{Address, Balancing, Endpoint, Entry, Family, Frontend, Kind};

use crate::config::Config;

/// The node's addresses, and which of them NodePorts answer on.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeAddresses {
    all: Vec<IpAddr>,
    nodeport_addresses: Vec<IpNet>,
    inside: Arc<Inside>,
}

/// Who counts as inside for a Service with externalTrafficPolicy Local: the node itself and its pods.
#[derive(Clone, Debug, Default)]
pub(super) struct Inside {
    /// All of the node's addresses.
    node: Vec<IpAddr>,
    /// Those of its Node object.
    own: Vec<IpAddr>,
    pods: Vec<IpNet>,
}

impl Inside {
    pub fn has(&self, ip: IpAddr) -> bool {
        self.is_node(ip) || self.is_pod(ip)
    }

    pub fn is_node(&self, ip: IpAddr) -> bool {
        self.node.contains(&ip)
    }

    pub fn is_pod(&self, ip: IpAddr) -> bool {
        self.pods.iter().any(|net| net.contains(&ip))
    }
}

impl NodeAddresses {
    pub fn read(config: &Config) -> Self {
        let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
        let all = interfaces.filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            let v6 = address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip()));
            // Link-local addresses can't be bound without their interface, and nobody publishes them.
            v4.or(v6).filter(|ip| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()))
        });
        Self::new(all.collect(), &config.node_ips, &config.nodeport_addresses, &config.cluster_cidrs)
    }

    fn new(mut all: Vec<IpAddr>, own: &[IpAddr], nodeport_addresses: &[IpNet], cluster_cidrs: &[IpNet]) -> Self {
        all.sort();
        all.dedup();
        let inside = Arc::new(Inside { node: all.clone(), own: own.to_vec(), pods: cluster_cidrs.to_vec() });
        Self { all, nodeport_addresses: nodeport_addresses.to_vec(), inside }
    }

    pub fn has(&self, ip: IpAddr) -> bool {
        self.all.contains(&ip)
    }

    pub fn inside(&self) -> Arc<Inside> {
        self.inside.clone()
    }

    /// Where the frontend's listeners have to be.
    pub fn sockets(&self, frontend: Frontend, kind: Kind) -> Vec<SocketAddr> {
        let selected = |ip: &IpAddr| {
            kind == Kind::HostPort || self.nodeport_addresses.is_empty() || self.nodeport_addresses.iter().any(|net| net.contains(ip))
        };
        match frontend.address {
            Address::Ip(ip) => vec![SocketAddr::new(ip, frontend.port)],
            Address::Node(family) => {
                let of_family = self.all.iter().copied().filter(|ip| Family::of(*ip) == family);
                of_family.filter(selected).map(|ip| SocketAddr::new(ip, frontend.port)).collect()
            }
        }
    }
}

/// Whether anybody at all could be sent somewhere.
pub(super) fn is_served(entry: &Entry) -> bool {
    !entry.backends.is_empty() || entry.short_circuit.is_some()
}

/// Who the client is. A Service's address is local here, so the node's own connections to it come from that very address.
pub(super) fn client(peer: IpAddr, dialled: IpAddr) -> IpAddr {
    match peer {
        _ if peer != dialled => peer,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

/// Whether the client may connect at all (loadBalancerSourceRanges).
pub(super) fn admits(entry: &Entry, inside: &Inside, client: IpAddr) -> bool {
    entry.admits(client) || (inside.is_node(client) && entry.admits_node(&inside.own))
}

/// The endpoints to try, best first: the client's own by affinity, then the others from a random start or, where the Service wants that,
/// those with fewer open connections through this frontend first.
pub(super) fn order(
    entry: &Entry,
    inside: &Inside,
    client: IpAddr,
    sticky: Option<SocketAddr>,
    random: usize,
    open: impl Fn(&SocketAddr) -> usize,
) -> Vec<SocketAddr> {
    let endpoints: &[Endpoint] = match &entry.short_circuit {
        Some(cluster) if inside.has(client) => cluster,
        _ => &entry.backends,
    };
    let mut order: Vec<SocketAddr> = endpoints.iter().map(Endpoint::socket).collect();
    if !order.is_empty() {
        let start = random % order.len();
        order.rotate_left(start);
    }
    if entry.balancing == Balancing::LeastConnections {
        order.sort_by_key(open);
    }
    if let Some(at) = sticky.and_then(|sticky| order.iter().position(|endpoint| *endpoint == sticky)) {
        order[..=at].rotate_right(1);
    }
    order
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use outrigger_desired::{Masquerade, NoEndpoints, Protocol, ServiceName, ServicePortName};

    use super::*;

    fn endpoints(texts: &[&str]) -> Arc<[Endpoint]> {
        texts.iter().map(|text| text.parse::<SocketAddr>().unwrap()).map(|a| Endpoint { ip: a.ip(), port: a.port(), local: true }).collect()
    }

    fn entry(backends: &[&str], short_circuit: Option<&[&str]>) -> Entry {
        Entry {
            service: ServicePortName { service: ServiceName::new("default", "web"), port: "".into() },
            kind: Kind::NodePort,
            backends: endpoints(backends),
            short_circuit: short_circuit.map(endpoints),
            retained: Arc::default(),
            affinity: Some(Duration::from_secs(1)),
            masquerade: Masquerade::Always,
            source_ranges: Arc::default(),
            balancing: Balancing::Random,
            no_endpoints: NoEndpoints::Reject,
        }
    }

    fn ordered(entry: &Entry, client: &str, sticky: Option<&str>, random: usize) -> String {
        let node = NodeAddresses::new(vec!["192.168.0.1".parse().unwrap()], &[], &[], &["10.244.0.0/16".parse().unwrap()]);
        let sticky = sticky.map(|sticky| sticky.parse().unwrap());
        // As many connections as the address' last number says.
        let open = |endpoint: &SocketAddr| match endpoint.ip() {
            IpAddr::V4(ip) => ip.octets()[3].into(),
            IpAddr::V6(_) => 0,
        };
        order(entry, &node.inside(), client.parse().unwrap(), sticky, random, open)
            .iter()
            .map(SocketAddr::to_string)
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn all_endpoints_are_tried_from_a_random_start_and_the_sticky_one_first() {
        let three = entry(&["1.0.0.1:1", "1.0.0.2:1", "1.0.0.3:1"], None);
        assert_eq!(ordered(&three, "9.9.9.9", None, 4), "1.0.0.2:1 1.0.0.3:1 1.0.0.1:1");
        assert_eq!(ordered(&three, "9.9.9.9", Some("1.0.0.1:1"), 4), "1.0.0.1:1 1.0.0.2:1 1.0.0.3:1");
        assert_eq!(ordered(&three, "9.9.9.9", Some("1.0.0.9:1"), 0), "1.0.0.1:1 1.0.0.2:1 1.0.0.3:1");
        assert_eq!(ordered(&entry(&[], None), "9.9.9.9", None, 4), "");
        let least = Entry { balancing: Balancing::LeastConnections, ..three };
        assert_eq!(ordered(&least, "9.9.9.9", None, 4), "1.0.0.1:1 1.0.0.2:1 1.0.0.3:1");
        assert_eq!(ordered(&least, "9.9.9.9", Some("1.0.0.3:1"), 4), "1.0.0.3:1 1.0.0.1:1 1.0.0.2:1");
    }

    #[test]
    fn the_node_and_its_pods_ignore_the_external_policy() {
        let local = entry(&[], Some(&["1.0.0.1:1"]));
        assert!(is_served(&local));
        assert_eq!(ordered(&local, "10.244.3.4", None, 0), "1.0.0.1:1");
        assert_eq!(ordered(&local, "192.168.0.1", None, 0), "1.0.0.1:1");
        assert_eq!(ordered(&local, "9.9.9.9", None, 0), "");
    }

    #[test]
    fn node_ports_listen_on_the_selected_addresses_of_their_family() {
        let all: Vec<IpAddr> = ["192.168.0.1", "10.0.0.1", "127.0.0.1", "fd00::1"].iter().map(|ip| ip.parse().unwrap()).collect();
        let frontend = Frontend { address: Address::Node(Family::V4), port: 30000, protocol: Protocol::Tcp };
        let listen = |nodeport: &[IpNet], kind| {
            NodeAddresses::new(all.clone(), &[], nodeport, &[])
                .sockets(frontend, kind)
                .iter()
                .map(SocketAddr::to_string)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(listen(&[], Kind::NodePort), "10.0.0.1:30000 127.0.0.1:30000 192.168.0.1:30000");
        let selected = ["192.168.0.0/16".parse().unwrap()];
        assert_eq!(listen(&selected, Kind::NodePort), "192.168.0.1:30000");
        assert_eq!(listen(&selected, Kind::HostPort), "10.0.0.1:30000 127.0.0.1:30000 192.168.0.1:30000");
    }
}
