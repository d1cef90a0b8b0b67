//! Start and stop of the agent's parts.
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use outrigger_cluster::Lookup;
use outrigger_cluster::access::Reviews;
use outrigger_cluster::status::Writer;
use outrigger_cluster::watch::Watch;
use outrigger_dataplane::ProxyHandle;
use outrigger_kubelet::Kubelet;
use outrigger_network::Network;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::config::Run;
use crate::services;

/// Where the chosen proxy mode is told, for users and tests.
const MODE_ANNOTATION: &str = "outrigger.dev/proxy-mode";
const REASON_ANNOTATION: &str = "outrigger.dev/proxy-mode-reason";

pub async fn run(options: Run) -> Result<()> {
    std::fs::create_dir_all(&options.data_dir).with_context(|| format!("create {}", options.data_dir.display()))?;
    let config = api_config(&options).await?;
    let client_cas = config.root_cert.clone().unwrap_or_default();
    let client = Client::try_from(config).context("make the API client")?;
    let (watch, _tasks) = Watch::start(&client, &options.node_name);
    let writer = Writer::new(client.clone(), &options.node_name);
    let network = Network::start(network(&options), &watch);
    let proxy = services::start(&options, &watch).await?;
    tokio::spawn(tell_mode(proxy.clone(), writer.clone()));
    let lookup = Lookup::new(client.clone());
    let kubelet = Kubelet::start(kubelet(&options), watch.clone(), writer, lookup).await.context("start the kubelet")?;
    let _api =
        outrigger_kubelet::server::start(server(&options, client_cas), kubelet, Reviews::new(client), move || network.dns().metrics())
            .context("serve the kubelet API")?;

    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // Pods, connections and kernel state stay: the next agent takes them over.
    info!("stopping");
    Ok(())
}

async fn api_config(options: &Run) -> Result<kube::Config> {
    let read = || format!("read {}", options.kubeconfig.display());
    let file = Kubeconfig::read_from(&options.kubeconfig).with_context(read)?;
    kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.with_context(read)
}

/// The kubelet API trusts the CA that signed the API server: it signs the API server's client certificate too.
fn server(options: &Run, client_cas: Vec<Vec<u8>>) -> outrigger_kubelet::server::Config {
    outrigger_kubelet::server::Config {
        node_name: options.node_name.clone(),
        address: Ipv4Addr::UNSPECIFIED.into(),
        port: options.port,
        node_ips: options.node_ip.clone(),
        data_dir: options.data_dir.clone(),
        client_cas,
        log_dir: "/var/log".into(),
    }
}

fn network(options: &Run) -> outrigger_network::Config {
    outrigger_network::Config {
        node_name: options.node_name.clone(),
        node_ips: options.node_ip.clone(),
        data_dir: options.data_dir.clone(),
        cni_conf_dir: options.cni_conf_dir.clone(),
        cni_bin_dir: options.cni_bin_dir.clone(),
        cluster_cidrs: options.cluster_cidr.clone(),
        cluster_dns: options.cluster_dns.clone(),
        cluster_domain: options.cluster_domain.clone(),
        resolv_conf: options.resolv_conf.clone(),
    }
}

fn kubelet(options: &Run) -> outrigger_kubelet::Config {
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
        ..outrigger_kubelet::Config::new(&options.node_name, first, &options.data_dir, &options.container_runtime_endpoint)
    }
}

/// Writes the proxy mode and its reason to the Node, again whenever it changes.
async fn tell_mode(proxy: ProxyHandle, writer: Writer) {
    let mut told = None;
    let mut pause = Duration::from_millis(200);
    loop {
        let choice = proxy.choice();
        if told.as_ref() != Some(&choice) {
            let annotations = serde_json::json!({MODE_ANNOTATION: choice.mode.to_string(), REASON_ANNOTATION: choice.reason});
            match writer.patch_node(&serde_json::json!({"metadata": {"annotations": annotations}})).await {
                Ok(_) => told = Some(choice),
                // The kubelet registers the Node in its own time.
                Err(error) if error.code() == Some(404) => {}
                Err(error) => warn!(%error, "the proxy mode is not on the Node yet"),
            }
        } else {
            pause = Duration::from_secs(5);
        }
        tokio::time::sleep(pause).await;
    }
}
