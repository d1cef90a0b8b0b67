//! The loop: what is watched and what the CNI plugin has attached, brought to the kernel.
use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger_dataplane::policy::{Applied, Dropped, Enforcer};
use outrigger_dataplane::{BackendError, Mode};
use outrigger_desired::policy::{Change, LocalPod, Policies};
use outrigger_desired::{ServiceName, Watched};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::Health;
use super::metrics::Metrics;

/// The longest pause between attempts after a failed apply.
const MAX_RETRY: Duration = Duration::from_secs(30);
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// How often the store, the node's addresses and the counters are looked at without being asked to.
const RECHECK: Duration = Duration::from_secs(10);
/// How long a new attachment waits for its pod to be seen. The kubelet has it from the API, so it is on its way here too;
/// without (a static pod whose mirror isn't made yet) it starts isolated.
const ACQUAINTANCE: Duration = Duration::from_secs(2);

pub type Open = Box<dyn Fn(Mode) -> Result<Box<dyn Enforcer>, BackendError> + Send>;

pub enum Request {
    /// The plugin's store has changed.
    Reread,
    /// It has a new attachment, whose pod must not be reachable before its policies are in the kernel.
    Admit { key: String, reply: oneshot::Sender<Result<(), String>> },
}

struct Waiting {
    key: String,
    since: Instant,
    reply: oneshot::Sender<Result<(), String>>,
}

/// The kinds whose first list hasn't come yet. Nothing is written before all have: what a former agent left goes on.
struct Awaited {
    policies: bool,
    namespaces: bool,
    pods: bool,
}

pub struct Keeper {
    /// `None` when it was lost, or is to be another one: it is opened again.
    enforcer: Option<Box<dyn Enforcer>>,
    open: Open,
    data_dir: PathBuf,
    node_ips: Vec<IpAddr>,
    policies: Policies,
    awaited: Awaited,
    /// Whose each attachment is.
    pods: HashMap<Arc<str>, ServiceName>,
    /// The node's own addresses.
    node: Vec<IpAddr>,
    /// The kernel has to be written to, whether or not the table is different.
    due: bool,
    waiting: Vec<Waiting>,
    retry: Duration,
    health: watch::Sender<Health>,
    metrics: Arc<Mutex<Metrics>>,
}

impl Keeper {
    pub fn new(
        enforcer: Box<dyn Enforcer>,
        open: Open,
        data_dir: PathBuf,
        node_ips: Vec<IpAddr>,
        health: watch::Sender<Health>,
        metrics: Arc<Mutex<Metrics>>,
    ) -> Self {
        Self {
            enforcer: Some(enforcer),
            open,
            data_dir,
            node_ips,
            policies: Policies::default(),
            awaited: Awaited { policies: true, namespaces: true, pods: true },
            pods: HashMap::new(),
            node: Vec::new(),
            due: true,
            waiting: Vec::new(),
            retry: FIRST_RETRY,
            health,
            metrics,
        }
    }

    pub async fn run(
        mut self,
        mut changes: mpsc::UnboundedReceiver<Change>,
        mut requests: mpsc::UnboundedReceiver<Request>,
        mut modes: watch::Receiver<Mode>,
    ) {
        self.look_around().await;
        let mut wake = Instant::now() + RECHECK;
        loop {
            tokio::select! {
                Some(change) = changes.recv() => {
                    self.take(&change);
                    // What piled up during the last apply goes in one step; a lone change goes at once.
                    while let Ok(change) = changes.try_recv() {
                        self.take(&change);
                    }
                }
                request = requests.recv() => {
                    let Some(request) = request else { return };
                    self.hear(request);
                    while let Ok(request) = requests.try_recv() {
                        self.hear(request);
                    }
                    self.read_attachments();
                }
                Ok(()) = modes.changed() => {
                    // Opening finds out which enforcer goes with it, and takes over what is in the kernel.
                    modes.mark_unchanged();
                    self.enforcer = None;
                    self.due = true;
                }
                () = tokio::time::sleep_until(wake) => self.look_around().await,
            }
            let services = *modes.borrow();
            wake = self.sync(services).await;
        }
    }

    fn take(&mut self, change: &Change) {
        match change {
            Change::Policy(Watched::Replaced(_)) => self.awaited.policies = false,
            Change::Namespace(Watched::Replaced(_)) => self.awaited.namespaces = false,
            Change::Pod(Watched::Replaced(_)) => self.awaited.pods = false,
            _ => {}
        }
        self.policies.apply(change);
    }

    fn hear(&mut self, request: Request) {
        if let Request::Admit { key, reply } = request {
            self.waiting.push(Waiting { key, since: Instant::now(), reply });
            // Its interface is new, even where one of the same name was known.
            self.due = true;
        }
    }

    async fn look_around(&mut self) {
        self.read_attachments();
        let mut node = self.node_ips.clone();
        node.extend(own_addresses());
        node.sort();
        node.dedup();
        self.due |= node != self.node;
        self.node = node;
        if let Ok(Ok(dropped)) = self.with_enforcer(|enforcer| enforcer.dropped()).await {
            let of_pod = |(key, dropped): (Arc<str>, Dropped)| Some((self.pods.get(&key)?.clone(), dropped));
            let dropped = dropped.into_iter().filter_map(of_pod).collect();
            self.metrics(|metrics| metrics.dropped = dropped);
        }
    }

    /// A store that can't be read leaves what is known; the next look may succeed.
    fn read_attachments(&mut self) {
        let all = match outrigger_network::attachments(&self.data_dir) {
            Ok(all) => all,
            Err(error) => return warn!(%error, "can't read which pods have a network here"),
        };
        let local = |one: outrigger_network::Attachment| LocalPod {
            sandbox: one.key.into(),
            pod: one.pod.and_then(|pod| pod.split_once('/').map(|(namespace, name)| ServiceName::new(namespace, name))),
            addresses: one.addresses,
            interface: one.host_interface,
        };
        let local: Vec<LocalPod> = all.into_iter().map(local).collect();
        self.pods = local.iter().filter_map(|one| Some((one.sandbox.clone(), one.pod.clone()?))).collect();
        self.policies.apply(&Change::Local(local));
    }

    /// Brings the kernel up to date; says when to come back.
    async fn sync(&mut self, services: Mode) -> Instant {
        let recheck = Instant::now() + RECHECK;
        self.waiting.retain(|waiting| !waiting.reply.is_closed());
        if self.awaited.policies || self.awaited.namespaces || self.awaited.pods {
            return recheck;
        }
        self.due |= self.policies.update();
        if !self.due {
            return self.answer(&[]).unwrap_or(recheck);
        }
        let since = Instant::now();
        match self.apply(services).await {
            Ok(applied) => {
                let absent = applied.absent.clone();
                self.report(applied, since.elapsed());
                self.answer(&absent).unwrap_or(recheck)
            }
            Err(message) => {
                error!(error = message, retry_in = ?self.retry, "NetworkPolicies not applied");
                self.waiting.drain(..).for_each(|waiting| _ = waiting.reply.send(Err(message.clone())));
                self.health.send_modify(|health| health.error = Some(message));
                self.metrics(|metrics| metrics.failures += 1);
                let at = Instant::now() + self.retry;
                self.retry = (self.retry * 2).min(MAX_RETRY);
                at
            }
        }
    }

    async fn apply(&mut self, services: Mode) -> Result<Applied, String> {
        if self.enforcer.is_none() {
            let enforcer = (self.open)(services).map_err(|error| error.to_string())?;
            info!(by = enforcer.name(), "NetworkPolicies are enforced");
            self.enforcer = Some(enforcer);
        }
        let (table, node) = (self.policies.table().clone(), self.node.clone());
        let applied = self.with_enforcer(move |enforcer| (enforcer.name(), enforcer.apply(&table, &node))).await?;
        self.metrics(|metrics| metrics.enforcer = applied.0);
        applied.1.map_err(|error| error.to_string())
    }

    /// The kernel takes its time, on a thread that may wait for it.
    async fn with_enforcer<T: Send + 'static>(&mut self, work: impl FnOnce(&mut dyn Enforcer) -> T + Send + 'static) -> Result<T, String> {
        let mut enforcer = self.enforcer.take().ok_or("nothing enforces network policies")?;
        let done = tokio::task::spawn_blocking(move || {
            let result = work(&mut *enforcer);
            (enforcer, result)
        });
        let (enforcer, result) = done.await.map_err(|error| error.to_string())?;
        self.enforcer = Some(enforcer);
        Ok(result)
    }

    fn report(&mut self, applied: Applied, took: Duration) {
        debug!(isolated = applied.pods, rules = applied.rules, pods = self.policies.table().pods.len(), ?took, "NetworkPolicies applied");
        self.due = false;
        self.retry = FIRST_RETRY;
        self.health.send_replace(Health { synced: true, error: None });
        self.metrics(|metrics| {
            metrics.applies += 1;
            metrics.took += took;
            metrics.last = applied;
        });
    }

    /// Lets those in whose policies are in the kernel; says when to look at the others again.
    fn answer(&mut self, absent: &[Arc<str>]) -> Option<Instant> {
        let mut later = Vec::new();
        for waiting in std::mem::take(&mut self.waiting) {
            let key = waiting.key.as_str();
            let is_known = self.policies.knows(key);
            if absent.iter().any(|sandbox| &**sandbox == key) || !self.policies.table().pods.contains_key(key) {
                let _ = waiting.reply.send(Err(format!("there is no interface of {key} on this node")));
            } else if is_known || waiting.since.elapsed() >= ACQUAINTANCE {
                if !is_known {
                    info!(attachment = key, "a pod starts isolated: the API hasn't told of it yet");
                }
                let _ = waiting.reply.send(Ok(()));
            } else {
                later.push(waiting);
            }
        }
        self.waiting = later;
        self.waiting.iter().map(|waiting| waiting.since + ACQUAINTANCE).min()
    }

    fn metrics(&self, change: impl FnOnce(&mut Metrics)) {
        change(&mut self.metrics.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }
}

/// All of this network namespace's addresses but loopback's: the node answers pods at each, its DNS included.
fn own_addresses() -> impl Iterator<Item = IpAddr> {
    outrigger_dataplane::Config::default().surroundings().node_ips.into_iter().filter(|ip| !ip.is_loopback())
}
