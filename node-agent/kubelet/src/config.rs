//! What the kubelet is told at start.
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::Taint;

use crate::eviction::Thresholds;

/// The kubelet's settings; defaults are upstream's.
#[derive(Clone, Debug)]
pub struct Config {
    pub node_name: String,
    pub node_ips: Vec<IpAddr>,
    /// Pods' volumes, logs and plugin data live below it.
    pub data_dir: PathBuf,
    /// `unix:///path`
    pub runtime_endpoint: String,
    /// The cgroup below which the QoS tree is made, an absolute path in each hierarchy.
    pub cgroup_root: String,
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    /// The file that `dnsPolicy: Default` copies from.
    pub resolv_conf: PathBuf,
    pub static_pod_path: Option<PathBuf>,
    /// Where the kubelet's HTTP API listens, as told to the API server.
    pub port: u16,
    pub max_pods: u32,
    pub register_labels: Vec<(String, String)>,
    pub register_taints: Vec<Taint>,
    pub status_update_period: Duration,
    pub status_report_period: Duration,
    pub lease_seconds: i32,
    /// How often a pod is looked at without any event; upstream's syncFrequency.
    pub sync_period: Duration,
    /// Sysctls outside the namespaced, safe set that pods may set: names, or prefixes that end in `*`.
    pub allowed_unsafe_sysctls: Vec<String>,
    pub container_log_max_size: u64,
    pub container_log_max_files: usize,
    pub serialize_image_pulls: bool,
    /// Percent of the image filesystem in use above which unused images are removed, and down to which.
    pub image_gc_high_percent: u8,
    pub image_gc_low_percent: u8,
    pub image_minimum_age: Duration,
    /// When the node is short of something: it says so, takes no more pods and evicts some.
    pub eviction_hard: Thresholds,
    /// How long the node says so after it was last short.
    pub pressure_transition: Duration,
}

impl Config {
    /// Defaults around what has no default.
    pub fn new(node_name: &str, node_ip: IpAddr, data_dir: &Path, runtime_endpoint: &str) -> Self {
        Self {
            node_name: node_name.into(),
            node_ips: vec![node_ip],
            data_dir: data_dir.into(),
            runtime_endpoint: runtime_endpoint.into(),
            cgroup_root: "/".into(),
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".into(),
            resolv_conf: "/etc/resolv.conf".into(),
            static_pod_path: None,
            port: 10250,
            max_pods: 110,
            register_labels: Vec::new(),
            register_taints: Vec::new(),
            status_update_period: Duration::from_secs(10),
            status_report_period: Duration::from_secs(300),
            lease_seconds: 40,
            sync_period: Duration::from_secs(60),
            allowed_unsafe_sysctls: Vec::new(),
            container_log_max_size: 10 * 1024 * 1024,
            container_log_max_files: 5,
            serialize_image_pulls: false,
            image_gc_high_percent: 85,
            image_gc_low_percent: 80,
            image_minimum_age: Duration::from_secs(120),
            eviction_hard: Thresholds::default(),
            pressure_transition: Duration::from_secs(300),
        }
    }

    pub fn pods_dir(&self) -> PathBuf {
        self.data_dir.join("pods")
    }

    pub fn pod_dir(&self, uid: &str) -> PathBuf {
        self.pods_dir().join(uid)
    }

    pub fn logs_dir(&self) -> PathBuf {
        self.data_dir.join("pod-logs")
    }

    /// `<logs>/<namespace>_<name>_<uid>`
    pub fn pod_logs_dir(&self, namespace: &str, name: &str, uid: &str) -> PathBuf {
        self.logs_dir().join(format!("{namespace}_{name}_{uid}"))
    }
}
