//! The places of the scenarios: a node with two pods, another node's pod, and a client outside of the cluster.
//!
//! ```text
//! pod-a 10.244.1.10 ─┐                          ┌─ 192.168.77.2 remote (10.244.2.10 is its pod)
//!                    ├─ node (the proxy's) ──────┤
//! pod-b 10.244.1.11 ─┘  192.168.77.1, .78.1      └─ 192.168.78.2 outside
//! ```
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, bail};

use crate::netns::Namespace;
use crate::talk::{Reply, Request, Transport};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    PodA,
    PodB,
    Node,
    Remote,
    Outside,
}

pub const NODE_NAME: &str = "node-1";
pub const NODE_IP: &str = "192.168.77.1";
pub const NODE_IP6: &str = "fd00:77::1";
pub const NODE_OUTER_IP: &str = "192.168.78.1";
pub const POD_A: &str = "10.244.1.10";
pub const POD_B: &str = "10.244.1.11";
pub const POD_R: &str = "10.244.2.10";
pub const QUIET: &str = "10.244.1.12";
pub const QUIET_R: &str = "10.244.2.12";
pub const OUTSIDE: &str = "192.168.78.2";
/// What every backend listens on.
pub const PORT: u16 = 8080;

pub struct World {
    pod_a: Process,
    pod_b: Process,
    node: Process,
    remote: Process,
    outside: Process,
    proxy: Option<Process>,
    pub node_namespace: Namespace,
    /// Where nobody listens.
    _quiet: Namespace,
    pub cgroup: PathBuf,
    pub pin_dir: PathBuf,
    host_program: PathBuf,
}

impl World {
    pub fn new(host_program: &Path, name: &str) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the Service scenarios make network namespaces and program their kernel tables: run them as root");
        }
        let (cgroups, pins) = (cgroup2_root()?.join("outrigger-scenarios"), Path::new("/sys/fs/bpf/outrigger-scenarios"));
        sweep(&cgroups, |cgroup| std::fs::remove_dir(cgroup));
        sweep(pins, |pinned| std::fs::remove_dir_all(pinned));
        let own = format!("{name}-{}", std::process::id());
        let (cgroup, pin_dir) = (cgroups.join(&own), pins.join(&own));
        std::fs::create_dir_all(&cgroup).with_context(|| format!("make {}", cgroup.display()))?;

        let [pod_a, pod_b, quiet, node, remote, outside] = std::array::from_fn(|_| Namespace::new());
        let (pod_a, pod_b, quiet, node, remote, outside) = (pod_a?, pod_b?, quiet?, node?, remote?, outside?);
        connect_pod(&node, &pod_a, "pod-a", POD_A, "fd00:244:1::a")?;
        connect_pod(&node, &pod_b, "pod-b", POD_B, "fd00:244:1::b")?;
        connect_pod(&node, &quiet, "pod-q", QUIET, "fd00:244:1::c")?;
        node.sysctl("net.ipv4.ip_forward", "1")?;
        node.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        // Refusals of datagrams are ICMP errors, of which the kernel sends one per second and client when there are many.
        for namespace in [&node, &quiet, &remote] {
            namespace.sysctl("net.ipv4.icmp_ratelimit", "0")?;
            namespace.sysctl("net.ipv6.icmp.ratelimit", "0")?;
        }

        node.link("remote", &remote, "eth0")?;
        node.ip(&format!("addr add {NODE_IP}/24 dev remote"))?;
        node.ip("addr add fd00:77::1/64 dev remote nodad")?;
        remote.ip("addr add 192.168.77.2/24 dev eth0")?;
        remote.ip("addr add fd00:77::2/64 dev eth0 nodad")?;
        remote.ip(&format!("addr add {POD_R}/32 dev lo"))?;
        remote.ip("addr add fd00:244:2::a/128 dev lo")?;
        remote.ip(&format!("addr add {QUIET_R}/32 dev lo"))?;
        remote.ip("addr add fd00:244:2::c/128 dev lo")?;
        node.ip("route add 10.244.2.0/24 via 192.168.77.2")?;
        node.ip("-6 route add fd00:244:2::/64 via fd00:77::2")?;
        // A node has a way out; here it ends at the other node, which forwards nothing.
        node.ip("route add default via 192.168.77.2")?;
        node.ip("-6 route add default via fd00:77::2")?;
        remote.ip(&format!("route add default via {NODE_IP}"))?;
        remote.ip("-6 route add default via fd00:77::1")?;

        node.link("outside", &outside, "eth0")?;
        node.ip(&format!("addr add {NODE_OUTER_IP}/24 dev outside"))?;
        node.ip("addr add fd00:78::1/64 dev outside nodad")?;
        outside.ip(&format!("addr add {OUTSIDE}/24 dev eth0"))?;
        outside.ip("addr add fd00:78::2/64 dev eth0 nodad")?;
        // Somebody may route the Services' range to a node.
        outside.ip(&format!("route add default via {NODE_OUTER_IP}"))?;
        outside.ip("-6 route add default via fd00:78::1")?;

        let start = |namespace: &Namespace, inside: bool| Process::start(namespace, host_program, inside.then_some(&*cgroup));
        let mut world = Self {
            pod_a: start(&pod_a, true)?,
            pod_b: start(&pod_b, true)?,
            node: start(&node, true)?,
            remote: start(&remote, false)?,
            outside: start(&outside, false)?,
            proxy: None,
            node_namespace: node,
            _quiet: quiet,
            cgroup: cgroup.clone(),
            pin_dir,
            host_program: host_program.into(),
        };
        let servers =
            [(Place::PodA, "a", "[::]"), (Place::PodB, "b", "[::]"), (Place::Remote, "r", POD_R), (Place::Remote, "r", "[fd00:244:2::a]")];
        for (place, name, ip) in servers {
            for transport in [Transport::Tcp, Transport::Udp] {
                let address = format!("{ip}:{PORT}").parse().context("server address")?;
                let reply = world.ask(place, &Request::Serve { transport, address, name: name.into() })?;
                anyhow::ensure!(reply == Reply::Done, "serve at {place:?}: {reply:?}");
            }
        }
        Ok(world)
    }

    pub fn ask(&mut self, place: Place, request: &Request) -> Result<Reply> {
        match place {
            Place::PodA => &mut self.pod_a,
            Place::PodB => &mut self.pod_b,
            Place::Node => &mut self.node,
            Place::Remote => &mut self.remote,
            Place::Outside => &mut self.outside,
        }
        .ask(request)
        .with_context(|| format!("at {place:?}"))
    }

    pub fn proxy(&mut self, request: crate::talk::ProxyRequest) -> Result<()> {
        if self.proxy.is_none() {
            self.proxy = Some(Process::start(&self.node_namespace, &self.host_program, Some(&self.cgroup))?);
        }
        let Some(proxy) = self.proxy.as_mut() else { bail!("no proxy") };
        match proxy.ask(&Request::Proxy(request)).context("at the proxy")? {
            Reply::Done => Ok(()),
            other => bail!("the proxy says {other:?}"),
        }
    }

    /// What the running proxy says of itself.
    pub fn proxy_page(&mut self, request: crate::talk::ProxyRequest) -> Result<String> {
        match self.proxy.as_mut().context("no proxy")?.ask(&Request::Proxy(request)).context("at the proxy")? {
            Reply::Page(page) => Ok(page),
            other => bail!("the proxy says {other:?}"),
        }
    }

    /// A command that will run on the node, in its cgroup.
    pub fn node_command(&self, program: impl AsRef<Path>) -> Result<std::process::Command> {
        self.node_namespace.command(program, Some(&self.cgroup))
    }

    /// As `kill -9` does; the kernel keeps what was programmed.
    pub fn kill_proxy(&mut self) {
        self.proxy = None;
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // What can't be removed here is reported by nobody: the test's own outcome matters more.
        let _ = self.proxy(crate::talk::ProxyRequest::Teardown);
        self.kill_proxy();
        for process in [&mut self.pod_a, &mut self.pod_b, &mut self.node, &mut self.remote, &mut self.outside] {
            process.end();
        }
        let _ = std::fs::remove_dir(&self.cgroup);
        let _ = std::fs::remove_dir_all(&self.pin_dir);
    }
}

/// Removes what worlds have left whose processes were killed; the number at the end of a name is that of its process.
fn sweep(folder: &Path, remove: impl Fn(&Path) -> std::io::Result<()>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.rsplit('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // Another world may be doing the same.
            let _ = remove(&entry.path());
        }
    }
}

fn connect_pod(node: &Namespace, pod: &Namespace, name: &str, ip: &str, ip6: &str) -> Result<()> {
    node.link(name, pod, "eth0")?;
    node.sysctl(&format!("net.ipv4.conf.{name}.proxy_arp"), "1")?;
    node.sysctl(&format!("net.ipv4.neigh.{name}.proxy_delay"), "0")?;
    node.ip(&format!("addr add fe80::1/64 dev {name} nodad"))?;
    node.ip(&format!("route add {ip}/32 dev {name}"))?;
    node.ip(&format!("-6 route add {ip6}/128 dev {name}"))?;
    pod.ip(&format!("addr add {ip}/32 dev eth0"))?;
    pod.ip(&format!("addr add {ip6}/128 dev eth0 nodad"))?;
    pod.ip("route add 169.254.1.1 dev eth0 scope link")?;
    pod.ip("route add default via 169.254.1.1")?;
    pod.ip("-6 route add default via fe80::1 dev eth0")
}

fn cgroup2_root() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
    let mount = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let path = words.next()?;
        (words.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    mount.context("cgroup2 is not mounted")
}

/// A process of the host program.
struct Process {
    child: Child,
    requests: ChildStdin,
    replies: BufReader<ChildStdout>,
}

impl Process {
    fn start(namespace: &Namespace, program: &Path, cgroup: Option<&Path>) -> Result<Self> {
        let mut child = namespace
            .command(program, cgroup)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let (Some(requests), Some(replies)) = (child.stdin.take(), child.stdout.take()) else { bail!("no pipes to the host program") };
        Ok(Self { child, requests, replies: BufReader::new(replies) })
    }

    fn ask(&mut self, request: &Request) -> Result<Reply> {
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        self.requests.write_all(line.as_bytes())?;
        let mut reply = String::new();
        self.replies.read_line(&mut reply)?;
        serde_json::from_str(&reply).with_context(|| format!("the host program answered {reply:?}"))
    }

    fn end(&mut self) {
        // Both fail only when the process is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}
