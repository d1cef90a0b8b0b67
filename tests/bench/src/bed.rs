//! One contender's own small world: a node with a client pod, another node that the backends are on, and a client outside.
//!
//! ```text
//! pod 10.244.1.10 ── node ── 192.168.77.2 far (10.244.2.10 to .13 are the backends)
//!                     ├───── 192.168.78.2 outside
//!                     └───── hub (the API server)
//! ```
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use outrigger_scenarios::netns::Namespace;

use crate::load::IPERF_PORT;

pub const BACKENDS: [&str; 4] = ["10.244.2.10", "10.244.2.11", "10.244.2.12", "10.244.2.13"];
pub const NODE_IP: &str = "192.168.77.1";
pub const NODE_OUTER_IP: &str = "192.168.78.1";
const CLIENT_CORE: usize = 0;
const SERVER_CORE: usize = 1;
/// Above all that runs by chance at the same time.
const REALTIME: i32 = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Pod,
    Node,
    Outside,
}

/// A child that ends with its owner.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub struct Bed {
    // Processes end before their namespaces.
    servers: Vec<Running>,
    pub agent: Option<Running>,
    pod: Namespace,
    node: Namespace,
    far: Namespace,
    outside: Namespace,
    pub cgroup: PathBuf,
    pub directory: PathBuf,
}

impl Bed {
    /// `number` tells the beds' links to the hub apart.
    pub fn new(name: &str, number: u8, hub: &Namespace, directory: &Path) -> Result<Self> {
        let [pod, node, far, outside] = std::array::from_fn(|_| Namespace::new());
        let (pod, node, far, outside) = (pod?, node?, far?, outside?);
        node.link("pod", &pod, "eth0")?;
        node.sysctl("net.ipv4.conf.pod.proxy_arp", "1")?;
        node.ip("route add 10.244.1.10/32 dev pod")?;
        pod.ip("addr add 10.244.1.10/32 dev eth0")?;
        pod.ip("route add 169.254.1.1 dev eth0 scope link")?;
        pod.ip("route add default via 169.254.1.1")?;
        node.link("far", &far, "eth0")?;
        node.ip(&format!("addr add {NODE_IP}/24 dev far"))?;
        far.ip("addr add 192.168.77.2/24 dev eth0")?;
        node.ip("route add 10.244.2.0/24 via 192.168.77.2")?;
        node.ip("route add default via 192.168.77.2")?;
        far.ip(&format!("route add default via {NODE_IP}"))?;
        for ip in BACKENDS {
            far.ip(&format!("addr add {ip}/32 dev lo"))?;
        }
        node.link("outside", &outside, "eth0")?;
        node.ip(&format!("addr add {NODE_OUTER_IP}/24 dev outside"))?;
        outside.ip("addr add 192.168.78.2/24 dev eth0")?;
        outside.ip(&format!("route add default via {NODE_OUTER_IP}"))?;
        node.sysctl("net.ipv4.ip_forward", "1")?;
        node.link("hub", hub, &format!("bed{number}"))?;
        node.ip(&format!("addr add 10.200.{number}.2/24 dev hub"))?;
        hub.ip(&format!("addr add 10.200.{number}.1/24 dev bed{number}"))?;
        for client in [&pod, &node, &outside] {
            // As many ports as there can be, so that measurements a minute apart don't meet.
            client.sysctl("net.ipv4.ip_local_port_range", "1100 65000")?;
        }
        let cgroup = cgroup2()?.join("outrigger-bench").join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir_all(&cgroup).with_context(|| format!("make {}", cgroup.display()))?;
        let directory = directory.join(name);
        std::fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        let mut bed = Self { servers: Vec::new(), agent: None, pod, node, far, outside, cgroup, directory };
        bed.serve()?;
        Ok(bed)
    }

    fn serve(&mut self) -> Result<()> {
        let mut own = inside(&self.far, std::env::current_exe()?, None)?;
        own.arg("serve");
        let mut iperf = inside(&self.far, "iperf3", None)?;
        iperf.args(["--server", "--port", &IPERF_PORT.to_string()]);
        for command in [&mut own, &mut iperf] {
            pin(command, SERVER_CORE);
            let server =
                command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("start a server (iperf3 has to be installed)")?;
            self.servers.push(Running(server));
        }
        Ok(())
    }

    pub fn namespace(&self, place: Place) -> &Namespace {
        match place {
            Place::Pod => &self.pod,
            Place::Node => &self.node,
            Place::Outside => &self.outside,
        }
    }

    /// A measuring client's command.
    pub fn client(&self, place: Place, program: impl AsRef<Path>) -> Result<Command> {
        let mut command = self.plain(place, program)?;
        pin(&mut command, CLIENT_CORE);
        Ok(command)
    }

    /// A command at the place that is measured by nobody.
    pub fn plain(&self, place: Place, program: impl AsRef<Path>) -> Result<Command> {
        // Outside there is no cgroup of the node's, so nothing sees its sockets.
        let cgroup = (place != Place::Outside).then_some(&*self.cgroup);
        inside(self.namespace(place), program, cgroup)
    }

    /// The agent's command: pinned to nothing, but where it carries the traffic itself it may not wait for others either.
    pub fn agent(&self, program: &Path, carries: bool) -> Result<Command> {
        let mut command = inside(&self.node, program, Some(&self.cgroup))?;
        if carries {
            prefer(&mut command);
        }
        Ok(command)
    }

    /// A backend's address vanishes, as when its machine loses power: nobody says a word.
    pub fn silence(&self, ip: &str) -> Result<()> {
        self.far.ip(&format!("addr del {ip}/32 dev lo"))
    }

    pub fn restore(&self, ip: &str) -> Result<()> {
        self.far.ip(&format!("addr add {ip}/32 dev lo"))
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.agent = None;
        self.servers.clear();
        // It stays when somebody is still in it.
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

/// A command that will run in the namespace, and ends with this process however that ends.
pub fn inside(namespace: &Namespace, program: impl AsRef<Path>, cgroup: Option<&Path>) -> Result<Command> {
    let mut command = namespace.command(program, cgroup)?;
    let follow = || Ok(nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?);
    // SAFETY: only prctl(2) is called between fork and exec.
    unsafe { command.pre_exec(follow) };
    Ok(command)
}

pub fn cgroup2() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
    let found = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|words| words.get(2) == Some(&"cgroup2"));
    Ok(found.context("cgroup2 is not mounted")?[1].into())
}

/// Client and server each get a core of their own, and go before everything that isn't measured: where both have to share a core, or
/// wait for strangers, rates are the scheduler's.
fn pin(command: &mut Command, core: usize) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let act = move || {
        let mut set = nix::sched::CpuSet::new();
        set.set(core % cores)?;
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?;
        realtime()
    };
    // SAFETY: only sched_setaffinity(2) and sched_setscheduler(2) are called between fork and exec.
    unsafe { command.pre_exec(act) };
}

fn prefer(command: &mut Command) {
    // SAFETY: only sched_setscheduler(2) is called between fork and exec.
    unsafe { command.pre_exec(realtime) };
}

fn realtime() -> std::io::Result<()> {
    // SAFETY: a zeroed sched_param is valid; pid 0 is the caller. Without the privilege the run is just noisier.
    unsafe {
        let mut param: libc::sched_param = std::mem::zeroed();
        param.sched_priority = REALTIME;
        libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param);
    }
    Ok(())
}

/// What a process holds in memory, and in eBPF maps, in bytes.
pub fn memory(pid: u32) -> Result<(u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid} is gone"))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kilobytes: u64 = resident.trim().trim_end_matches(" kB").parse()?;
    let mut maps = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))?.flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).and_then(|value| value.trim().parse::<u64>().ok());
        if text.contains("map_type:")
            && let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:"))
        {
            maps.insert(id, bytes);
        }
    }
    ensure!(kilobytes > 0, "process {pid} has ended");
    Ok((kilobytes * 1024, maps.values().sum()))
}
