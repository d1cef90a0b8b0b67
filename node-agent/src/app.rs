//! Start and stop of the agent's parts.
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use outrigger_cluster::Lookup;
use outrigger_cluster::access::Reviews;
use outrigger_cluster::status::Writer;
use outrigger_cluster::watch::{Extent, Watch};
use outrigger_dataplane::ProxyHandle;
use outrigger_kubelet::Kubelet;
use outrigger_network::dns::Dns;
use outrigger_network::{Network, Readiness};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::config::Run;
use crate::local;
use crate::policy::Policing;
use crate::proxy;
use crate::proxy::settings::Settings;
use crate::roles::{Health, Role, Roles};

/// Where the chosen proxy mode is told, for users and tests.
const MODE_ANNOTATION: &str = "outrigger.dev/proxy-mode";
const REASON_ANNOTATION: &str = "outrigger.dev/proxy-mode-reason";
const RETRY: Duration = Duration::from_millis(500);

pub async fn run(options: Run) -> Result<()> {
    options.check()?;
    let roles = Roles::new(&options.roles);
    let settings = Settings::resolve(&options.proxy)?;
    let node_name = options.node_name(settings.hostname_override.as_deref())?;
    if options.proxy.cleanup {
        return proxy::cleanup(&options, &node_name).await;
    }
    std::fs::create_dir_all(&options.data_dir).with_context(|| format!("create {}", options.data_dir.display()))?;
    let config = api_config(&options, settings.kubeconfig.as_ref()).await?;
    let client_cas = config.root_cert.clone().unwrap_or_default();
    let client = Client::try_from(config).context("make the API client")?;
    let (watch, _tasks) = Watch::start(&client, &node_name, extent(&roles));
    let writer = Writer::new(client.clone(), &node_name);
    let parts = Health::default();
    let mut proxy = None;
    if roles.has(Role::Proxy) {
        let running = proxy::start(&options, &node_name, settings, &roles, &watch, &parts).await?;
        tokio::spawn(tell_mode(running.clone(), writer.clone()));
        proxy = Some(running);
    }
    let policing = if roles.has(Role::Network) {
        let kernel = proxy::kernel_config(&options, &node_name)?;
        Some(Policing::start(&options, kernel, &watch, &client, proxy.as_ref()))
    } else {
        None
    };
    let sources = local::Sources { parts: parts.clone(), proxy, policing: policing.clone(), watch: watch.clone() };
    local::serve(&local::path(&options.data_dir), sources)?;
    // The plugin that it installs asks at the socket.
    let network = start_network(&options, &node_name, &roles, &watch, &parts, policing.clone());
    if roles.has(Role::Kubelet) {
        let lookup = Lookup::new(client.clone());
        let kubelet = Kubelet::start(kubelet(&options, &node_name), watch.clone(), writer, lookup).await.context("start the kubelet")?;
        let running = kubelet.clone();
        parts.watch(Role::Kubelet, move || if running.is_running() { Ok(()) } else { Err("a part of it has ended".into()) });
        let more_metrics = move || {
            let names = network.dns().map(Dns::metrics).unwrap_or_default();
            names + &policing.as_ref().map(Policing::metrics).unwrap_or_default()
        };
        outrigger_kubelet::server::start(server(&options, &node_name, client_cas), kubelet, Reviews::new(client), more_metrics)
            .context("serve the kubelet API")?;
    }

    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // Pods, connections and kernel state stay: the next agent takes them over.
    info!("stopping");
    Ok(())
}

async fn api_config(options: &Run, from_file: Option<&PathBuf>) -> Result<kube::Config> {
    let mut config = match options.kubeconfig.as_ref().or(from_file) {
        Some(path) => {
            let read = || format!("read {}", path.display());
            let file = Kubeconfig::read_from(path).with_context(read)?;
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.with_context(read)?
        }
        None => kube::Config::incluster().context("there is no --kubeconfig, and this is no pod with a service account")?,
    };
    if let Some(master) = &options.master {
        config.cluster_url = master.parse().with_context(|| format!("--master {master:?}"))?;
    }
    Ok(config)
}

/// What the parts look at: a proxy alone may see, and needs, less than a whole node.
fn extent(roles: &Roles) -> Extent {
    Extent {
        pods: roles.has(Role::Kubelet) || roles.has(Role::Network),
        all_nodes: roles.has(Role::Network),
        all_services: !roles.only_proxy(),
        policies: roles.has(Role::Network),
    }
}

/// The running parts of pods' network.
enum PodNetwork {
    Whole(Box<Network>),
    Names(Dns),
    Elsewhere,
}

impl PodNetwork {
    fn dns(&self) -> Option<&Dns> {
        match self {
            Self::Whole(network) => Some(network.dns()),
            Self::Names(dns) => Some(dns),
            Self::Elsewhere => None,
        }
    }
}

fn start_network(options: &Run, node_name: &str, roles: &Roles, watch: &Watch, parts: &Health, policing: Option<Policing>) -> PodNetwork {
    let config = network(options, node_name, roles);
    let network = if roles.has(Role::Network) {
        let network = Network::start(config, watch);
        let readiness = network.readiness();
        parts.watch(Role::Network, move || match &*readiness.borrow() {
            Readiness::Ready => policing.as_ref().map_or(Ok(()), Policing::reading),
            Readiness::NotReady(reason) => Err(reason.clone()),
        });
        PodNetwork::Whole(Box::new(network))
    } else if roles.has(Role::Dns) {
        PodNetwork::Names(Dns::start(outrigger_network::dns::Config::of(&config), watch).0)
    } else {
        PodNetwork::Elsewhere
    };
    if roles.has(Role::Dns)
        && let Some(reading) = network.dns().map(Dns::reading)
    {
        parts.watch(Role::Dns, reading);
    }
    network
}

/// The kubelet API trusts the CA that signed the API server: it signs the API server's client certificate too.
fn server(options: &Run, node_name: &str, client_cas: Vec<Vec<u8>>) -> outrigger_kubelet::server::Config {
    outrigger_kubelet::server::Config {
        node_name: node_name.to_owned(),
        address: Ipv4Addr::UNSPECIFIED.into(),
        port: options.port,
        node_ips: options.node_ip.clone(),
        data_dir: options.data_dir.clone(),
        client_cas,
        log_dir: "/var/log".into(),
    }
}

fn network(options: &Run, node_name: &str, roles: &Roles) -> outrigger_network::Config {
    outrigger_network::Config {
        node_name: node_name.to_owned(),
        node_ips: options.node_ip.clone(),
        data_dir: options.data_dir.clone(),
        agent_socket: local::path(&options.data_dir),
        cni_conf_dir: options.cni_conf_dir.clone(),
        cni_bin_dir: options.cni_bin_dir.clone(),
        cluster_cidrs: options.proxy.cluster_cidr.clone(),
        // No address means no server.
        cluster_dns: if roles.has(Role::Dns) { options.cluster_dns.clone() } else { Vec::new() },
        cluster_domain: options.cluster_domain.clone(),
        resolv_conf: options.resolv_conf.clone(),
    }
}

fn kubelet(options: &Run, node_name: &str) -> outrigger_kubelet::Config {
    let first = options.node_ip[0];
    outrigger_kubelet::Config {
        node_ips: options.node_ip.clone(),
        cgroup_root: options.cgroup_root.clone(),
        cluster_dns: options.cluster_dns.clone(),
        cluster_domain: options.cluster_domain.clone(),
        resolv_conf: options.resolv_conf.clone(),
        static_pod_path: options.pod_manifest_path.clone(),
        port: options.port,
        max_pods: options.max_pods,
        eviction_hard: options.eviction_hard.clone().unwrap_or_default(),
        image_gc_high_percent: options.image_gc_high_threshold,
        ..outrigger_kubelet::Config::new(node_name, first, &options.data_dir, &options.container_runtime_endpoint)
    }
}

/// Writes the proxy mode and its reason to the Node, again whenever it changes.
async fn tell_mode(proxy: ProxyHandle, writer: Writer) {
    let mut choices = proxy.choices();
    loop {
        let choice = choices.borrow_and_update().clone();
        let annotations = serde_json::json!({MODE_ANNOTATION: choice.mode.to_string(), REASON_ANNOTATION: choice.reason});
        match writer.patch_node(&serde_json::json!({"metadata": {"annotations": annotations}})).await {
            Ok(_) => {
                if choices.changed().await.is_err() {
                    return;
                }
                continue;
            }
            // The kubelet registers the Node in its own time.
            Err(error) if error.code() == Some(404) => {}
            // kube-proxy's role lets it read Nodes only.
            Err(error) if error.code() == Some(403) => {
                info!("the proxy mode is not written to the Node: these credentials may not");
                return;
            }
            Err(error) => warn!(%error, "the proxy mode is not on the Node yet"),
        }
        tokio::time::sleep(RETRY).await;
    }
}
