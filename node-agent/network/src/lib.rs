//! The pod network of one node: the CNI plugin with its addresses, routes to the other nodes' pods, masquerade to the
//! outside, and the cluster's DNS.
//!
//! Everything works in the network namespace that the process runs in: the machine's own on a real node, the node's
//! in a lab.
#![cfg_attr(test, allow(clippy::type_complexity, reason = "tables of cases have long types"))]
pub mod cni;
pub mod config;
pub mod dns;
pub mod ipam;
pub mod masquerade;
pub mod netns;
pub mod routes;
pub mod topology;

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use outrigger_cluster::watch::Watch;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

pub use cni::cni_main;

/// How often the kernel is compared with what it should hold, without an event asking for it: a link that went down
/// took its routes along.
const RECHECK: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_secs(2);

#[derive(Clone, Debug)]
pub struct Config {
    pub node_name: String,
    pub node_ips: Vec<IpAddr>,
    /// The plugin keeps its allocations below it.
    pub data_dir: PathBuf,
    /// Where the plugin asks the running agent to admit a pod.
    pub agent_socket: PathBuf,
    /// Where the runtime looks for CNI configurations (`/etc/cni/net.d`).
    pub cni_conf_dir: PathBuf,
    /// Where the runtime looks for CNI plugins (`/opt/cni/bin`): `outrigger-cni` there is made to lead to this binary.
    pub cni_bin_dir: PathBuf,
    pub cluster_cidrs: Vec<IpNet>,
    /// The kube-dns Service's addresses; none turns the node's DNS off.
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    /// The node's own resolvers, for names outside the cluster.
    pub resolv_conf: PathBuf,
}

/// Whether pods can be given a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// With the reason, in the words of the Node's conditions.
    NotReady(String),
    Ready,
}

/// The running pod network.
pub struct Network {
    config: Config,
    readiness: watch::Receiver<Readiness>,
    dns: dns::Dns,
    tasks: Vec<JoinHandle<()>>,
}

impl Network {
    /// Starts all parts on the current runtime; they run until [`Network::stop`].
    pub fn start(config: Config, watch: &Watch) -> Self {
        let (sender, readiness) = watch::channel(Readiness::NotReady("cni plugin not initialized".to_owned()));
        let (dns, mut tasks) = dns::Dns::start(dns::Config::of(&config), watch);
        tasks.push(tokio::spawn(Keeper::new(config.clone(), sender).run(watch.nodes.subscribe())));
        Self { config, readiness, dns, tasks }
    }

    pub fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.clone()
    }

    pub fn dns(&self) -> &dns::Dns {
        &self.dns
    }

    /// Frees the addresses of sandboxes that are not in `alive` (by the runtime's sandbox id).
    pub fn collect_garbage(&self, alive: &HashSet<String>) -> Result<usize, ipam::Error> {
        let store = ipam::Ipam::new(ipam_dir(&self.config.data_dir)).lock()?;
        Ok(store.release_where(|owner| !alive.contains(&owner.container_id))?.len())
    }

    /// Ends the tasks. The kernel keeps what it has: pods go on talking, and the next start takes it over.
    pub fn stop(&self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn ipam_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("network")
}

/// One sandbox's link to this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The runtime's id of the sandbox and the interface in it, as [`ipam::Owner::key`] has them.
    pub key: String,
    /// `namespace/name`, where it was noted.
    pub pod: Option<String>,
    pub addresses: Vec<IpAddr>,
    pub host_interface: String,
}

/// All that the plugin has attached and not let go yet, from its store: the agent needs nobody else to know them.
pub fn attachments(data_dir: &Path) -> Result<Vec<Attachment>, ipam::Error> {
    let mut found: BTreeMap<ipam::Owner, Attachment> = BTreeMap::new();
    for (address, record) in ipam::Ipam::new(ipam_dir(data_dir)).lock()?.records()? {
        let new = || Attachment {
            key: record.owner.key(),
            pod: record.pod.clone(),
            addresses: Vec::new(),
            host_interface: cni::attach::host_interface(&record.owner),
        };
        found.entry(record.owner.clone()).or_insert_with(new).addresses.push(address);
    }
    Ok(found.into_values().collect())
}

/// The task that brings the CNI configuration, routes and masquerade to what the nodes say.
struct Keeper {
    config: Config,
    readiness: watch::Sender<Readiness>,
    topology: topology::Topology,
    rules: Option<masquerade::Rules>,
}

impl Keeper {
    fn new(config: Config, readiness: watch::Sender<Readiness>) -> Self {
        Self { config, readiness, topology: topology::Topology::default(), rules: None }
    }

    async fn run(mut self, mut nodes: outrigger_cluster::Subscription<k8s_openapi::api::core::v1::Node>) {
        let mut synced = false;
        let mut pause = RECHECK;
        loop {
            let before = self.topology.clone();
            match tokio::time::timeout(pause, nodes.recv()).await {
                Ok(Some(delta)) => {
                    self.topology.take(&delta);
                    while let Ok(delta) = nodes.try_recv() {
                        self.topology.take(&delta);
                    }
                    if synced && before == self.topology {
                        continue;
                    }
                    synced = true;
                }
                // The mirrors are gone: the agent ends.
                Ok(None) => return,
                Err(_) if !synced => continue,
                Err(_) => {}
            }
            pause = match self.apply().await {
                Ok(()) => RECHECK,
                Err(error) => {
                    warn!(%error, "the pod network isn't as it should be; trying again");
                    RETRY
                }
            };
        }
    }

    async fn apply(&mut self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let own_cidrs = self.topology.node(&self.config.node_name).map(|share| share.pod_cidrs.clone()).unwrap_or_default();
        if own_cidrs.is_empty() {
            let reason = "cni plugin not initialized: the node has no pod CIDR yet".to_owned();
            self.readiness.send_if_modified(|state| replace(state, Readiness::NotReady(reason)));
        }
        enable_forwarding(own_cidrs.iter().any(|cidr| cidr.addr().is_ipv6()))?;
        if !own_cidrs.is_empty() {
            self.write_config(&own_cidrs).await?;
        }
        let others = self.topology.routes(&self.config.node_name);
        let changed = routes::sync(&routes::desired(&own_cidrs, &others)).await;
        if let Ok(routes) = changed
            && routes > 0
        {
            info!(routes, nodes = others.len(), "routes to pods written");
        }
        let rules =
            masquerade::Rules { own_cidrs, cluster_cidrs: self.config.cluster_cidrs.clone(), nodes: self.topology.node_addresses() };
        if self.rules.as_ref() != Some(&rules) {
            masquerade::apply(&rules).await?;
            self.rules = Some(rules);
        }
        changed?;
        Ok(())
    }

    async fn write_config(&self, own_cidrs: &[IpNet]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        config::install_plugin(&self.config.cni_bin_dir, &std::env::current_exe()?)?;
        let mtu = routes::uplink_mtu(&self.config.node_ips).await?;
        let changed =
            config::write(&self.config.cni_conf_dir, &ipam_dir(&self.config.data_dir), &self.config.agent_socket, own_cidrs, mtu)?;
        if self.readiness.send_if_modified(|state| replace(state, Readiness::Ready)) {
            info!(?own_cidrs, mtu, changed, "pod network ready");
            let store = ipam::Ipam::new(ipam_dir(&self.config.data_dir)).lock()?;
            let freed = cni::reclaim(&store).await?;
            if freed > 0 {
                info!(addresses = freed, "addresses of vanished pods freed");
            }
        }
        Ok(())
    }
}

fn replace(state: &mut Readiness, new: Readiness) -> bool {
    let changed = *state != new;
    *state = new;
    changed
}

fn enable_forwarding(v6: bool) -> cni::message::Result<()> {
    cni::attach::write_sysctl("net/ipv4/ip_forward", "1")?;
    if v6 {
        cni::attach::write_sysctl("net/ipv6/conf/all/forwarding", "1")?;
    }
    Ok(())
}
