//! A node made for one test: a network namespace on a thread of its own, with pods and a host outside in namespaces of theirs.
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sched::{CloneFlags, setns, unshare};
use outrigger_dataplane::policy::{self, Applied, Dropped, Enforcer};
use outrigger_dataplane::{Config, Mode};
use outrigger_desired::policy::{PodPolicy, PolicyTable, Rules};

use crate::host::{Host, ip};

static COUNT: AtomicUsize = AtomicUsize::new(0);

fn sysctl(name: &str, value: &str) {
    fs::write(Path::new("/proc/sys/net").join(name), value).unwrap_or_else(|error| panic!("{name}: {error}"));
}

/// The node is 10.1.0.1 and fd01::1. Pods a and b are on it: 10.0.0.1 and fd00::1, 10.0.0.2 and fd00::2, on the interfaces `poda` and
/// `podb`. The host outside is 10.1.0.9, 10.1.0.10 and fd01::9.
pub struct Lab {
    pub config: Config,
    pub mode: Mode,
    pub a: Host,
    pub b: Host,
    pub outside: Host,
}

pub const NODE: [&str; 2] = ["10.1.0.1", "fd01::1"];

impl Lab {
    /// Runs `test` on a thread in the node's namespace, once for each enforcer.
    pub fn run(test: impl Fn(&Lab) + Sync) {
        for mode in [Mode::Ebpf, Mode::Nftables] {
            Self::run_in(mode, &test);
        }
    }

    pub fn run_in(mode: Mode, test: impl Fn(&Lab) + Sync) {
        println!("by {mode}");
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of the test's own (root needed)");
                let lab = Lab::new(mode);
                test(&lab);
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
    }

    fn new(mode: Mode) -> Self {
        let name = format!("policy-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let config = Config { pin_dir: Path::new("/sys/fs/bpf/outrigger").join(&name), instance: name, ..Config::default() };
        ip("link set lo up");
        sysctl("ipv4/ip_forward", "1");
        sysctl("ipv6/conf/all/forwarding", "1");
        let outside = Host::new();
        ip(&format!("link add uplink type veth peer name eth0 netns {}", outside.thread));
        ip("addr add 10.1.0.1/24 dev uplink");
        ip("addr add fd01::1/64 dev uplink nodad");
        ip("link set uplink up");
        outside.ip(&[
            "addr add 10.1.0.9/24 dev eth0",
            "addr add 10.1.0.10/24 dev eth0",
            "addr add fd01::9/64 dev eth0 nodad",
            "link set eth0 up",
            "route add 10.0.0.0/24 via 10.1.0.1",
            "route add fd00::/64 via fd01::1",
        ]);
        let (a, b) = (pod("poda", 1), pod("podb", 2));
        Self { config, mode, a, b, outside }
    }

    /// The node, as one that can be told what to do.
    pub fn node(&self) -> Host {
        let namespace = fs::File::open("/proc/thread-self/ns/net").unwrap();
        let node = Host::new();
        node.run(move || setns(namespace, CloneFlags::CLONE_NEWNET).unwrap());
        node
    }

    /// An agent that has just started.
    pub fn agent(&self) -> Agent {
        self.agent_with(&self.config)
    }

    pub fn agent_with(&self, config: &Config) -> Agent {
        let enforcer = policy::open_beside(config, self.mode).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(enforcer.name(), self.mode.to_string());
        Agent { enforcer }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        remove(&self.config.pin_dir);
    }
}

fn remove(folder: &PathBuf) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() { remove(&entry.path()) } else { _ = fs::remove_file(entry.path()) }
    }
    let _ = fs::remove_dir(folder);
}

pub fn pod(interface: &str, number: u8) -> Host {
    let pod = Host::new();
    ip(&format!("link add {interface} type veth peer name eth0 netns {}", pod.thread));
    ip(&format!("link set {interface} up"));
    ip(&format!("addr add 169.254.1.1/32 dev {interface}"));
    ip(&format!("addr add fe80::1/64 dev {interface} nodad"));
    pod.ip(&[
        &format!("addr add 10.0.0.{number}/32 dev eth0"),
        &format!("addr add fd00::{number}/128 dev eth0 nodad"),
        "link set eth0 up",
        "route add 169.254.1.1 dev eth0",
        "route add default via 169.254.1.1",
        "route add default via fe80::1 dev eth0",
    ]);
    ip(&format!("route add 10.0.0.{number}/32 dev {interface}"));
    ip(&format!("route add fd00::{number}/128 dev {interface}"));
    pod
}

pub struct Agent {
    enforcer: Box<dyn Enforcer>,
}

/// A pod's isolation; `None` where it isn't isolated.
pub type Isolation = (Option<Rules>, Option<Rules>);

impl Agent {
    /// Pods a and b are so isolated.
    pub fn apply(&mut self, a: Isolation, b: Isolation) -> Applied {
        let pods = [("a", 1, a), ("b", 2, b)].map(|(name, number, (ingress, egress))| {
            let pod = PodPolicy {
                addresses: vec![format!("10.0.0.{number}").parse().unwrap(), format!("fd00::{number}").parse().unwrap()],
                interface: format!("pod{name}"),
                ingress: ingress.map(Arc::new),
                egress: egress.map(Arc::new),
            };
            (name.into(), pod)
        });
        self.apply_table(&PolicyTable { pods: pods.into() })
    }

    pub fn apply_table(&mut self, table: &PolicyTable) -> Applied {
        self.enforcer.apply(table, &NODE.map(|ip| ip.parse().unwrap())).unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn dropped(&self, sandbox: &str) -> Dropped {
        self.enforcer.dropped().unwrap()[sandbox]
    }

    pub fn teardown(mut self) {
        self.enforcer.teardown().unwrap();
    }
}
