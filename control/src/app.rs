//! Start and stop of the control plane's parts.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::FromRawFd;
use std::path::Path;

use anyhow::Context;
use outrigger_access::kubeconfig::Kubeconfig;
use outrigger_access::pki::{CertRequest, Pki, PkiConfig, issue_from};
use outrigger_apiserver::{ApiServer, Config};
use outrigger_store::embedded::{self, EmbeddedConfig};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::config;

pub async fn run(options: config::Run) -> anyhow::Result<()> {
    let pki = open_pki(&options)?;
    let advertise = advertise_address(&options);
    let server = format!("https://{}", SocketAddr::new(advertise, options.secure_port));
    let admin = Kubeconfig { cluster: "outrigger", server: &server, ca_pem: pki.ca_pem(), user: "kubernetes-admin", identity: pki.admin() };
    admin.write(&options.data_dir.join("admin.kubeconfig"))?;
    let store = embedded::open(EmbeddedConfig::new(options.data_dir.join("store.redb"))).context("opening the store")?;
    let config = Config::new(pki, options.service_cluster_ip_range.clone(), advertise, options.secure_port);
    let listeners = listeners(&options).await?;
    let api = ApiServer::start(config, store.clone()).await.context("starting the API server")?;
    let (stop_loops, loops_stop) = tokio::sync::watch::channel(false);
    let mut loops = crate::loops::start(&api, &options, loops_stop);
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let serving = api.serve(listeners);
    tokio::pin!(serving);
    tokio::select! {
        outcome = &mut serving => return outcome.context("serving"),
        outcome = &mut loops => {
            outcome.context("the controllers and the scheduler")?;
            anyhow::bail!("the controllers and the scheduler have ended");
        }
        // What was acknowledged is on the disk; whoever started this process starts it again.
        error = store.failure() => return Err(error).context("the store has failed"),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    stop_loops.send_replace(true);
    loops.await.context("stopping the controllers")?;
    api.shutdown();
    serving.await.context("serving")
}

/// The address in the `kubernetes` Service's endpoints and in the admin's kubeconfig.
fn advertise_address(options: &config::Run) -> IpAddr {
    if let Some(address) = options.advertise_address {
        return address;
    }
    if !options.bind_address.is_unspecified() {
        return options.bind_address;
    }
    let from_names = options.tls_san.iter().find_map(|name| name.parse::<IpAddr>().ok());
    from_names.unwrap_or(IpAddr::from([127, 0, 0, 1]))
}

fn open_pki(options: &config::Run) -> anyhow::Result<Pki> {
    std::fs::create_dir_all(&options.data_dir).with_context(|| format!("creating {}", options.data_dir.display()))?;
    let range = options.service_cluster_ip_range.first().context("--service-cluster-ip-range is empty")?;
    let mut sans = options.tls_san.clone();
    sans.extend(["localhost".to_string(), "127.0.0.1".into(), "::1".into(), advertise_address(options).to_string()]);
    if !options.bind_address.is_unspecified() {
        sans.push(options.bind_address.to_string());
    }
    let service_ip = range.hosts().next().context("--service-cluster-ip-range has no addresses")?;
    Ok(Pki::open(pki_config(&options.data_dir, service_ip, &options.cluster_domain, sans))?)
}

fn pki_config(data_dir: &Path, service_ip: IpAddr, cluster_domain: &str, sans: Vec<String>) -> PkiConfig {
    PkiConfig { dir: data_dir.join("pki"), service_ip, cluster_domain: cluster_domain.into(), sans }
}

/// The socket of the command line, and those that the starter has bound (LISTEN_FDS, from descriptor 3 on).
async fn listeners(options: &config::Run) -> anyhow::Result<Vec<TcpListener>> {
    let mut all = Vec::new();
    let passed = std::env::var("LISTEN_FDS").ok().and_then(|n| n.parse::<i32>().ok()).unwrap_or(0);
    let for_us = std::env::var("LISTEN_PID").ok().is_none_or(|pid| pid == std::process::id().to_string());
    if for_us {
        for fd in 3..3 + passed {
            // SAFETY: the starter hands over these descriptors by the LISTEN_FDS protocol; nothing else in this process owns them.
            let listener = unsafe { std::net::TcpListener::from_raw_fd(fd) };
            listener.set_nonblocking(true).with_context(|| format!("descriptor {fd} of LISTEN_FDS"))?;
            all.push(TcpListener::from_std(listener)?);
        }
    }
    if options.secure_port != 0 {
        let address = SocketAddr::new(options.bind_address, options.secure_port);
        all.push(TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?);
    }
    Ok(all)
}

pub fn kubeconfig(options: config::Kubeconfig) -> anyhow::Result<()> {
    let request = CertRequest::client(&options.user, options.group.clone());
    let (ca_pem, identity) = issue_from(&options.data_dir.join("pki"), &request)?;
    let file = Kubeconfig { cluster: "outrigger", server: &options.server, ca_pem: &ca_pem, user: &options.user, identity: &identity };
    file.write(&options.output)?;
    Ok(())
}
