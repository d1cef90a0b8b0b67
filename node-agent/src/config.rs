//! The command line. Flags have upstream's names where kubelet or kube-proxy has them.
use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser};
use ipnet::IpNet;
use outrigger_dataplane::ModeChoice;

#[derive(Parser)]
#[command(name = "outrigger-node", version, about = "Outrigger's node agent: kubelet, Service proxy, pod network and DNS")]
pub enum Command {
    /// Runs this machine as a node of a cluster
    Run(Run),
}

#[derive(Args)]
pub struct Run {
    /// How to reach the API server, and as whom
    #[arg(long)]
    pub kubeconfig: PathBuf,
    /// The Node object's name
    #[arg(long)]
    pub node_name: String,
    /// The node's address, one per family
    #[arg(long, required = true, value_delimiter = ',')]
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
    /// The ranges of all pods
    #[arg(long, value_delimiter = ',')]
    pub cluster_cidr: Vec<IpNet>,
    /// How Services are carried: auto, ebpf, nftables or userspace
    #[arg(long, default_value = "auto")]
    pub proxy_mode: ModeChoice,
    /// Where NodePorts answer; on all of the node's addresses when not given
    #[arg(long, value_delimiter = ',')]
    pub nodeport_addresses: Vec<IpNet>,
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
}
