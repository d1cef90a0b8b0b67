//! What all parts of the kubelet share.
use std::sync::Arc;

use jiff::Timestamp;
use outrigger_cluster::watch::Watch;
use outrigger_cluster::{Lookup, Writer};

use crate::cgroup::Cgroups;
use crate::config::Config;
use crate::cri::{Cri, v1};
use crate::eviction::Pressure;
use crate::images::Images;
use crate::in_flight::InFlight;
use crate::machine::Machine;
use crate::pod::backoff::Backoff;
use crate::probe::{Probes, Tools};
use crate::quantity::Resources;
use crate::volume::Volumes;

/// The node's parts, made once at start.
pub struct Host {
    pub config: Arc<Config>,
    pub cri: Cri,
    /// `containerd`, the prefix of container ids in statuses.
    pub runtime_name: String,
    /// `containerd://1.6.20`
    pub runtime_version: String,
    pub writer: Writer,
    pub lookup: Lookup,
    pub watch: Watch,
    pub images: Images,
    pub restarts: Backoff,
    pub probes: Arc<Probes>,
    pub volumes: Volumes,
    pub in_flight: Arc<InFlight>,
    pub cgroups: Cgroups,
    pub machine: Machine,
    pub capacity: Resources,
    pub allocatable: Resources,
    pub pressure: Pressure,
    pub started: Timestamp,
}

impl Host {
    pub fn host_ips(&self) -> Vec<String> {
        self.config.node_ips.iter().map(ToString::to_string).collect()
    }

    pub fn probe_tools(&self) -> Tools {
        Tools { cri: self.cri.clone(), writer: self.writer.clone(), probes: self.probes.clone(), agent_started: self.started }
    }

    /// The node's own resolver settings, as they are now.
    pub async fn node_dns(&self) -> v1::DnsConfig {
        let text = tokio::fs::read_to_string(&self.config.resolv_conf).await.unwrap_or_default();
        crate::pod::dns::parse_resolv_conf(&text)
    }
}
