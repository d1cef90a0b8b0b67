//! What the Service path has to know of the node beside the watched objects.
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::IpNet;

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

#[derive(Clone, Debug)]
pub struct Config {
    pub mode: ModeChoice,
    pub node_name: String,
    /// The node's own addresses as its Node object has them; at most one per family.
    pub node_ips: Vec<IpAddr>,
    /// Where NodePorts answer; empty means on all of the node's addresses.
    pub nodeport_addresses: Vec<IpNet>,
    /// The pods' ranges; traffic from elsewhere to a ClusterIP is masqueraded. Empty when unknown.
    pub cluster_cidrs: Vec<IpNet>,
    /// The cgroup2 folder that everything of this node lives under: where eBPF programs attach.
    pub cgroup2_path: PathBuf,
    /// Where eBPF maps and links are pinned: one folder per node.
    pub pin_dir: PathBuf,
    /// Names things in shared places of the kernel that are one per node; follows the data directory.
    pub instance: String,
}
