//! The Service proxy's place in the agent: its flags and file, watched objects on their way in, its health and metrics ports.
mod duration;
mod file;
pub mod flags;
mod health;
mod serve;
pub mod settings;

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use outrigger_cluster::Key;
use outrigger_cluster::watch::Watch;
use outrigger_dataplane::{Config, Mode, Parting, Proxy, ProxyHandle, probe};
use outrigger_desired::{Change, Watched};
use tokio::sync::mpsc;
use tracing::warn;

use crate::config::Run;
use crate::forward::forward;
use crate::roles::{Health, Role, Roles};
use settings::{Conntrack, DetectLocal, NodePorts, Settings};

/// How long a proxy that starts before its Node is registered waits for it, as kube-proxy does.
const NODE_PATIENCE: Duration = Duration::from_secs(32);

/// Starts the Service path on what `watch` sees.
pub async fn start(
    options: &Run,
    node_name: &str,
    settings: Settings,
    roles: &Roles,
    watch: &Watch,
    parts: &Health,
) -> Result<ProxyHandle> {
    tune(&settings);
    let config = config(options, node_name, &settings, watch).await?;
    let (sender, changes) = mpsc::unbounded_channel();
    forward(watch.services.subscribe(), sender.clone(), Change::Service);
    forward(watch.endpoint_slices.subscribe(), sender.clone(), Change::EndpointSlice);
    forward(watch.nodes.subscribe(), sender.clone(), Change::Node);
    if roles.has(Role::Network) {
        forward(watch.pods.subscribe(), sender, Change::Pod);
    } else {
        // Host ports are the affair of whoever gives pods their network. The receiver is in hand.
        let _ = sender.send(Change::Pod(Watched::Replaced(Arc::default())));
    }
    let proxy = Proxy::start(config, changes).await.context("start the Service path")?;
    let checks = health::Checks::new(proxy.clone(), watch.nodes.clone(), node_name);
    let (reading, told) = (checks.clone(), proxy.clone());
    parts.watch(Role::Proxy, move || match told.health() {
        health if !health.synced => Err("the first lists have not been brought to the kernel yet".into()),
        health if !reading.is_healthy() => {
            Err(health.error.unwrap_or_else(|| "a change has not been brought to the kernel for a minute".into()))
        }
        _ => Ok(()),
    });
    serve::start(serve::Sources { proxy: proxy.clone(), checks, settings: Arc::new(settings), node_name: node_name.into() }).await?;
    Ok(proxy)
}

/// Takes away what proxies of ours have put into the kernel, in whichever mode.
pub async fn cleanup(options: &Run, node_name: &str) -> Result<()> {
    let config = kernel_config(options, node_name)?;
    for mode in Mode::ALL {
        if let Ok(mut backend) = probe::open(&config, mode) {
            backend.restore().await.with_context(|| format!("clean {mode} up"))?;
            backend.teardown(Parting::Final).await.with_context(|| format!("clean {mode} up"))?;
        }
    }
    Ok(())
}

async fn config(options: &Run, node_name: &str, settings: &Settings, watch: &Watch) -> Result<Config> {
    let needs_node = settings.detect_local == DetectLocal::NodeCidr || (options.node_ip.is_empty() && settings.bind_address.is_none());
    let node = if needs_node { own_node(watch, node_name).await } else { None };
    let mut node_ips = options.node_ip.clone();
    if node_ips.is_empty() {
        node_ips = settings.bind_address.map_or_else(|| node.as_deref().map(addresses).unwrap_or_default(), |ip| vec![ip]);
    }
    if node_ips.is_empty() {
        warn!(node = node_name, "the node's addresses are not known: its Node object has none, and there is no --bind-address");
    }
    let (cluster_cidrs, pod_interfaces) = match &settings.detect_local {
        DetectLocal::Cidrs(all) => (all.clone(), None),
        DetectLocal::Interfaces(interfaces) => (Vec::new(), Some(interfaces.clone())),
        DetectLocal::NodeCidr => {
            let cidrs = node.as_deref().map(pod_cidrs).unwrap_or_default();
            ensure!(!cidrs.is_empty(), "detect-local-mode NodeCIDR: the Node {node_name} has no podCIDRs");
            (cidrs, None)
        }
    };
    let nodeport_addresses = match &settings.node_ports {
        NodePorts::Everywhere => Vec::new(),
        NodePorts::Ranges(all) => all.clone(),
        NodePorts::Primary => {
            ensure!(!node_ips.is_empty(), "nodeport-addresses 'primary': the Node {node_name} has no address");
            node_ips.iter().copied().map(IpNet::from).collect()
        }
    };
    Ok(Config {
        mode: settings.mode,
        node_ips,
        nodeport_addresses,
        cluster_cidrs,
        pod_interfaces,
        masquerade_all: settings.masquerade_all,
        min_sync_period: settings.min_sync_period,
        ..kernel_config(options, node_name)?
    })
}

/// Where this node's things are in places of the kernel that nodes share.
pub fn kernel_config(options: &Run, node_name: &str) -> Result<Config> {
    // Several agents of one kernel (a lab's nodes) must not meet in names that the kernel shares.
    let instance = node_name.to_owned();
    Ok(Config {
        node_name: instance.clone(),
        cgroup2_path: cgroup2()?.join(options.cgroup_root.trim_start_matches('/')),
        pin_dir: Path::new("/sys/fs/bpf/outrigger").join(&instance),
        instance,
        ..Config::default()
    })
}

async fn own_node(watch: &Watch, name: &str) -> Option<Arc<Node>> {
    let deadline = Instant::now() + NODE_PATIENCE;
    loop {
        let node = watch.nodes.get(&Key::new("", name)).filter(|node| !addresses(node).is_empty());
        if node.is_some() || Instant::now() > deadline {
            return node;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The first internal address of each family, else the first external one, the Node's own order kept.
fn addresses(node: &Node) -> Vec<IpAddr> {
    let listed = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let of_kind = |kind: &str| -> Vec<IpAddr> {
        listed.clone().filter(|address| address.type_ == kind).filter_map(|address| address.address.parse().ok()).collect()
    };
    let mut found: Vec<IpAddr> = Vec::new();
    for ip in of_kind("InternalIP").into_iter().chain(of_kind("ExternalIP")) {
        if !found.iter().any(|known| known.is_ipv4() == ip.is_ipv4()) {
            found.push(ip);
        }
    }
    found
}

fn pod_cidrs(node: &Node) -> Vec<IpNet> {
    let spec = node.spec.as_ref();
    let all = spec.and_then(|spec| spec.pod_cidrs.clone()).or_else(|| spec?.pod_cidr.clone().map(|one| vec![one]));
    all.unwrap_or_default().iter().filter_map(|text| text.parse().ok()).collect()
}

/// Where cgroup v2 is mounted: alone, or beside v1.
fn cgroup2() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let path = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| fields.get(2) == Some(&"cgroup2"));
    // Without one the probe says so and takes another mode.
    Ok(path.map_or_else(|| "/sys/fs/cgroup".into(), |fields| fields[1].into()))
}

/// Settings of the process and of connection tracking. What the kernel refuses is told: Services work all the same.
fn tune(settings: &Settings) {
    for word in &settings.words {
        warn!("{word}");
    }
    let score = settings.oom_score_adj.map(|score| (PathBuf::from("/proc/self/oom_score_adj"), score.to_string()));
    for (path, value) in score.into_iter().chain(sysctls(&settings.conntrack, cpus())) {
        if let Err(error) = fs::write(&path, &value) {
            warn!(path = %path.display(), value, %error, "not set");
        }
    }
}

fn cpus() -> u32 {
    std::thread::available_parallelism().ok().and_then(|cpus| u32::try_from(cpus.get()).ok()).unwrap_or(1)
}

fn sysctls(conntrack: &Conntrack, cpus: u32) -> Vec<(PathBuf, String)> {
    let seconds = |time: Option<Duration>| time.filter(|time| !time.is_zero()).map(|time| time.as_secs().to_string());
    let max = conntrack.max_per_core.filter(|per_core| *per_core > 0);
    let all = [
        ("max", max.map(|per_core| per_core.saturating_mul(cpus).max(conntrack.min.unwrap_or(0)).to_string())),
        ("tcp_timeout_established", seconds(conntrack.tcp_established)),
        ("tcp_timeout_close_wait", seconds(conntrack.tcp_close_wait)),
        ("tcp_be_liberal", conntrack.tcp_be_liberal.then(|| "1".to_owned())),
        ("udp_timeout", seconds(conntrack.udp)),
        ("udp_timeout_stream", seconds(conntrack.udp_stream)),
    ];
    let path = |name: &str| PathBuf::from(format!("/proc/sys/net/netfilter/nf_conntrack_{name}"));
    all.into_iter().filter_map(|(name, value)| Some((path(name), value?))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_nodes_address_is_its_first_internal_one_of_each_family() {
        let address = |kind: &str, ip: &str| json!({"type": kind, "address": ip});
        let all = [
            address("Hostname", "node-1"),
            address("ExternalIP", "1.2.3.4"),
            address("InternalIP", "10.0.0.5"),
            address("InternalIP", "10.0.0.6"),
            address("ExternalIP", "2001:db8::1"),
        ];
        let node: Node = serde_json::from_value(json!({"metadata": {"name": "node-1"}, "status": {"addresses": all}})).unwrap();
        assert_eq!(addresses(&node), ["10.0.0.5".parse::<IpAddr>().unwrap(), "2001:db8::1".parse().unwrap()]);
    }

    #[test]
    fn conntrack_limits_follow_the_cores() {
        let conntrack = Conntrack { max_per_core: Some(1000), min: Some(5000), udp: Some(Duration::from_secs(7)), ..Conntrack::default() };
        let texts = |cpus| sysctls(&conntrack, cpus).into_iter().map(|(_, value)| value).collect::<Vec<_>>();
        assert_eq!(texts(2), ["5000", "7"]);
        assert_eq!(texts(8), ["8000", "7"]);
        assert!(sysctls(&Conntrack { max_per_core: Some(0), min: Some(9), ..Conntrack::default() }, 2).is_empty());
    }
}
