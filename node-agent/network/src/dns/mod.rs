//! The cluster's DNS on every node: names come from the agent's own mirrors, so a lookup never leaves the node, and a
//! change is answered as soon as the agent knows it.
pub mod answer;
pub mod metrics;
pub mod records;
pub mod server;
pub mod upstream;

#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use ipnet::IpNet;
use outrigger_cluster::watch::Watch;
use rtnetlink::packet_route::address::AddressScope;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::cni::attach;
use answer::Zone;
use metrics::Metrics;
use records::Records;
use upstream::Upstream;

const PORT: u16 = 53;
const RETRY: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct Config {
    /// Where to answer; each is added to the loopback device.
    pub addresses: Vec<IpAddr>,
    pub domain: String,
    pub resolv_conf: PathBuf,
}

impl Config {
    pub fn of(config: &crate::Config) -> Self {
        Self { addresses: config.cluster_dns.clone(), domain: config.cluster_domain.clone(), resolv_conf: config.resolv_conf.clone() }
    }
}

/// What the sockets' tasks share.
pub struct Shared {
    pub(crate) zone: Zone,
    pub(crate) records: RwLock<Records>,
    pub(crate) synced: AtomicBool,
    pub(crate) upstream: Upstream,
    pub(crate) waiting: Semaphore,
    pub(crate) metrics: Metrics,
}

impl Shared {
    fn new(zone: Zone, upstream: Upstream) -> Self {
        Self {
            zone,
            records: RwLock::default(),
            synced: AtomicBool::new(false),
            upstream,
            waiting: Semaphore::new(server::MAX_WAITING),
            metrics: Metrics::default(),
        }
    }
}

/// The running server; none of its parts run when no address was configured.
pub struct Dns {
    shared: Option<Arc<Shared>>,
}

impl Dns {
    pub fn start(config: Config, watch: &Watch) -> (Self, Vec<JoinHandle<()>>) {
        let zone = match Zone::new(&config.domain, config.addresses.clone()) {
            Ok(zone) if !config.addresses.is_empty() => zone,
            Ok(_) => return (Self { shared: None }, Vec::new()),
            Err(error) => {
                warn!(domain = config.domain, %error, "no DNS on this node: the cluster domain is no name");
                return (Self { shared: None }, Vec::new());
            }
        };
        let upstream = Upstream::new(config.resolv_conf, config.addresses.clone());
        let shared = Arc::new(Shared::new(zone, upstream));
        let mut tasks = vec![tokio::spawn(follow(watch.clone(), shared.clone()))];
        tasks.extend(config.addresses.into_iter().map(|address| tokio::spawn(listen(address, shared.clone()))));
        (Self { shared: Some(shared) }, tasks)
    }

    /// The counters in Prometheus' text format.
    pub fn metrics(&self) -> String {
        self.shared.as_ref().map(|shared| shared.metrics.render()).unwrap_or_default()
    }

    /// Whether names can be asked for, to be asked again and again.
    pub fn reading(&self) -> impl Fn() -> Result<(), String> + Send + Sync + use<> {
        let shared = self.shared.clone();
        move || match &shared {
            None => Err("no address to answer at was given".to_owned()),
            Some(shared) if !shared.synced.load(Ordering::Acquire) => Err("the cluster's names are not known yet".to_owned()),
            Some(_) => Ok(()),
        }
    }
}

/// Keeps the records equal to the mirrors.
async fn follow(watch: Watch, shared: Arc<Shared>) {
    let (mut services, mut slices) = (watch.services.subscribe(), watch.endpoint_slices.subscribe());
    let (mut has_services, mut has_slices) = (false, false);
    loop {
        tokio::select! {
            delta = services.recv() => {
                let Some(delta) = delta else { return };
                let mut records = shared.records.write().unwrap_or_else(std::sync::PoisonError::into_inner);
                records.take_service(&delta);
                has_services = true;
            }
            delta = slices.recv() => {
                let Some(delta) = delta else { return };
                let mut records = shared.records.write().unwrap_or_else(std::sync::PoisonError::into_inner);
                records.take_slice(&delta);
                has_slices = true;
            }
        }
        if has_services && has_slices && !shared.synced.swap(true, Ordering::AcqRel) {
            info!("cluster names are known");
        }
    }
}

/// Serves one address for ever; an older agent that still holds the port is waited for.
async fn listen(address: IpAddr, shared: Arc<Shared>) {
    let mut complained = false;
    loop {
        match serve(address, &shared).await {
            Ok(()) => return,
            Err(error) if complained => tracing::debug!(%address, %error, "DNS still not served"),
            Err(error) => {
                warn!(%address, %error, "DNS isn't served; trying again");
                complained = true;
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn serve(address: IpAddr, shared: &Arc<Shared>) -> std::io::Result<()> {
    add_to_loopback(address).await.map_err(std::io::Error::other)?;
    let (udp, tcp) = server::bind(address, PORT).await?;
    info!(%address, "DNS served");
    tokio::try_join!(server::serve_udp(Arc::new(udp), shared.clone()), server::serve_tcp(tcp, shared.clone()))?;
    Ok(())
}

/// With host scope: the kernel must never choose it as the source of the node's own packets.
async fn add_to_loopback(address: IpAddr) -> crate::cni::message::Result<()> {
    let handle = attach::netlink()?;
    let index = attach::link_index(&handle, "lo").await?.unwrap_or(1);
    let mut request = handle.address().add(index, address, IpNet::from(address).prefix_len()).replace();
    request.message_mut().header.scope = AddressScope::Host;
    request.execute().await.map_err(|error| crate::cni::message::Error::kernel(format!("add {address} to lo"), attach::text(error)))
}
