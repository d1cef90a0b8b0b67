//! Network namespaces without names: they live as long as the processes in them.
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace, kept alive by an open file.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// Made on a thread of its own, so that the caller stays where it is.
    pub fn new() -> Result<Self> {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace (this test needs root)")?;
            File::open("/proc/thread-self/ns/net").context("open the new network namespace")
        });
        let file = made.join().map_err(|_| anyhow::anyhow!("the thread that makes a namespace panicked"))??;
        let namespace = Self { file };
        // Until it has looked for doubles of its link-local address, an interface can't ask for the neighbours of those it forwards for.
        namespace.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// A command that will run in here, in the given cgroup2 folder.
    pub fn command(&self, program: impl AsRef<Path>, cgroup: Option<&Path>) -> Result<Command> {
        let namespace = self.file.try_clone()?;
        let procs = cgroup.map(|cgroup| File::options().write(true).open(cgroup.join("cgroup.procs"))).transpose()?;
        let mut command = Command::new(program.as_ref());
        let enter = move || {
            if let Some(procs) = &procs {
                nix::unistd::write(procs, b"0")?;
            }
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            Ok(())
        };
        // SAFETY: only write(2) and setns(2) on descriptors that are open already are called between fork and exec.
        unsafe { command.pre_exec(enter) };
        Ok(command)
    }

    /// For a thread of its own: calling the result moves that thread in here for good.
    pub fn enter(&self) -> Result<impl FnOnce() -> Result<()> + Send + use<>> {
        let namespace = self.file.try_clone()?;
        Ok(move || setns(&namespace, CloneFlags::CLONE_NEWNET).context("enter a network namespace"))
    }

    /// Runs `ip` with the words of `arguments`.
    pub fn ip(&self, arguments: &str) -> Result<()> {
        self.run(&format!("ip {arguments}"))
    }

    /// Runs the program that is the command's first word.
    pub fn run(&self, command: &str) -> Result<()> {
        let mut words = command.split_whitespace();
        let program = words.next().context("an empty command")?;
        let output = self.command(program, None)?.args(words).stdin(Stdio::null()).output()?;
        ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let assignment = format!("{name}={value}");
        let output = self.command("sysctl", None)?.args(["-qw", &assignment]).output()?;
        ensure!(output.status.success(), "sysctl {assignment}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// A veth pair between this namespace and `other`.
    pub fn link(&self, name: &str, other: &Self, other_name: &str) -> Result<()> {
        // The command's own child sees the other namespace through the descriptor of this process.
        let path = format!("/proc/{}/fd/{}", std::process::id(), other.file.as_raw_fd());
        self.ip(&format!("link add {name} type veth peer name {other_name} netns {path}"))?;
        self.ip(&format!("link set {name} up"))?;
        other.ip(&format!("link set {other_name} up"))
    }
}
