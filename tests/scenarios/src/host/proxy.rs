//! The proxy under test, fed from requests instead of a cluster.
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use outrigger_dataplane::sight::{Event, What};
use outrigger_dataplane::{Config, Counted, PodInterfaces, Proxy, ProxyHandle};
use outrigger_desired::{Change, ServicePortName, Watched};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::{broadcast, mpsc};

use crate::talk::{ProxyConfig, ProxyRequest, Reply};

pub struct ProxyHost {
    runtime: Runtime,
    running: Option<(ProxyHandle, mpsc::UnboundedSender<Change>)>,
    watch: Option<broadcast::Receiver<Event>>,
}

impl ProxyHost {
    pub fn new() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        Ok(Self { runtime, running: None, watch: None })
    }

    pub fn answer(&mut self, request: ProxyRequest) -> Result<Reply> {
        if let ProxyRequest::Start { config, objects } = request {
            return self.start(&config, &objects);
        }
        let Some((handle, changes)) = &self.running else {
            ensure!(matches!(request, ProxyRequest::Teardown), "the proxy isn't running");
            return Ok(Reply::Done);
        };
        match request {
            ProxyRequest::Start { .. } => bail!("the proxy runs already"),
            ProxyRequest::Apply(object) => changes.send(change(object, true)?)?,
            ProxyRequest::Delete(object) => changes.send(change(object, false)?)?,
            ProxyRequest::SetMode(mode) => {
                self.runtime.block_on(handle.set_mode(mode.parse()?))?;
            }
            ProxyRequest::Counts => return counts(&self.runtime, handle),
            ProxyRequest::Watch => {
                let _inside = self.runtime.enter();
                self.watch = Some(handle.watch());
            }
            ProxyRequest::Happened => {
                let watch = self.watch.as_mut().context("nobody watches")?;
                let told = std::iter::from_fn(|| watch.try_recv().ok()).map(|event| told(&event) + "\n");
                return Ok(Reply::Page(told.collect()));
            }
            ProxyRequest::Teardown => {
                self.runtime.block_on(handle.teardown())?;
                self.running = None;
                return Ok(Reply::Done);
            }
        }
        settled(&self.runtime, handle)
    }

    fn start(&mut self, config: &ProxyConfig, objects: &[Value]) -> Result<Reply> {
        let (sender, changes) = mpsc::unbounded_channel();
        let handle = self.runtime.block_on(Proxy::start(read_config(config)?, changes))?;
        sender.send(Change::Service(all_of::<Service>(objects, "Service")?))?;
        sender.send(Change::EndpointSlice(all_of::<EndpointSlice>(objects, "EndpointSlice")?))?;
        sender.send(Change::Node(all_of::<Node>(objects, "Node")?))?;
        sender.send(Change::Pod(all_of::<Pod>(objects, "Pod")?))?;
        let reply = settled(&self.runtime, &handle)?;
        self.running = Some((handle, sender));
        Ok(reply)
    }
}

fn settled(runtime: &Runtime, handle: &ProxyHandle) -> Result<Reply> {
    let health = runtime.block_on(handle.settle());
    match health.error {
        Some(error) => bail!("{error}"),
        None => Ok(Reply::Done),
    }
}

fn counts(runtime: &Runtime, handle: &ProxyHandle) -> Result<Reply> {
    let counts = runtime.block_on(handle.ask(|view| view.backend.counted(view.table))).context("the proxy has stopped")??;
    let port = |(name, counted): (&ServicePortName, &Counted)| {
        let drops: serde_json::Map<String, Value> =
            counted.drops.iter().map(|(reason, count)| (reason.name().into(), json!(count))).collect();
        let backends: serde_json::Map<String, Value> =
            counted.backends.iter().map(|(backend, traffic)| (backend.to_string(), json!(traffic.connections))).collect();
        (name.to_string(), json!({"connections": counted.connections, "drops": drops, "backends": backends}))
    };
    let ports: serde_json::Map<String, Value> = counts.services.iter().map(port).collect();
    Ok(Reply::Page(Value::Object(ports).to_string()))
}

/// `opened default/web:tcp 10.244.1.10 -> 10.96.0.10:80`; without the client's port, which is any.
fn told(event: &Event) -> String {
    let what = match event.what {
        What::Opened => "opened",
        What::Closed => "closed",
        What::Refused(reason) => reason.name(),
    };
    let service = event.service.as_ref().map(ToString::to_string).unwrap_or_default();
    let source = event.source.map(|source| source.ip().to_string()).unwrap_or_default();
    let frontend = event.frontend.map(|frontend| frontend.to_string()).unwrap_or_default();
    format!("{what} {service} {source} -> {frontend}")
}

fn read_config(config: &ProxyConfig) -> Result<Config> {
    Ok(Config {
        mode: config.mode.parse()?,
        node_name: config.node_name.clone(),
        node_ips: config.node_ips.clone(),
        nodeport_addresses: nets(&config.nodeport_addresses)?,
        masquerade_all: config.masquerade_all,
        pod_interfaces: config.pod_interface_prefix.clone().map(PodInterfaces::Prefix),
        cluster_cidrs: nets(&config.cluster_cidrs)?,
        cgroup2_path: config.cgroup2_path.clone().into(),
        pin_dir: config.pin_dir.clone().into(),
        instance: config.instance.clone(),
        ..Config::default()
    })
}

fn nets(texts: &[String]) -> Result<Vec<IpNet>> {
    Ok(texts.iter().map(|net| net.parse()).collect::<Result<_, _>>()?)
}

fn all_of<K: DeserializeOwned>(objects: &[Value], kind: &str) -> Result<Watched<K>> {
    let chosen = objects.iter().filter(|object| object["kind"] == kind);
    let read: Result<Vec<Arc<K>>> = chosen.map(|object| Ok(Arc::new(read(object.clone())?))).collect();
    Ok(Watched::Replaced(Arc::new(read?)))
}

fn read<K: DeserializeOwned>(object: Value) -> Result<K> {
    let name = object["metadata"]["name"].clone();
    serde_json::from_value(object).with_context(|| format!("read object {name}"))
}

fn change(object: Value, applied: bool) -> Result<Change> {
    fn watched<K: DeserializeOwned>(object: Value, applied: bool) -> Result<Watched<K>> {
        let object = Arc::new(read(object)?);
        Ok(if applied { Watched::Applied(object) } else { Watched::Deleted(object) })
    }
    Ok(match object["kind"].as_str() {
        Some("Service") => Change::Service(watched(object, applied)?),
        Some("EndpointSlice") => Change::EndpointSlice(watched(object, applied)?),
        Some("Node") => Change::Node(watched(object, applied)?),
        Some("Pod") => Change::Pod(watched(object, applied)?),
        other => bail!("unknown kind {other:?}"),
    })
}
