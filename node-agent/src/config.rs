//! The command line. Flags have upstream's names where kubelet or kube-proxy has them.
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser};

use crate::local::{self, Socket};
use crate::proxy::flags::ProxyFlags;
use crate::roles::Role;

#[derive(Parser)]
#[command(name = "outrigger-node", version, about = "Outrigger's node agent: kubelet, Service proxy, pod network and DNS")]
pub enum Command {
    /// Runs this machine as a node of a cluster, or a part of that
    Run(Box<Run>),
    /// Tells how each part of the running agent is
    Status(Socket),
    /// Lists the Services that the running agent serves, with their backends and counters
    Services(local::Services),
    /// Tells where a packet would go and why, and whether the kernel agrees
    Trace(local::Trace),
    /// Shows connections through Services as they come and go
    Monitor(local::Monitor),
    /// Switches how the running agent carries Services, while traffic flows
    Mode(local::Mode),
}

#[derive(Args)]
pub struct Run {
    /// Which parts to run; the others are somebody else's
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["kubelet", "proxy", "network", "dns"])]
    pub roles: Vec<Role>,
    /// How to reach the API server, and as whom; the pod's own service account when not given
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// The API server's address, instead of what the kubeconfig says
    #[arg(long)]
    pub master: Option<String>,
    /// The Node object's name; this host's name when not given
    #[arg(long, alias = "hostname-override")]
    pub node_name: Option<String>,
    /// The node's address, one per family
    #[arg(long, value_delimiter = ',')]
    pub node_ip: Vec<IpAddr>,
    /// Where pods' volumes and logs, addresses and certificates are kept
    #[arg(long, default_value = "/var/lib/outrigger")]
    pub data_dir: PathBuf,
    /// The runtime's CRI socket
    #[arg(long, default_value = "unix:///run/containerd/containerd.sock")]
    pub container_runtime_endpoint: String,
    /// The cgroup below which pods run; eBPF programs attach there
    #[arg(long, default_value = "/")]
    pub cgroup_root: String,
    #[arg(long, default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// The addresses at which pods ask for names
    #[arg(long, value_delimiter = ',')]
    pub cluster_dns: Vec<IpAddr>,
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,
    /// A folder of manifests that run without the API server
    #[arg(long)]
    pub pod_manifest_path: Option<PathBuf>,
    /// The kubelet API's port
    #[arg(long, default_value_t = 10250)]
    pub port: u16,
    #[arg(long, default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,
    #[arg(long, default_value_t = 110)]
    pub max_pods: u32,
    /// What the node must have left, else it evicts pods, such as `memory.available<100Mi,nodefs.available<10%`
    #[arg(long)]
    pub eviction_hard: Option<outrigger_kubelet::eviction::Thresholds>,
    /// Percent of the image file system in use above which unused images are removed; 100 for never
    #[arg(long, default_value_t = 85, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub image_gc_high_threshold: u8,
    #[command(flatten)]
    pub proxy: ProxyFlags,
}

impl Run {
    /// The kubelet and the pod network are told the node's addresses; a proxy alone finds them on the Node.
    pub fn check(&self) -> Result<()> {
        let needy = self.roles.iter().find(|role| matches!(role, Role::Kubelet | Role::Network));
        if let Some(role) = needy {
            ensure!(!self.node_ip.is_empty(), "the role {} needs --node-ip", role.name());
        }
        Ok(())
    }

    /// As kube-proxy and kubelet have it: what is asked for, else the host's name, in lower case.
    pub fn node_name(&self, overridden: Option<&str>) -> Result<String> {
        let name = match self.node_name.as_deref().or(overridden) {
            Some(name) => name.to_owned(),
            None => std::fs::read_to_string("/proc/sys/kernel/hostname").context("read this host's name")?,
        };
        let name = name.trim().to_lowercase();
        ensure!(!name.is_empty(), "empty hostname is invalid: give --hostname-override");
        Ok(name)
    }
}
