//! A whole lab: the switch, its hosts, and the record of them that other processes read.
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::cgroup::Hierarchies;
use crate::host::{Host, HostSpec};

/// Every lab uses the same addresses: its namespaces can't meet another's.
pub const SUBNET_PREFIX: u8 = 24;
/// The bridge's own address, where the hosts' default route ends: it answers what has no place in the lab with
/// "network unreachable", so that nothing waits for a timeout.
pub const SWITCH: Ipv4Addr = Ipv4Addr::new(10, 89, 0, 1);

/// What a lab is to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LabSpec {
    pub name: String,
    pub directory: PathBuf,
    pub hosts: Vec<HostSpec>,
}

/// A running lab as its first process records it in `<directory>/lab.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Running {
    pub name: String,
    pub pid: u32,
    pub hosts: Vec<RunningHost>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunningHost {
    pub name: String,
    pub pid: u32,
    pub address: Option<Ipv4Addr>,
    pub cgroup: String,
    pub directory: PathBuf,
}

/// The lab in the process that holds it. Dropping it ends the hosts.
pub struct Lab {
    spec: LabSpec,
    switch: Host,
    hosts: Vec<Host>,
}

impl Lab {
    /// The cgroup of everything in the lab `name`.
    pub fn cgroup(name: &str) -> String {
        format!("outrigger/{name}")
    }

    /// Makes the switch; hosts are added by [`Lab::add`].
    pub fn start(executable: &Path, spec: LabSpec) -> Result<Self> {
        let switch = HostSpec {
            name: "switch".into(),
            address: None,
            cgroup: format!("{}/switch", Self::cgroup(&spec.name)),
            directory: spec.directory.join("hosts/switch"),
            programs: Vec::new(),
        };
        let mut switch = Host::spawn(executable, switch)?;
        switch.start_programs()?;
        ip(
            switch.pid,
            &[
                "link set lo up",
                "link add br0 type bridge",
                &format!("address add {SWITCH}/{SUBNET_PREFIX} dev br0"),
                "link set br0 up",
                "route add unreachable default",
            ],
        )?;
        sysctl(switch.pid, "net/ipv4/ip_forward", "1")?;
        let lab = Self { spec, switch, hosts: Vec::new() };
        lab.record()?;
        Ok(lab)
    }

    /// Starts a host, plugs it into the switch and lets its programs go.
    pub fn add(&mut self, executable: &Path, spec: HostSpec) -> Result<&Host> {
        let mut host = Host::spawn(executable, spec)?;
        let port = self.hosts.len();
        ip(
            self.switch.pid,
            &[&format!("link add port{port} type veth peer name eth0 netns {}", host.pid), &format!("link set port{port} master br0 up")],
        )?;
        let address = host.spec.address.context("a host needs an address")?;
        ip(
            host.pid,
            &[
                "link set lo up",
                &format!("address add {address}/{SUBNET_PREFIX} dev eth0"),
                "link set eth0 up",
                &format!("route add default via {SWITCH}"),
            ],
        )?;
        host.start_programs()?;
        self.hosts.push(host);
        self.record()?;
        Ok(&self.hosts[port])
    }

    pub fn hosts(&mut self) -> &mut [Host] {
        &mut self.hosts
    }

    fn record(&self) -> Result<()> {
        let hosts = std::iter::once(&self.switch).chain(&self.hosts);
        let running = Running {
            name: self.spec.name.clone(),
            pid: std::process::id(),
            hosts: hosts
                .map(|host| RunningHost {
                    name: host.spec.name.clone(),
                    pid: host.pid,
                    address: host.spec.address,
                    cgroup: host.spec.cgroup.clone(),
                    directory: host.spec.directory.clone(),
                })
                .collect(),
        };
        let (path, draft) = (self.spec.directory.join("lab.json"), self.spec.directory.join(".lab.json"));
        fs::write(&draft, serde_json::to_vec_pretty(&running)?).with_context(|| format!("write {}", draft.display()))?;
        fs::rename(&draft, &path).with_context(|| format!("write {}", path.display()))
    }

    /// Takes away all that a lab left, however it ended: processes, cgroups, mounts and its directory.
    pub fn destroy(name: &str, directory: &Path) -> Result<()> {
        check_name(name)?;
        if let Ok(running) = Running::read(directory) {
            let pid = Pid::from_raw(running.pid.cast_signed());
            if is_lab(running.pid, name) && kill(pid, Signal::SIGTERM).is_ok() {
                let deadline = Instant::now() + Duration::from_secs(2);
                while is_lab(running.pid, name) && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(20));
                }
                if is_lab(running.pid, name) {
                    let _ = kill(pid, Signal::SIGKILL);
                }
            }
        }
        Hierarchies::detect()?.destroy(&Self::cgroup(name))?;
        if !directory.exists() {
            return Ok(());
        }
        let inside = directory.canonicalize().with_context(|| format!("find {}", directory.display()))?;
        let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
        for path in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)).filter(|path| Path::new(path).starts_with(&inside)) {
            nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH).with_context(|| format!("unmount {path}"))?;
        }
        fs::remove_dir_all(directory).with_context(|| format!("remove {}", directory.display()))
    }
}

/// Names become directories and cgroups, which are removed with all that is in them, and sockets below them have to stay short.
pub fn check_name(name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        !name.is_empty() && name.len() <= 20 && name.chars().all(allowed) && !name.starts_with('-'),
        "{name:?} is no cluster name: use at most 20 of a-z, 0-9 and -"
    );
    Ok(())
}

/// Whether `pid` still is the first process of the lab `name`, and not another that got its number.
fn is_lab(pid: u32, name: &str) -> bool {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = command.split(|byte| *byte == 0);
    words.any(|word| word == b"serve") && words.any(|word| word == name.as_bytes())
}

impl Running {
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("lab.json");
        let text = fs::read(&path).with_context(|| format!("no lab runs here: read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
    }

    /// Whether the lab of that directory runs.
    pub fn is_there(directory: &Path) -> bool {
        Self::read(directory).is_ok_and(|running| running.is_alive())
    }

    pub fn is_alive(&self) -> bool {
        is_lab(self.pid, &self.name)
    }

    pub fn host(&self, name: &str) -> Result<&RunningHost> {
        let names = || self.hosts.iter().map(|host| host.name.as_str()).collect::<Vec<_>>().join(", ");
        self.hosts.iter().find(|host| host.name == name).with_context(|| format!("no host {name} in the lab; it has {}", names()))
    }
}

impl RunningHost {
    /// A command that runs inside the host: in its cgroup, where eBPF programs see it, and in all of its namespaces.
    pub fn command(&self, program: &str) -> Command {
        let join = "for root in /sys/fs/cgroup /sys/fs/cgroup/*; do \
            if [ -e \"$root/$0/init/cgroup.procs\" ]; then echo $$ > \"$root/$0/init/cgroup.procs\"; fi; done; exec nsenter \"$@\"";
        let mut command = Command::new("/bin/sh");
        command.args(["-c", join, &self.cgroup, "--target", &self.pid.to_string()]);
        command.args(["--mount", "--uts", "--ipc", "--net", "--pid", "--", program]);
        command
    }

    /// The processes of the host whose name (`/proc/<pid>/comm`, cut at 15 bytes) is `name`.
    pub fn processes(&self, name: &str) -> Result<Vec<u32>> {
        let comm = &name[..name.len().min(15)];
        let all = Hierarchies::detect()?.processes(&self.cgroup);
        Ok(all.into_iter().filter(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|text| text.trim() == comm)).collect())
    }

    pub fn net_namespace(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.pid).into()
    }
}

fn ip(pid: u32, lines: &[&str]) -> Result<()> {
    for line in lines {
        let mut command = Command::new("nsenter");
        command.args(["--target", &pid.to_string(), "--net", "--", "ip"]).args(line.split(' '));
        let output = command.output().context("run nsenter and ip (packages util-linux and iproute2)")?;
        if !output.status.success() {
            bail!("ip {line}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    Ok(())
}

fn sysctl(pid: u32, name: &str, value: &str) -> Result<()> {
    // /proc/sys/net shows the namespace of the process that opens it.
    crate::netns::within(Path::new(&format!("/proc/{pid}/ns/net")), || {
        fs::write(format!("/proc/sys/{name}"), value).with_context(|| format!("set {name}"))
    })
}
