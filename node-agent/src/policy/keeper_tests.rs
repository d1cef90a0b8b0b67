//! The loop over an enforcer that writes down what it is told, and fails when it is told to.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger_dataplane::policy::{Applied, Dropped, Enforcer};
use outrigger_dataplane::{BackendError, Mode};
use outrigger_desired::policy::{Change, Pod, PolicyTable};
use outrigger_desired::{ServiceName, Watched};
use outrigger_network::ipam::{Ipam, Owner, Record};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};

use super::keeper::{Keeper, Open};
use super::metrics::Metrics;
use super::{Health, Policing};
use crate::local::{self, Sources};

#[derive(Default)]
struct Kernel {
    opened: Vec<Mode>,
    tables: Vec<PolicyTable>,
    node: Vec<IpAddr>,
    absent: Vec<Arc<str>>,
    failing: bool,
}

struct Fake(Arc<Mutex<Kernel>>);

impl Enforcer for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn apply<'a>(&'a mut self, table: &'a PolicyTable, node: &'a [IpAddr]) -> Result<Applied, BackendError> {
        let mut kernel = self.0.lock().unwrap();
        if kernel.failing {
            return Err(BackendError::failed("write the policies", "no"));
        }
        kernel.tables.push(table.clone());
        kernel.node = node.to_vec();
        let isolated = table.pods.values().filter(|pod| pod.ingress.is_some() || pod.egress.is_some());
        Ok(Applied { pods: isolated.count(), rules: 1, absent: kernel.absent.clone() })
    }

    fn dropped(&self) -> Result<BTreeMap<Arc<str>, Dropped>, BackendError> {
        Ok(BTreeMap::from([("box-eth0".into(), Dropped { ingress: 3, egress: 0 })]))
    }

    fn teardown(&mut self) -> Result<(), BackendError> {
        Ok(())
    }
}

struct World {
    kernel: Arc<Mutex<Kernel>>,
    changes: mpsc::UnboundedSender<Change>,
    modes: watch::Sender<Mode>,
    policing: Policing,
    data: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let kernel = Arc::<Mutex<Kernel>>::default();
        let (sender, changes) = mpsc::unbounded_channel();
        let (requests, inbox) = mpsc::unbounded_channel();
        let (modes, mode) = watch::channel(Mode::Ebpf);
        let (health, is_healthy) = watch::channel(Health::default());
        let metrics = Arc::<Mutex<Metrics>>::default();
        let opens = kernel.clone();
        let open: Open = Box::new(move |mode| {
            opens.lock().unwrap().opened.push(mode);
            Ok(Box::new(Fake(opens.clone())))
        });
        let node_ips = vec!["192.168.0.1".parse().unwrap()];
        let keeper = Keeper::new(Box::new(Fake(kernel.clone())), open, data.path().into(), node_ips, health, metrics.clone());
        tokio::spawn(keeper.run(changes, inbox, mode));
        Self { kernel, changes: sender, modes, policing: Policing { keeper: Ok(requests), health: is_healthy, metrics }, data }
    }

    fn listed(&self) {
        let namespace = json!({"metadata": {"name": "ns"}});
        let policy = json!({"metadata": {"name": "p", "namespace": "ns"}, "spec": {"podSelector": {"matchLabels": {"app": "a"}}}});
        let pod = |name: &str, app: &str| {
            let labels = [("app".to_owned(), app.to_owned())].into();
            Arc::new(Pod {
                name: ServiceName::new("ns", name),
                labels,
                addresses: Vec::new(),
                host_network: false,
                over: false,
                ports: Vec::new(),
            })
        };
        for change in [
            Change::Namespace(Watched::Replaced(Arc::new(vec![Arc::new(serde_json::from_value(namespace).unwrap())]))),
            Change::Policy(Watched::Replaced(Arc::new(vec![Arc::new(serde_json::from_value(policy).unwrap())]))),
            Change::Pod(Watched::Replaced(Arc::new(vec![pod("a", "a"), pod("b", "b")]))),
        ] {
            self.changes.send(change).unwrap();
        }
    }

    fn last(&self) -> PolicyTable {
        self.kernel.lock().unwrap().tables.last().cloned().unwrap_or_default()
    }

    async fn admit(&self, id: &str, pod: Option<&str>) -> Result<(), String> {
        attach(self.data.path(), id, pod);
        self.policing.admit(format!("{id}-eth0")).await
    }
}

/// What the plugin writes down before it asks.
fn attach(data: &Path, id: &str, pod: Option<&str>) {
    let record = Record { owner: Owner::new(id, "eth0"), pod: pod.map(str::to_owned) };
    Ipam::new(data.join("network")).lock().unwrap().allocate(&["10.0.0.0/24".parse().unwrap()], &record).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_pod_is_admitted_once_its_policies_are_in_the_kernel() {
    let world = World::new();
    // Before the first lists nobody knows whose policies are whose, and nothing is written.
    let early = tokio::time::timeout(Duration::from_secs(5), world.admit("box", Some("ns/a"))).await;
    assert!(early.is_err() && world.kernel.lock().unwrap().tables.is_empty());
    let refused = world.policing.admit("box-eth0".into()).await;
    assert_eq!(refused, Err("network policies have not been brought to the kernel yet".into()));
    world.listed();
    world.policing.admit("box-eth0".into()).await.unwrap();
    let pod = world.last().pods["box-eth0"].clone();
    assert_eq!((pod.addresses, pod.egress), (vec!["10.0.0.1".parse::<IpAddr>().unwrap()], None));
    assert!(pod.ingress.is_some_and(|rules| rules.peers.is_empty()));
    assert!(world.kernel.lock().unwrap().node.contains(&"192.168.0.1".parse().unwrap()));
    assert_eq!(world.policing.reading(), Ok(()));
    world.admit("other", Some("ns/b")).await.unwrap();
    assert_eq!((world.last().pods.len(), world.last().pods["other-eth0"].ingress.clone()), (2, None));
    // An attachment is written again even when the table says nothing new: its interface may be another one.
    let before = world.kernel.lock().unwrap().tables.len();
    world.policing.admit("other-eth0".into()).await.unwrap();
    assert_eq!(world.kernel.lock().unwrap().tables.len(), before + 1);
    let text = world.policing.metrics();
    assert!(
        text.contains("outrigger_network_policy_enforcer{name=\"fake\"} 1\n") && text.contains("outrigger_network_policy_pods 1\n"),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_pod_is_refused_while_the_kernel_refuses() {
    let world = World::new();
    world.listed();
    world.kernel.lock().unwrap().failing = true;
    assert_eq!(world.admit("box", Some("ns/a")).await, Err("write the policies: no".into()));
    assert_eq!(world.policing.reading(), Err("network policies are not up to date: write the policies: no".into()));
    world.kernel.lock().unwrap().failing = false;
    // It is tried again without a new reason.
    world.policing.health.clone().wait_for(|health| health.synced && health.error.is_none()).await.unwrap();
    world.kernel.lock().unwrap().absent = vec!["box-eth0".into()];
    assert_eq!(world.policing.admit("box-eth0".into()).await, Err("there is no interface of box-eth0 on this node".into()));
    assert!(world.policing.admit("nobody-eth0".into()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn an_unknown_pod_starts_closed() {
    let world = World::new();
    world.listed();
    world.admit("box", Some("ns/late")).await.unwrap();
    let pod = world.last().pods["box-eth0"].clone();
    assert!(pod.ingress.is_some_and(|rules| rules.peers.is_empty()) && pod.egress.is_some_and(|rules| rules.peers.is_empty()));
}

#[tokio::test(start_paused = true)]
async fn what_is_let_go_leaves_the_kernel_and_another_mode_has_its_enforcer() {
    let world = World::new();
    world.listed();
    world.admit("box", Some("ns/a")).await.unwrap();
    Ipam::new(world.data.path().join("network")).lock().unwrap().release(&Owner::new("box", "eth0")).unwrap();
    world.policing.attachments_changed();
    while !world.last().pods.is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let before = world.kernel.lock().unwrap().tables.len();
    world.modes.send(Mode::Userspace).unwrap();
    while world.kernel.lock().unwrap().tables.len() == before {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(world.kernel.lock().unwrap().opened, [Mode::Userspace]);
}

/// The status line and the body of the agent's answer to the plugin.
async fn post(socket: &Path, path: &str) -> (String, String) {
    let mut stream = tokio::net::UnixStream::connect(socket).await.unwrap();
    stream.write_all(format!("POST {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

#[tokio::test]
async fn the_plugin_is_answered_at_the_agents_socket() {
    let world = World::new();
    world.listed();
    attach(world.data.path(), "box", Some("ns/a"));
    let socket = world.data.path().join("agent.sock");
    let sources = |policing| Sources { parts: Default::default(), proxy: None, policing, watch: Default::default() };
    local::serve(&socket, sources(Some(world.policing.clone()))).unwrap();
    assert_eq!(post(&socket, "/attachments?admit=box-eth0").await, ("HTTP/1.0 200 OK".into(), "null".into()));
    assert_eq!(post(&socket, "/attachments").await.0, "HTTP/1.0 200 OK");
    let refused = ("HTTP/1.0 503 Service Unavailable".into(), "there is no interface of other-eth0 on this node".into());
    assert_eq!(post(&socket, "/attachments?admit=other-eth0").await, refused);
    let alone = world.data.path().join("alone.sock");
    local::serve(&alone, sources(None)).unwrap();
    assert_eq!(post(&alone, "/attachments?admit=box-eth0").await.0, "HTTP/1.0 404 Not Found");
}

#[tokio::test]
async fn where_nothing_enforces_pods_are_admitted_at_once() {
    let (_, health) = watch::channel(Health::default());
    let policing = Policing { keeper: Err("no way".into()), health, metrics: Arc::default() };
    assert_eq!((policing.admit("x".into()).await, policing.reading(), policing.off()), (Ok(()), Ok(()), Some("no way")));
}
