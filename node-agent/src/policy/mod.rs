//! NetworkPolicies' place in the agent: watched objects on their way in, the question of the CNI plugin, health and metrics.
mod keeper;
mod metrics;

#[cfg(test)]
mod keeper_tests;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kube::Client;
use outrigger_cluster::peers::{self, PeerPod};
use outrigger_cluster::watch::Watch;
use outrigger_dataplane::metrics::Exposition;
use outrigger_dataplane::{Config, Mode, ProxyHandle, policy};
use outrigger_desired::policy::{Change, NamedPort, Pod};
use outrigger_desired::{Protocol, ServiceName};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use crate::config::Run;
use crate::forward::forward;
use keeper::{Keeper, Request};
use metrics::Metrics;

/// How long the plugin is kept waiting; it gives up by itself a little later, without knowing why.
const PATIENCE: Duration = Duration::from_secs(8);

/// Handle to the running enforcement.
#[derive(Clone)]
pub struct Policing {
    /// `None`: nothing here can enforce policies, for this reason.
    keeper: Result<mpsc::UnboundedSender<Request>, String>,
    health: watch::Receiver<Health>,
    metrics: Arc<Mutex<Metrics>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Everything has been listed and is in the kernel.
    pub synced: bool,
    /// The last failure, until an apply succeeds.
    pub error: Option<String>,
}

impl Policing {
    /// Starts to enforce what `watch` sees. Where the kernel has no way to, pods' traffic is left as it is.
    pub fn start(options: &Run, kernel: Config, watch: &Watch, client: &Client, proxy: Option<&ProxyHandle>) -> Self {
        let modes = modes(proxy);
        let first = *modes.borrow();
        let (health, is_healthy) = watch::channel(Health::default());
        let metrics = Arc::<Mutex<Metrics>>::default();
        let handle = |keeper| Self { keeper, health: is_healthy, metrics: metrics.clone() };
        let enforcer = match policy::open_beside(&kernel, first) {
            Ok(enforcer) => enforcer,
            Err(error) => {
                warn!(%error, "NetworkPolicies are not enforced on this node");
                return handle(Err(error.to_string()));
            }
        };
        info!(by = enforcer.name(), "NetworkPolicies are enforced");
        let (requests, inbox) = mpsc::unbounded_channel();
        let (sender, changes) = mpsc::unbounded_channel();
        forward(watch.network_policies.subscribe(), sender.clone(), Change::Policy);
        forward(watch.namespaces.subscribe(), sender.clone(), Change::Namespace);
        let (pods, _task) = peers::follow(client, peer);
        forward(pods, sender, Change::Pod);
        let open = Box::new(move |mode| policy::open_beside(&kernel, mode));
        let keeper = Keeper::new(enforcer, open, options.data_dir.clone(), options.node_ip.clone(), health, metrics.clone());
        tokio::spawn(keeper.run(changes, inbox, modes));
        handle(Ok(requests))
    }

    /// Resolves once the kernel carries the policies of an attachment's pod; the error says why the pod must not have its network yet.
    pub async fn admit(&self, key: String) -> Result<(), String> {
        let Ok(keeper) = &self.keeper else { return Ok(()) };
        let (reply, answer) = oneshot::channel();
        let stopped = || "the agent is stopping".to_owned();
        keeper.send(Request::Admit { key, reply }).map_err(|_| stopped())?;
        match tokio::time::timeout(PATIENCE, answer).await {
            Ok(answered) => answered.map_err(|_| stopped())?,
            Err(_) => Err(self.reading().err().unwrap_or_else(|| "the kernel takes too long to take network policies".to_owned())),
        }
    }

    /// Has the plugin's store read again.
    pub fn attachments_changed(&self) {
        if let Ok(keeper) = &self.keeper {
            // A loop that has ended needs no news.
            let _ = keeper.send(Request::Reread);
        }
    }

    /// Why no policy is enforced here, where that is so.
    pub fn off(&self) -> Option<&str> {
        self.keeper.as_ref().err().map(String::as_str)
    }

    /// Whether the kernel has what is watched.
    pub fn reading(&self) -> Result<(), String> {
        let health = self.health.borrow();
        match &health.error {
            _ if self.keeper.is_err() => Ok(()),
            Some(error) => Err(format!("network policies are not up to date: {error}")),
            None if !health.synced => Err("network policies have not been brought to the kernel yet".to_owned()),
            None => Ok(()),
        }
    }

    /// The counters in Prometheus' text format.
    pub fn metrics(&self) -> String {
        let mut out = Exposition::default();
        self.metrics.lock().unwrap_or_else(std::sync::PoisonError::into_inner).render(&mut out);
        out.0
    }
}

/// How Services are carried, as it changes. Somebody else's proxy translates behind the pods' interfaces, as nftables do.
fn modes(proxy: Option<&ProxyHandle>) -> watch::Receiver<Mode> {
    let (sender, modes) = watch::channel(proxy.map_or(Mode::Nftables, ProxyHandle::mode));
    if let Some(mut choices) = proxy.map(ProxyHandle::choices) {
        tokio::spawn(async move {
            while choices.changed().await.is_ok() {
                let mode = choices.borrow_and_update().mode;
                sender.send_if_modified(|known| std::mem::replace(known, mode) != mode);
            }
        });
    }
    modes
}

/// What policies ask of a pod.
fn peer(pod: PeerPod) -> Pod {
    let name = |text: &Option<String>| text.clone().unwrap_or_default();
    let named = |port: &k8s_openapi::api::core::v1::ContainerPort| {
        Some(NamedPort {
            name: port.name.as_deref().filter(|name| !name.is_empty())?.into(),
            protocol: Protocol::parse(port.protocol.as_deref())?,
            number: u16::try_from(port.container_port).ok()?,
        })
    };
    Pod {
        addresses: pod.addresses().filter_map(|ip| ip.parse().ok()).collect(),
        host_network: pod.spec.host_network == Some(true),
        over: matches!(pod.status.phase.as_deref(), Some("Succeeded" | "Failed")),
        ports: pod.ports().filter_map(named).collect(),
        name: ServiceName::new(&name(&pod.metadata.namespace), &name(&pod.metadata.name)),
        labels: pod.metadata.labels.unwrap_or_default(),
    }
}
