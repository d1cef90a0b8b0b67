//! One host of the lab: its description, and the outer process that makes its namespaces.
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::cgroup::Hierarchies;

/// What a host is to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostSpec {
    pub name: String,
    /// Its address on the lab's bridge; none for the switch itself.
    pub address: Option<Ipv4Addr>,
    /// Relative to every hierarchy's root; the host's own processes live in `<cgroup>/init`.
    pub cgroup: String,
    /// Where the host keeps what is its own: `tmp`, `log`, `etc`.
    pub directory: PathBuf,
    pub programs: Vec<Program>,
}

/// A program that the host's init keeps running.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Program {
    pub name: String,
    pub command: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// A listening socket of the lab's that the program gets by the LISTEN_FDS protocol: it outlives the program, so
    /// clients that connect while the program is restarted wait instead of being refused.
    #[serde(default)]
    pub listener: Option<i32>,
}

/// A started host. Dropping it ends everything that runs in it.
pub struct Host {
    pub spec: HostSpec,
    /// Of the host's first process, as the lab's own PID namespace numbers it.
    pub pid: u32,
    outer: Child,
    // Its end tells init that the lab is gone.
    start: Option<ChildStdin>,
}

impl Host {
    /// Makes the namespaces; the programs wait for [`Host::start_programs`].
    ///
    /// `executable` answers to `lab host SPEC` and `lab init SPEC` by calling [`outer`] and [`crate::init::run`].
    pub fn spawn(executable: &Path, spec: HostSpec) -> Result<Self> {
        for part in ["tmp", "log", "etc"] {
            let path = spec.directory.join(part);
            std::fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        }
        Hierarchies::detect()?.create(&format!("{}/init", spec.cgroup))?;
        let mut command = Command::new(executable);
        command.args(["lab", "host"]).arg(serde_json::to_string(&spec)?).stdin(Stdio::piped()).stdout(Stdio::piped());
        for listener in spec.programs.iter().filter_map(|program| program.listener) {
            crate::init::inherit(&mut command, listener);
        }
        let mut outer = command.spawn().context("start a host of the lab")?;
        let stdout = outer.stdout.take().context("the host's standard output is not piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("wait for the host")?;
        let Ok(pid) = line.trim().parse() else { bail!("the host {} did not come up; its messages are above", spec.name) };
        let start = outer.stdin.take();
        Ok(Self { spec, pid, outer, start })
    }

    pub fn net_namespace(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.pid).into()
    }

    pub fn start_programs(&mut self) -> Result<()> {
        let start = self.start.as_mut().context("the host has ended")?;
        start.write_all(b"start\n").context("tell the host to start its programs")
    }

    pub fn has_ended(&mut self) -> bool {
        !matches!(self.outer.try_wait(), Ok(None))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The PID namespace's first process takes all others with it.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid.cast_signed()), Signal::SIGKILL);
        let _ = self.outer.wait();
    }
}

/// Makes the host's namespaces and waits for its first process to end: the body of `lab host SPEC`.
pub fn outer(spec: &str) -> Result<()> {
    let parsed: HostSpec = serde_json::from_str(spec).context("parse the host's description")?;
    set_pdeathsig(Signal::SIGKILL).context("tie the host's life to the lab's")?;
    Hierarchies::detect()?.enter(&format!("{}/init", parsed.cgroup), std::process::id())?;
    unshare(
        CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWPID,
    )
    .context("make namespaces: the lab needs root")?;
    let mut init = Command::new("/proc/self/exe");
    init.args(["lab", "init", spec]).stdin(Stdio::inherit()).stdout(Stdio::null());
    // SAFETY: prctl is async-signal-safe.
    unsafe {
        init.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(Into::into));
    }
    let mut init = init.spawn().context("start the host's first process")?;
    println!("{}", init.id());
    init.wait().context("wait for the host's first process")?;
    Ok(())
}
