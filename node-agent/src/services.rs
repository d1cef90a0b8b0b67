//! Watched objects on their way to the Service path.
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use outrigger_cluster::watch::Watch;
use outrigger_cluster::{Delta, Object, Subscription};
use outrigger_dataplane::{Config, Proxy, ProxyHandle};
use outrigger_desired::{Change, Watched};
use tokio::sync::mpsc;

use crate::config::Run;

/// Starts the Service path on what `watch` sees.
pub async fn start(options: &Run, watch: &Watch) -> Result<ProxyHandle> {
    let (sender, changes) = mpsc::unbounded_channel();
    forward(watch.services.subscribe(), sender.clone(), Change::Service);
    forward(watch.endpoint_slices.subscribe(), sender.clone(), Change::EndpointSlice);
    forward(watch.nodes.subscribe(), sender.clone(), Change::Node);
    forward(watch.pods.subscribe(), sender, Change::Pod);
    Proxy::start(config(options)?, changes).await.context("start the Service path")
}

fn config(options: &Run) -> Result<Config> {
    // Several agents of one kernel (a lab's nodes) must not meet in names that the kernel shares.
    let instance = options.node_name.clone();
    Ok(Config {
        mode: options.proxy_mode,
        node_name: options.node_name.clone(),
        node_ips: options.node_ip.clone(),
        nodeport_addresses: options.nodeport_addresses.clone(),
        cluster_cidrs: options.cluster_cidr.clone(),
        cgroup2_path: cgroup2()?.join(options.cgroup_root.trim_start_matches('/')),
        pin_dir: Path::new("/sys/fs/bpf/outrigger").join(&instance),
        instance,
    })
}

/// Where cgroup v2 is mounted: alone, or beside v1.
fn cgroup2() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let path = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| fields.get(2) == Some(&"cgroup2"));
    // Without one the probe says so and takes another mode.
    Ok(path.map_or_else(|| "/sys/fs/cgroup".into(), |fields| fields[1].into()))
}

fn forward<K: Object>(mut from: Subscription<K>, to: mpsc::UnboundedSender<Change>, wrap: fn(Watched<K>) -> Change) {
    tokio::spawn(async move {
        while let Some(delta) = from.recv().await {
            let watched = match delta {
                Delta::Replaced(all) => Watched::Replaced(all),
                Delta::Applied(object) => Watched::Applied(object),
                Delta::Deleted(object) => Watched::Deleted(object),
            };
            if to.send(wrap(watched)).is_err() {
                return;
            }
        }
    });
}
