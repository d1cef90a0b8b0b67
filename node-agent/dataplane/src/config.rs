//! What the Service path has to know of the node beside the watched objects.
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use outrigger_desired::trace::Surroundings;

/// How Service traffic is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    Ebpf,
    Nftables,
    Userspace,
}

impl Mode {
    /// The order in which `auto` tries them.
    pub const ALL: [Self; 3] = [Self::Ebpf, Self::Nftables, Self::Userspace];
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Userspace => "userspace",
        })
    }
}

/// The `--proxy-mode` flag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ModeChoice {
    #[default]
    Auto,
    Only(Mode),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown proxy mode {0:?}: expected auto, ebpf, nftables or userspace")]
pub struct UnknownMode(String);

impl FromStr for ModeChoice {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        Ok(match text {
            "auto" => Self::Auto,
            "ebpf" => Self::Only(Mode::Ebpf),
            "nftables" => Self::Only(Mode::Nftables),
            "userspace" => Self::Only(Mode::Userspace),
            other => return Err(UnknownMode(other.into())),
        })
    }
}

impl fmt::Display for ModeChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Only(mode) => mode.fmt(f),
        }
    }
}

/// Where pods' traffic comes in, for those who know it by interface and not by address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodInterfaces {
    /// All pods hang on this bridge.
    Bridge(String),
    /// Each pod has an interface whose name begins so.
    Prefix(String),
}

impl PodInterfaces {
    pub fn has(&self, interface: &str) -> bool {
        match self {
            Self::Bridge(name) => interface == name,
            Self::Prefix(prefix) => interface.starts_with(prefix),
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Config {
    pub mode: ModeChoice,
    pub node_name: String,
    /// The node's own addresses as its Node object has them; at most one per family.
    pub node_ips: Vec<IpAddr>,
    /// Where NodePorts answer; empty means on all of the node's addresses.
    pub nodeport_addresses: Vec<IpNet>,
    /// The pods' ranges; traffic from elsewhere to a ClusterIP is masqueraded. Empty when unknown.
    pub cluster_cidrs: Vec<IpNet>,
    /// How else pods' traffic is known.
    pub pod_interfaces: Option<PodInterfaces>,
    /// Everybody's traffic to a ClusterIP is masqueraded, where translation happens on the way (eBPF's sockets speak to the
    /// backend themselves, so there is nothing to come back through).
    pub masquerade_all: bool,
    /// The least time between two applies; with zero each change goes at once.
    pub min_sync_period: Duration,
    /// The cgroup2 folder that everything of this node lives under: where eBPF programs attach.
    pub cgroup2_path: PathBuf,
    /// Where eBPF maps and links are pinned: one folder per node.
    pub pin_dir: PathBuf,
    /// Names things in shared places of the kernel that are one per node; follows the data directory.
    pub instance: String,
}

impl Config {
    /// What the tracer has to know of the node that this process is on.
    pub fn surroundings(&self) -> Surroundings {
        let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
        let ip = |address: nix::sys::socket::SockaddrStorage| {
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        };
        Surroundings {
            node_ips: interfaces.filter_map(|interface| ip(interface.address?)).collect(),
            nodeport_addresses: self.nodeport_addresses.clone(),
            cluster_cidrs: self.cluster_cidrs.clone(),
        }
    }
}
