//! The kubelet: runs the pods bound to this node through the CRI.
//!
//! [`Kubelet::start`] registers the node and starts everything; the handle answers what the HTTP API needs to know.
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use outrigger_cluster::watch::Watch;
use outrigger_cluster::{Key, Lookup, Writer};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::info;

mod cgroup;
pub mod config;
pub mod cri;
mod downward;
pub mod eviction;
mod gc;
mod host;
mod images;
mod in_flight;
mod machine;
mod node;
mod pleg;
pub mod pod;
pub mod probe;
pub mod quantity;
mod registry;
mod runtime;
pub mod server;
mod static_pod;
mod volume;

pub use config::Config;
pub use machine::{KUBELET_VERSION, Machine};

use cri::{Cri, v1};
use host::Host;
use registry::Registry;

/// The kubelet couldn't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the container runtime at {endpoint} doesn't answer: {source}")]
    Runtime { endpoint: String, source: cri::Error },
    #[error("making {path}: {source}")]
    Folder { path: String, source: std::io::Error },
    #[error("making the cgroups below {root}: {source}")]
    Cgroups { root: String, source: std::io::Error },
}

/// No such container, or none that has the wanted state; the text is what `kubectl logs` and `exec` show.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    #[error("pod '{namespace}/{name}' not found")]
    NoPod { namespace: String, name: String },
    #[error("container {container} is not valid for pod {name}")]
    NoContainer { name: String, container: String },
    #[error("container \"{container}\" in pod \"{name}\" is waiting to start: {reason}")]
    Waiting { name: String, container: String, reason: String },
    #[error("previous terminated container \"{container}\" in pod \"{name}\" not found")]
    NoPrevious { name: String, container: String },
    #[error("{0}")]
    Runtime(String),
}

/// One container in the runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerRef {
    pub pod_uid: String,
    pub container_id: String,
    pub sandbox_id: String,
    pub log_path: String,
    pub running: bool,
}

/// A handle on the running kubelet; cheap to clone.
#[derive(Clone)]
pub struct Kubelet {
    host: Arc<Host>,
    registry: Arc<Registry>,
    synced: watch::Receiver<bool>,
    tasks: Arc<Vec<JoinHandle<()>>>,
}

impl Kubelet {
    /// Connects to the runtime, registers the node and starts to run its pods. Must be called inside a tokio runtime.
    pub async fn start(config: Config, watch: Watch, writer: Writer, lookup: Lookup) -> Result<Self, StartError> {
        let host = Arc::new(open(config, watch, writer, lookup).await?);
        let registry = Arc::new(Registry::default());
        let node = node::register(&host).await;
        let mut tasks = vec![
            tokio::spawn(node::keep_lease(host.clone(), node.metadata.uid.clone())),
            tokio::spawn(node::keep_status(host.clone(), node)),
        ];
        let static_pods = host.config.static_pod_path.clone().map(|dir| {
            let (sender, receiver) = watch::channel(None);
            tasks.push(tokio::spawn(static_pod::follow(dir, host.config.node_name.clone(), sender)));
            receiver
        });
        let (synced_sender, synced) = watch::channel(false);
        tasks.push(tokio::spawn(registry::run(host.clone(), registry.clone(), static_pods, synced_sender)));
        let woken = registry.clone();
        tasks.push(tokio::spawn(pleg::run(host.cri.clone(), Arc::new(move |uid: &str| woken.wake(uid)))));
        tasks.push(tokio::spawn(gc::rotate_logs(host.clone())));
        let (collector_host, collector_registry, mut sources) = (host.clone(), registry.clone(), synced.clone());
        tasks.push(tokio::spawn(async move {
            // Nothing is taken away before it's known what has to stay.
            if sources.wait_for(|synced| *synced).await.is_ok() {
                tokio::join!(
                    gc::run(collector_host.clone(), collector_registry.clone()),
                    eviction::run(collector_host, collector_registry)
                );
            }
        }));
        Ok(Self { host, registry, synced, tasks: Arc::new(tasks) })
    }

    pub fn config(&self) -> &Config {
        &self.host.config
    }

    pub fn cri(&self) -> &Cri {
        &self.host.cri
    }

    pub fn writer(&self) -> &Writer {
        &self.host.writer
    }

    pub fn machine(&self) -> &Machine {
        &self.host.machine
    }

    /// When the kubelet started.
    pub fn started(&self) -> Timestamp {
        self.host.started
    }

    /// This node as the API server has it.
    pub fn node(&self) -> Option<Arc<Node>> {
        self.host.watch.nodes.get(&Key::new("", &self.host.config.node_name))
    }

    /// All pods of the node, static ones included, each with the kubelet's own idea of its status.
    pub fn pods(&self) -> Vec<Pod> {
        self.registry.all().iter().map(|record| record.with_status()).collect()
    }

    /// The pod of that name, with status.
    pub fn pod(&self, namespace: &str, name: &str) -> Option<Pod> {
        self.registry.named(namespace, name).map(|record| record.with_status())
    }

    /// Resolves once all sources of pods have been read.
    pub async fn synced(&self) {
        let mut synced = self.synced.clone();
        // The sender lives as long as the dispatcher.
        let _ = synced.wait_for(|synced| *synced).await;
    }

    /// The container in the runtime: the newest one, or the one before it. `uid` may be empty.
    pub async fn find(&self, namespace: &str, name: &str, uid: &str, container: &str, previous: bool) -> Result<ContainerRef, FindError> {
        let no_pod = || FindError::NoPod { namespace: namespace.into(), name: name.into() };
        let record = self.registry.named(namespace, name).filter(|record| uid.is_empty() || record.uid == uid).ok_or_else(no_pod)?;
        let no_container = || FindError::NoContainer { name: name.into(), container: container.into() };
        pod::meta::find_container(&record.pod(), container).ok_or_else(no_container)?;
        let view = runtime::read(&self.host.cri, &record.uid).await.map_err(|error| FindError::Runtime(error.to_string()))?;
        let mut found = view.containers.iter().filter(|view| view.name == container);
        let chosen = if previous { found.nth(1) } else { found.next() };
        match chosen {
            Some(view) => Ok(ContainerRef {
                pod_uid: record.uid.clone(),
                container_id: view.id.clone(),
                sandbox_id: view.sandbox_id.clone(),
                log_path: view.log_path.clone(),
                running: view.state == runtime::RunState::Running,
            }),
            None if previous => Err(FindError::NoPrevious { name: name.into(), container: container.into() }),
            None => {
                let waiting = record.waiting().remove(container);
                let reason = waiting.map_or_else(|| "ContainerCreating".into(), |waiting| waiting.reason);
                Err(FindError::Waiting { name: name.into(), container: container.into(), reason })
            }
        }
    }

    /// The ready sandbox of the pod (its id), for port-forwarding and stats.
    pub async fn find_sandbox(&self, namespace: &str, name: &str, uid: &str) -> Result<String, FindError> {
        let no_pod = || FindError::NoPod { namespace: namespace.into(), name: name.into() };
        let record = self.registry.named(namespace, name).filter(|record| uid.is_empty() || record.uid == uid).ok_or_else(no_pod)?;
        let view = runtime::read(&self.host.cri, &record.uid).await.map_err(|error| FindError::Runtime(error.to_string()))?;
        view.sandboxes.iter().find(|sandbox| sandbox.ready).map(|sandbox| sandbox.id.clone()).ok_or_else(no_pod)
    }

    /// The path of the sandbox's network namespace; `None` for a pod in the host's network.
    pub async fn network_namespace(&self, sandbox_id: &str) -> Result<Option<String>, FindError> {
        let answer = self.host.cri.sandbox_status(sandbox_id, true).await.map_err(|error| FindError::Runtime(error.to_string()))?;
        let options = answer.status.and_then(|status| status.linux).and_then(|linux| linux.namespaces).and_then(|all| all.options);
        if options.is_some_and(|options| options.network == v1::NamespaceMode::Node as i32) {
            return Ok(None);
        }
        let info = answer.info.get("info").and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
        let namespaces = info.as_ref().and_then(|info| info.pointer("/runtimeSpec/linux/namespaces")).and_then(|list| list.as_array());
        let network = namespaces.and_then(|list| list.iter().find(|namespace| namespace["type"] == "network"));
        Ok(network.and_then(|namespace| namespace["path"].as_str()).map(str::to_owned))
    }

    /// Whether all parts are at work: none of them ends by itself.
    pub fn is_running(&self) -> bool {
        self.tasks.iter().all(|task| !task.is_finished())
    }

    /// Ends all tasks of the kubelet; containers go on.
    pub fn stop(&self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn open(config: Config, watch: Watch, writer: Writer, lookup: Lookup) -> Result<Host, StartError> {
    let cri = Cri::connect(&config.runtime_endpoint);
    let runtime = |source| StartError::Runtime { endpoint: config.runtime_endpoint.clone(), source };
    let version = wait_for_runtime(&cri).await.map_err(runtime)?;
    info!(runtime = version.runtime_name, version = version.runtime_version, "connected to the container runtime");
    for dir in [&config.data_dir, &config.pods_dir(), &config.logs_dir()] {
        std::fs::create_dir_all(dir).map_err(|source| StartError::Folder { path: dir.display().to_string(), source })?;
    }
    let machine = Machine::read();
    let capacity = machine.capacity(&config.data_dir, config.max_pods);
    let allocatable = machine.allocatable(&capacity);
    let cgroups = cgroup::Cgroups::open(&config.cgroup_root, machine.cpus * 1000);
    let cgroups = cgroups.map_err(|source| StartError::Cgroups { root: config.cgroup_root.clone(), source })?;
    let config = Arc::new(config);
    let in_flight = Arc::new(in_flight::InFlight::default());
    Ok(Host {
        images: images::Images::new(cri.clone(), writer.clone(), config.serialize_image_pulls),
        volumes: volume::Volumes::new(config.clone(), lookup.clone(), writer.clone(), allocatable.clone(), in_flight.clone()),
        in_flight,
        restarts: pod::backoff::Backoff::default(),
        probes: Arc::default(),
        runtime_name: version.runtime_name.clone(),
        runtime_version: format!("{}://{}", version.runtime_name, version.runtime_version),
        pressure: eviction::Pressure::default(),
        started: Timestamp::now(),
        config,
        cri,
        writer,
        lookup,
        watch,
        cgroups,
        machine,
        capacity,
        allocatable,
    })
}

/// The runtime may be started at the same time as the agent.
async fn wait_for_runtime(cri: &Cri) -> cri::Result<v1::VersionResponse> {
    let mut last = None;
    for _ in 0..300 {
        match cri.version().await {
            Ok(version) => return Ok(version),
            Err(error) => last = Some(error),
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    Err(last.unwrap_or(cri::Error { call: "Version", code: tonic::Code::Unavailable, message: String::new() }))
}

/// Eight hex digits that tell one start of a container from the next.
fn short_id() -> String {
    let nanos = Timestamp::now().as_nanosecond();
    format!("{:08x}", u32::try_from(nanos.unsigned_abs() & 0xffff_ffff).unwrap_or(0))
}
