//! Who is measured: going to the backend directly, Outrigger's three ways, and kube-proxy's two.
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use outrigger_scenarios::netns::Namespace;

use crate::api::{CLUSTER_CIDR, CLUSTER_IP, Hub, NODE_PORTS, filler_ip};
use crate::bed::{BACKENDS, Bed, NODE_OUTER_IP, Place, Running, cgroup2};
use crate::load::{IPERF_PORT, LONG_PORT, SHORT_PORT};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Contender {
    Direct,
    Ebpf,
    Nftables,
    Userspace,
    KubeProxyNftables,
    KubeProxyIptables,
}

impl Contender {
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Userspace => "userspace",
            Self::KubeProxyNftables => "kube-proxy-nftables",
            Self::KubeProxyIptables => "kube-proxy-iptables",
        }
    }

    /// Its Node; another in every run, since what is pinned for a node outlives its agent.
    pub fn node(self) -> String {
        format!("bench-{}-{}", std::process::id(), self.name())
    }

    pub fn is_ours(self) -> bool {
        matches!(self, Self::Ebpf | Self::Nftables | Self::Userspace)
    }
}

/// Where upstream's and our programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    pub binaries: PathBuf,
    pub kube_proxy: PathBuf,
}

/// A contender in its bed.
pub struct Entrant {
    pub contender: Contender,
    pub bed: Bed,
    programs: Programs,
    kubeconfig: PathBuf,
}

impl Entrant {
    pub fn new(contender: Contender, number: u8, hub: &Hub, programs: &Programs, directory: &Path) -> Result<Self> {
        let bed = Bed::new(contender.name(), number, &hub.namespace, directory)?;
        bed.route_to_hub(number)?;
        let kubeconfig = hub.kubeconfig("system:kube-proxy", "system:masters")?;
        let mut entrant = Self { contender, bed, programs: programs.clone(), kubeconfig };
        entrant.start(contender.name())?;
        Ok(entrant)
    }

    /// Starts the contender's agent; `mode` may be another of ours than its own.
    pub fn start(&mut self, mode: &str) -> Result<()> {
        self.bed.agent = None;
        if self.contender == Contender::Direct {
            return Ok(());
        }
        let name = self.contender.name();
        let program =
            if self.contender.is_ours() { self.programs.binaries.join("outrigger-node") } else { self.programs.kube_proxy.clone() };
        let mut command = self.bed.agent(&program, self.contender == Contender::Userspace)?;
        if self.contender.is_ours() {
            let cgroup = self.bed.cgroup.strip_prefix(cgroup2()?)?.display().to_string();
            command.args(["run", "--roles", "proxy", "--proxy-mode", mode, "--cgroup-root", &format!("/{cgroup}"), "--data-dir"]);
            command.arg(self.data_dir());
        } else {
            let mode = name.trim_start_matches("kube-proxy-");
            command.args(["--proxy-mode", mode, "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0"]);
            // By nftables it serves NodePorts at the primary address only, unless told otherwise.
            command.args(["--conntrack-tcp-timeout-close-wait=0", "--nodeport-addresses=0.0.0.0/0"]);
        }
        command.arg("--kubeconfig").arg(&self.kubeconfig);
        command.args(["--hostname-override", &self.contender.node(), "--cluster-cidr", CLUSTER_CIDR]);
        let log = std::fs::File::options().create(true).append(true).open(self.bed.directory.join("agent.log"))?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        self.bed.agent = Some(Running(child.with_context(|| format!("start {}", program.display()))?));
        Ok(())
    }

    /// Our own agent's program, which also asks a running one.
    pub fn program(&self) -> PathBuf {
        self.programs.binaries.join("outrigger-node")
    }

    pub fn data_dir(&self) -> PathBuf {
        self.bed.directory.join("data")
    }

    pub fn pid(&self) -> Option<u32> {
        self.bed.agent.as_ref().map(|agent| agent.0.id())
    }

    /// What a client at the place dials for one of the target's ports.
    pub fn address(&self, place: Place, port: u16) -> (String, u16) {
        match (self.contender, place) {
            (Contender::Direct, _) => (BACKENDS[0].into(), port),
            (_, Place::Pod | Place::Node) => (CLUSTER_IP.into(), port),
            (_, Place::Outside) => {
                let index = [SHORT_PORT, LONG_PORT, IPERF_PORT].iter().position(|known| *known == port).unwrap_or(0);
                (NODE_OUTER_IP.into(), NODE_PORTS[index])
            }
        }
    }

    /// Waits until the target is served everywhere, and the last of `services`; says how long that took.
    pub fn settle(&mut self, services: u32, limit: Duration) -> Result<Duration> {
        let started = Instant::now();
        let mut wanted: Vec<(Place, String)> = [Place::Pod, Place::Node, Place::Outside]
            .into_iter()
            .map(|place| {
                let (ip, port) = self.address(place, SHORT_PORT);
                (place, format!("{ip}:{port}"))
            })
            .collect();
        if services > 1 && self.contender != Contender::Direct {
            wanted.push((Place::Pod, format!("{}:80", filler_ip(services - 1))));
        }
        for (place, to) in wanted {
            while !self.answers(place, &to)? {
                if let Some(agent) = &mut self.bed.agent
                    && let Some(status) = agent.0.try_wait()?
                {
                    bail!("{} has ended ({status}): see {}", self.contender.name(), self.bed.directory.join("agent.log").display());
                }
                ensure!(started.elapsed() < limit, "{}: {to} doesn't answer from {place:?}", self.contender.name());
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(started.elapsed())
    }

    fn answers(&self, place: Place, to: &str) -> Result<bool> {
        let mut client = self.bed.plain(place, std::env::current_exe()?)?;
        client.args(["connect-request-response", "--to", to, "--millis", "1"]);
        Ok(client.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?.success())
    }
}

impl Drop for Entrant {
    fn drop(&mut self) {
        self.bed.agent = None;
        // There is none where eBPF was never in use.
        let _ = std::fs::remove_dir_all(Path::new("/sys/fs/bpf/outrigger").join(self.contender.node()));
    }
}

impl Bed {
    /// The API server's address is the same for all.
    fn route_to_hub(&self, number: u8) -> Result<()> {
        self.node_namespace().ip(&format!("route add 10.200.0.1/32 via 10.200.{number}.1"))
    }

    pub fn node_namespace(&self) -> &Namespace {
        self.namespace(Place::Node)
    }
}
