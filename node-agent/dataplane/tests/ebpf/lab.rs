//! A node made for one test: a cgroup of its own that this process moves into, a network namespace on a thread of its own, pins of
//! its own. Nothing else of the machine is touched, and nothing stays.
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sched::{CloneFlags, unshare};
use outrigger_dataplane::sight::Event;
use outrigger_dataplane::{Applied, Backend, Config, Counted, Counts, Mode, ModeChoice, Parting};
use outrigger_desired::{Change, Delta, State, Table, Touched, Watched};
use serde_json::{Value, json};

use crate::host::{Host, ip};

/// The process is in one cgroup at a time.
static TURN: Mutex<()> = Mutex::new(());
static COUNT: AtomicUsize = AtomicUsize::new(0);

pub struct Lab {
    cgroup: PathBuf,
    former: PathBuf,
    pub config: Config,
    _turn: MutexGuard<'static, ()>,
}

impl Lab {
    /// Runs `test` on a thread in a fresh namespace whose loopback has `addresses`.
    pub fn run(addresses: &[&str], test: impl FnOnce(&Lab) + Send) {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let lab = Self::new(turn);
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of the test's own (root needed)");
                ip("link set lo up");
                addresses
                    .iter()
                    .for_each(|address| ip(&format!("addr add {address} dev lo{}", if address.contains(':') { " nodad" } else { "" })));
                test(&lab);
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
    }

    fn new(turn: MutexGuard<'static, ()>) -> Self {
        let mount = cgroup2_mount();
        let name = format!("test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let cgroup = mount.join("outrigger").join(&name);
        fs::create_dir_all(&cgroup).expect("a cgroup of the test's own (root needed)");
        let former = fs::read_to_string("/proc/self/cgroup").unwrap();
        let former = former.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let former = mount.join(former);
        fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
        let config = Config {
            mode: ModeChoice::Auto,
            node_name: "node".into(),
            node_ips: vec!["10.1.0.1".parse().unwrap(), "fd01::1".parse().unwrap()],
            nodeport_addresses: Vec::new(),
            cluster_cidrs: vec!["10.0.0.0/16".parse().unwrap(), "fd00::/16".parse().unwrap()],
            cgroup2_path: cgroup.clone(),
            pin_dir: Path::new("/sys/fs/bpf/outrigger").join(&name),
            instance: name,
            ..Config::default()
        };
        Self { cgroup, former, config, _turn: turn }
    }

    /// An agent that has just started.
    pub fn agent(&self) -> Agent {
        self.agent_in(Mode::Ebpf)
    }

    pub fn agent_in(&self, mode: Mode) -> Agent {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut backend = outrigger_dataplane::probe::open(&self.config, mode).unwrap_or_else(|error| panic!("{error}"));
        let found = runtime.block_on(backend.restore()).unwrap().frontends;
        Agent { runtime, backend, found, state: State::new("node"), table: Table::default(), touched: Touched::default(), full: true }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Unpinning detaches; the rest is folders.
        for _ in 0..2 {
            remove(&self.config.pin_dir);
        }
        let _ = fs::write(self.former.join("cgroup.procs"), std::process::id().to_string());
        let _ = fs::remove_dir(&self.cgroup);
    }
}

fn remove(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() { remove(&entry.path()) } else { _ = fs::remove_file(entry.path()) }
    }
    let _ = fs::remove_dir(folder);
}

fn cgroup2_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| fields[2] == "cgroup2");
    PathBuf::from(mount.expect("a cgroup2 mount")[1])
}

pub struct Agent {
    runtime: tokio::runtime::Runtime,
    backend: Box<dyn Backend>,
    /// Frontends that a former agent left.
    pub found: usize,
    state: State,
    table: Table,
    touched: Touched,
    full: bool,
}

impl Agent {
    /// The agent learns of `objects` in one go.
    pub fn apply(&mut self, objects: &[Value]) -> Applied {
        self.learn(objects);
        let mut delta = self.table.update(&self.state, &std::mem::take(&mut self.touched));
        if std::mem::take(&mut self.full) {
            delta = Delta { gone: delta.gone, ..Delta::full(&self.table) };
        }
        // Where waiting for the work beside it is allowed: on a thread of the runtime.
        let (backend, table) = (&mut self.backend, &self.table);
        self.runtime.block_on(async {
            let applied = backend.apply(table, &delta).await.unwrap_or_else(|error| panic!("{error}"));
            backend.finish().await;
            Applied { ended: applied.ended + backend.ended(), ..applied }
        })
    }

    /// The Service goes.
    pub fn forget(&mut self, object: &Value) {
        let service = Change::Service(Watched::Deleted(std::sync::Arc::new(serde_json::from_value(object.clone()).unwrap())));
        self.touched.merge(self.state.apply(&service));
    }

    /// Without doing anything yet.
    pub fn learn(&mut self, objects: &[Value]) {
        for object in objects {
            let change = match object["kind"].as_str().unwrap() {
                "Service" => Change::Service(watched(object)),
                "EndpointSlice" => Change::EndpointSlice(watched(object)),
                kind => panic!("{kind}"),
            };
            self.touched.merge(self.state.apply(&change));
        }
    }

    pub fn counts(&self) -> Counts {
        self.backend.counted(&self.table).unwrap()
    }

    /// What was counted of this Service's only port.
    pub fn counted(&self, name: &str) -> Counted {
        let all = self.counts().services;
        all.into_iter().find(|(port, _)| port.service.name() == name).map(|(_, counted)| counted).unwrap_or_default()
    }

    pub fn events(&self) -> Vec<Event> {
        self.backend.events(&self.table).unwrap()
    }

    pub fn part(&mut self, parting: Parting) {
        self.runtime.block_on(self.backend.teardown(parting)).unwrap();
    }
}

fn watched<K: serde::de::DeserializeOwned>(object: &Value) -> Watched<K> {
    Watched::Applied(std::sync::Arc::new(serde_json::from_value(object.clone()).unwrap()))
}

/// A Service with one port for each protocol in `port` (`80/TCP`) and with what `spec` adds or replaces.
pub fn service(name: &str, ip: &str, port: &str, spec: Value) -> Value {
    let (port, protocol) = port.split_once('/').unwrap();
    let mut base = json!({
        "clusterIP": ip, "clusterIPs": [ip], "type": "ClusterIP",
        "ports": [{"port": port.parse::<u16>().unwrap(), "protocol": protocol, "nodePort": spec.get("nodePort")}],
    });
    for (key, value) in spec.as_object().into_iter().flatten().filter(|(key, _)| *key != "nodePort") {
        base[key] = value.clone();
    }
    json!({"kind": "Service", "apiVersion": "v1", "metadata": {"name": name, "namespace": "default"}, "spec": base})
}

/// A Service's endpoints, `ip` each, all on `port`; those in 10.0.0.0/24 and fd00::/16 are this node's.
pub fn slice(name: &str, port: &str, ips: &[&str]) -> Value {
    let (port, protocol) = port.split_once('/').unwrap();
    let family = if ips.iter().any(|ip| ip.contains(':')) { "IPv6" } else { "IPv4" };
    let endpoints = ips.iter().map(|ip| {
        let node = if ip.starts_with("10.0.0.") || ip.starts_with("fd00:") { "node" } else { "other" };
        json!({"addresses": [ip], "nodeName": node, "conditions": {"ready": true}})
    });
    let endpoints: Vec<_> = endpoints.collect();
    json!({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "addressType": family, "endpoints": endpoints,
        "metadata": {"name": format!("{name}-{family}").to_lowercase(), "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
        "ports": [{"port": port.parse::<u16>().unwrap(), "protocol": protocol}],
    })
}

impl Lab {
    /// Makes sockets that the node's hooks don't see, as on another machine: a socket belongs to the cgroup that it was born in.
    pub fn unhooked<T>(&self, work: impl FnOnce() -> T) -> T {
        let own = std::process::id().to_string();
        fs::write(self.former.join("cgroup.procs"), &own).unwrap();
        let result = work();
        fs::write(self.cgroup.join("cgroup.procs"), &own).unwrap();
        result
    }
}

/// A node (the calling thread's namespace) with an uplink to a network where a client and another node are, and with a pod.
pub struct Network {
    pub client: Host,
    pub other: Host,
    pub pod: Host,
}

impl Network {
    /// The node is 10.1.0.1 and fd01::1, its pod 10.0.0.1 and fd00::1, the other node 10.1.0.2 with a pod 10.0.1.1, the client 10.1.0.9 and fd01::9.
    pub fn new() -> Self {
        let (client, other, pod) = (Host::new(), Host::new(), Host::new());
        ip(&format!("link add uplink type veth peer name node netns {}", client.thread));
        ip("addr add 10.1.0.1/24 dev uplink");
        ip("addr add fd01::1/64 dev uplink nodad");
        ip("link set uplink up");
        client.ip(&[
            "link add net type bridge",
            "addr add 10.1.0.9/24 dev net",
            "addr add fd01::9/64 dev net nodad",
            "link set net up",
            "link set node master net up",
            &format!("link add other type veth peer name eth0 netns {}", other.thread),
            "link set other master net up",
        ]);
        other.ip(&["addr add 10.1.0.2/24 dev eth0", "addr add 10.0.1.1/32 dev lo", "link set eth0 up"]);
        ip("route add 10.0.1.0/24 via 10.1.0.2");
        ip(&format!("link add pod type veth peer name eth0 netns {}", pod.thread));
        ip("link set pod up");
        ip("addr add 169.254.1.1/32 dev pod");
        ip("addr add fd00::ffff/128 dev pod nodad");
        pod.ip(&[
            "addr add 10.0.0.1/32 dev eth0",
            "addr add fd00::1/128 dev eth0 nodad",
            "link set eth0 up",
            "route add 169.254.1.1 dev eth0",
            "route add default via 169.254.1.1",
            "route add fd00::ffff dev eth0",
            "route add default via fd00::ffff",
        ]);
        ip("route add 10.0.0.1/32 dev pod");
        ip("route add fd00::1/128 dev pod");
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        Self { client, other, pod }
    }
}
