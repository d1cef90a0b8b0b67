//! A cluster as a lab: which hosts it has and which programs run on them.
use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use outrigger_lab::{HostSpec, Lab, Program};
use serde::{Deserialize, Serialize};

use crate::{paths, tools};

pub const CLUSTER_CIDR: &str = "10.244.0.0/16";
pub const SERVICE_CIDR: &str = "10.96.0.0/12";
pub const CLUSTER_DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
pub const CLUSTER_DOMAIN: &str = "cluster.local";
pub const SECURE_PORT: u16 = 6443;

/// What the user asked for; kept in the lab's directory as `cluster.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cluster {
    pub name: String,
    pub nodes: u8,
    pub proxy_mode: String,
    /// Where the API server answers on the machine's 127.0.0.1.
    pub api_port: u16,
    /// Where the demo's Service answers on the machine's 127.0.0.1.
    pub demo_port: u16,
}

impl Cluster {
    pub fn directory(&self) -> PathBuf {
        paths::lab(&self.name)
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.directory().join("kubeconfig")
    }

    pub fn node_name(index: u8) -> String {
        format!("node-{}", index + 1)
    }

    pub fn node_address(index: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 89, 0, 11 + index)
    }

    pub fn node_directory(&self, index: u8) -> PathBuf {
        self.directory().join("hosts").join(Self::node_name(index))
    }

    pub fn containerd_socket(&self, index: u8) -> PathBuf {
        self.node_directory(index).join("containerd.sock")
    }

    fn program(&self, name: &str) -> String {
        self.directory().join("bin").join(name).display().to_string()
    }

    fn node_kubeconfig(&self, index: u8) -> PathBuf {
        self.node_directory(index).join("kubeconfig")
    }

    /// A node; the first one is the control plane's host too, as on a cluster made by kubeadm.
    pub fn node(&self, index: u8, api: Option<&std::net::TcpListener>) -> Result<HostSpec> {
        let mut programs = Vec::new();
        if let Some(listener) = api {
            programs.push(self.control(listener.as_raw_fd()));
        }
        programs.push(self.containerd(index)?);
        programs.push(self.agent(index));
        Ok(HostSpec {
            name: Self::node_name(index),
            address: Some(Self::node_address(index)),
            cgroup: self.cgroup(&Self::node_name(index)),
            directory: self.node_directory(index),
            programs,
        })
    }

    /// A host that is not in the cluster: what reaches it from there came "from outside".
    pub fn outside(&self) -> HostSpec {
        HostSpec {
            name: "outside".into(),
            address: Some(Ipv4Addr::new(10, 89, 0, 200)),
            cgroup: self.cgroup("outside"),
            directory: self.directory().join("hosts/outside"),
            programs: Vec::new(),
        }
    }

    pub fn cgroup(&self, host: &str) -> String {
        format!("{}/{host}", Lab::cgroup(&self.name))
    }

    fn control(&self, listener: i32) -> Program {
        let own = Self::node_address(0).to_string();
        let data = self.directory().join("control").display().to_string();
        let mut command = vec![self.program("outrigger-control"), "run".into()];
        for (flag, value) in [
            ("--data-dir", data.as_str()),
            ("--bind-address", "0.0.0.0"),
            ("--advertise-address", &own),
            ("--secure-port", &SECURE_PORT.to_string()),
            ("--service-cluster-ip-range", SERVICE_CIDR),
            ("--cluster-cidr", CLUSTER_CIDR),
            ("--tls-san", &own),
        ] {
            command.extend([flag.to_owned(), value.to_owned()]);
        }
        Program { name: "outrigger-control".into(), command, env: [].into(), listener: Some(listener) }
    }

    fn agent(&self, index: u8) -> Program {
        let directory = self.node_directory(index);
        let path = |name: &str| directory.join(name).display().to_string();
        let mut command = vec![self.program("outrigger-node"), "run".into()];
        for (flag, value) in [
            ("--kubeconfig", self.node_kubeconfig(index).display().to_string()),
            ("--node-name", Self::node_name(index)),
            ("--node-ip", Self::node_address(index).to_string()),
            ("--data-dir", path("agent")),
            ("--container-runtime-endpoint", format!("unix://{}", self.containerd_socket(index).display())),
            ("--cgroup-root", format!("/{}", self.cgroup(&Self::node_name(index)))),
            ("--cni-bin-dir", path("cni/bin")),
            ("--cni-conf-dir", path("cni/net.d")),
            ("--cluster-dns", CLUSTER_DNS.to_string()),
            ("--cluster-domain", CLUSTER_DOMAIN.into()),
            ("--cluster-cidr", CLUSTER_CIDR.into()),
            ("--proxy-mode", self.proxy_mode.clone()),
            ("--pod-manifest-path", path("manifests")),
            // The disk is the machine's, not the lab's: how full it is says nothing about the nodes.
            ("--eviction-hard", "memory.available<100Mi".into()),
            ("--image-gc-high-threshold", "100".into()),
        ] {
            command.extend([flag.to_owned(), value]);
        }
        Program { name: "outrigger-node".into(), command, env: [].into(), listener: None }
    }

    fn containerd(&self, index: u8) -> Result<Program> {
        let directory = self.node_directory(index);
        for part in ["containerd", "cni/bin", "cni/net.d", "manifests", "certs.d", "agent"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        }
        let config = directory.join("containerd.toml");
        fs::write(&config, containerd_config(&directory, &self.containerd_socket(index))?)
            .with_context(|| format!("write {}", config.display()))?;
        let containerd = tools::find("containerd").context("containerd is not installed")?;
        let command = vec![containerd.display().to_string(), "--config".into(), config.display().to_string()];
        Ok(Program { name: "containerd".into(), command, env: [].into(), listener: None })
    }
}

fn containerd_config(directory: &Path, socket: &Path) -> Result<String> {
    let runc = tools::find("runc").context("runc is not installed")?;
    let (directory, socket, runc) = (directory.display(), socket.display(), runc.display());
    // Without CAP_SYS_RESOURCE no process may lower its OOM score, and every sandbox fails.
    let restrict = !has_capability(CAP_SYS_RESOURCE)?;
    Ok(format!(
        r#"version = 2
root = "{directory}/containerd/root"
state = "{directory}/containerd/state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]

[grpc]
address = "{socket}"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "registry.k8s.io/pause:3.10.1"
restrict_oom_score_adj = {restrict}
netns_mounts_under_state_dir = true
stream_server_address = "127.0.0.1"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{directory}/cni/bin"
conf_dir = "{directory}/cni/net.d"

[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{directory}/certs.d"

[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "{runc}"
Root = "{directory}/containerd/runc"
"#
    ))
}

const CAP_SYS_RESOURCE: u32 = 24;

fn has_capability(number: u32) -> Result<bool> {
    let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("no CapEff in /proc/self/status")?;
    Ok(u64::from_str_radix(effective.trim(), 16).context("parse CapEff")? >> number & 1 == 1)
}
