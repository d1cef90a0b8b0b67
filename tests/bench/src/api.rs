//! The API server that all contenders watch, in a namespace of its own, and the Services that it has.
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use outrigger_scenarios::netns::Namespace;
use serde_json::{Value, json};

use crate::bed::{BACKENDS, NODE_IP, Running, inside};
use crate::load::{IPERF_PORT, LONG_PORT, SHORT_PORT};

pub const SPACE: &str = "default";
pub const CLUSTER_IP: &str = "10.96.0.100";
pub const CLUSTER_CIDR: &str = "10.244.0.0/16";
/// The target's node ports, in the order of its ports.
pub const NODE_PORTS: [u16; 3] = [30700, 30701, 30521];
const PORT: u16 = 6443;
const AT_ONCE: usize = 24;

pub struct Hub {
    pub namespace: Namespace,
    _control: Running,
    control: PathBuf,
    directory: PathBuf,
}

impl Hub {
    pub fn start(binaries: &Path, directory: &Path) -> Result<Self> {
        let namespace = Namespace::new()?;
        // The server's certificate names an address that every bed reaches.
        namespace.ip("addr add 10.200.0.1/32 dev lo")?;
        let (control, data) = (binaries.join("outrigger-control"), directory.join("control"));
        let mut command = inside(&namespace, &control, None)?;
        command.arg("run").arg("--data-dir").arg(&data).args(["--bind-address", "0.0.0.0", "--secure-port", &PORT.to_string()]);
        command.args(["--advertise-address", "10.200.0.1", "--tls-san", "10.200.0.1", "--service-cluster-ip-range", "10.96.0.0/12"]);
        command.args(["--cluster-cidr", CLUSTER_CIDR]);
        let log = std::fs::File::create(directory.join("control.log"))?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().context("start outrigger-control")?;
        let hub = Self { namespace, _control: Running(child), control, directory: directory.to_owned() };
        for _ in 0..300 {
            if data.join("admin.kubeconfig").exists() {
                return Ok(hub);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        anyhow::bail!("the control plane doesn't start: see {}", directory.join("control.log").display())
    }

    pub fn kubeconfig(&self, user: &str, group: &str) -> Result<PathBuf> {
        let output = self.directory.join(format!("{}.kubeconfig", user.replace(':', "-")));
        let mut command = Command::new(&self.control);
        command.args(["kubeconfig", "--user", user, "--group", group, "--server", &format!("https://10.200.0.1:{PORT}"), "--data-dir"]);
        let result = command.arg(self.directory.join("control")).arg("--output").arg(&output).output()?;
        ensure!(result.status.success(), "make a kubeconfig: {}", String::from_utf8_lossy(&result.stderr));
        Ok(output)
    }

    /// Runs `work` with a client, on a thread inside the hub's namespace.
    pub fn with<T: Send>(&self, work: impl AsyncFnOnce(Client) -> Result<T> + Send) -> Result<T> {
        let kubeconfig = self.kubeconfig("kubernetes-admin", "system:masters")?;
        let enter = self.namespace.enter()?;
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                enter()?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(async {
                    let file = Kubeconfig::read_from(&kubeconfig)?;
                    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
                    let client = Client::try_from(config)?;
                    wait_ready(&client).await?;
                    work(client).await
                })
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

async fn wait_ready(client: &Client) -> Result<()> {
    for _ in 0..100 {
        if client.apiserver_version().await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    anyhow::bail!("the API server doesn't answer")
}

fn read<K: serde::de::DeserializeOwned>(object: Value) -> K {
    serde_json::from_value(object).expect("the bench's own objects are well formed")
}

pub fn node(name: &str) -> Node {
    read(json!({"metadata": {"name": name}, "status": {"addresses": [{"type": "InternalIP", "address": NODE_IP}]}}))
}

/// The Service that is measured.
pub fn target() -> Service {
    let ports: Vec<Value> = [("short", SHORT_PORT), ("long", LONG_PORT), ("iperf", IPERF_PORT)]
        .into_iter()
        .zip(NODE_PORTS)
        .map(|((name, port), node_port)| json!({"name": name, "port": port, "nodePort": node_port}))
        .collect();
    read(json!({"metadata": {"name": "target", "namespace": SPACE}, "spec": {"type": "NodePort", "clusterIP": CLUSTER_IP, "ports": ports}}))
}

pub fn target_slice(backends: &[&str]) -> EndpointSlice {
    let ports = [("short", SHORT_PORT), ("long", LONG_PORT), ("iperf", IPERF_PORT)];
    slice("target", &ports, &backends.iter().map(|ip| (*ip).to_owned()).collect::<Vec<_>>())
}

fn slice(service: &str, ports: &[(&str, u16)], ips: &[String]) -> EndpointSlice {
    let ports: Vec<Value> = ports.iter().map(|(name, port)| json!({"name": name, "port": port, "protocol": "TCP"})).collect();
    let endpoints: Vec<Value> = ips.iter().map(|ip| json!({"addresses": [ip], "conditions": {"ready": true}})).collect();
    read(json!({
        "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
        "metadata": {"name": format!("{service}-1"), "namespace": SPACE, "labels": {"kubernetes.io/service-name": service}},
    }))
}

/// Where the Service of this number is.
pub fn filler_ip(number: u32) -> String {
    std::net::Ipv4Addr::from(u32::from(std::net::Ipv4Addr::new(10, 100, 0, 0)) + number).to_string()
}

/// A Service that nobody measures, with its endpoints: the last one of a list leads to real backends, so that it can be waited for.
pub fn filler(number: u32, endpoints: u32, real: bool) -> (Service, EndpointSlice) {
    let name = format!("filler-{number}");
    let service = json!({
        "metadata": {"name": name, "namespace": SPACE},
        "spec": {"clusterIP": filler_ip(number), "ports": [{"name": "http", "port": 80, "targetPort": SHORT_PORT}]},
    });
    let first = u32::from(std::net::Ipv4Addr::new(10, 244, 128, 0));
    let somewhere = |index| std::net::Ipv4Addr::from(first + (number * endpoints + index) % 32_000).to_string();
    let ips = if real { BACKENDS.map(str::to_owned).to_vec() } else { (0..endpoints).map(somewhere).collect() };
    (read(service), slice(&name, &[("http", SHORT_PORT)], &ips))
}

/// Creates the nodes and the Service that is measured.
pub async fn prepare(client: Client, nodes: &[String]) -> Result<()> {
    let api: Api<Node> = Api::all(client.clone());
    for name in nodes {
        let node = node(name);
        api.create(&PostParams::default(), &node).await.with_context(|| format!("create the node {name}"))?;
        let status = json!({"status": node.status});
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await?;
    }
    Api::<Service>::namespaced(client.clone(), SPACE).create(&PostParams::default(), &target()).await.context("create the target")?;
    Api::<EndpointSlice>::namespaced(client, SPACE).create(&PostParams::default(), &target_slice(&BACKENDS)).await?;
    Ok(())
}

/// Brings the number of Services from `from` to `to`, the target counted.
pub async fn grow(client: Client, from: u32, to: u32) -> Result<()> {
    let (services, slices): (Api<Service>, Api<EndpointSlice>) = (Api::namespaced(client.clone(), SPACE), Api::namespaced(client, SPACE));
    stream::iter(from.max(1)..to)
        .map(|number| {
            let (services, slices) = (services.clone(), slices.clone());
            async move {
                let (service, slice) = filler(number, 4, number + 1 == to);
                slices.create(&PostParams::default(), &slice).await?;
                services.create(&PostParams::default(), &service).await.map(drop)
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect::<()>()
        .await
        .context("create Services")
}

/// Gives the target these backends.
pub async fn set_backends(client: Client, backends: &[&str]) -> Result<()> {
    let api: Api<EndpointSlice> = Api::namespaced(client, SPACE);
    let slice = target_slice(backends);
    api.patch("target-1", &PatchParams::default(), &Patch::Merge(&json!({"endpoints": slice.endpoints}))).await.context("set backends")?;
    Ok(())
}
