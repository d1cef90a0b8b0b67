//! A host's first process: mounts what a machine has, then keeps the host's programs running.
use std::fs;
use std::io::BufRead;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::host::{HostSpec, Program};

/// The body of `lab init SPEC`; returns when the lab is gone.
pub fn run(spec: &str) -> Result<()> {
    // The lab waits for its signals blocked, which all that runs in the host would inherit, containers included.
    SigSet::empty().thread_set_mask().context("unblock signals")?;
    let spec: HostSpec = serde_json::from_str(spec).context("parse the host's description")?;
    mounts(&spec).context("mount the host's file systems")?;
    for listener in spec.programs.iter().filter_map(|program| program.listener) {
        // SAFETY: fcntl on a descriptor number that the parent handed down for this purpose; no memory is involved.
        unsafe { libc::fcntl(listener, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    nix::unistd::sethostname(&spec.name).context("set the host's name")?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).context("wait for the lab")?;
    if line.is_empty() {
        return Ok(());
    }
    std::thread::spawn(|| {
        // The lab holds the other end: its end of file means that nobody is left to run for.
        let _ = std::io::stdin().lock().read_line(&mut String::new());
        std::process::exit(0);
    });
    supervise(&spec)
}

fn mounts(spec: &HostSpec) -> Result<()> {
    const NONE: Option<&str> = None;
    // Private towards the machine, then shared within the host: pods may ask for mount propagation.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).context("make the mounts private")?;
    let cgroups = spec.directory.join("etc/cgroup");
    fs::create_dir_all(&cgroups)?;
    mount(Some("/sys/fs/cgroup"), &cgroups, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE).context("keep the cgroups")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), NONE).context("mount /proc")?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), NONE).context("mount /sys")?;
    mount(Some(&cgroups), "/sys/fs/cgroup", NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE).context("bring the cgroups back")?;
    nix::mount::umount2(&cgroups, nix::mount::MntFlags::MNT_DETACH).context("drop the cgroups' second place")?;
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), NONE).context("mount /sys/fs/bpf")?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context("mount /run")?;
    bind(&spec.directory.join("tmp"), Path::new("/tmp"))?;
    bind(&spec.directory.join("log"), Path::new("/var/log"))?;
    for (name, text) in [("resolv.conf", String::new()), ("hostname", format!("{}\n", spec.name)), ("hosts", hosts(spec))] {
        let own = spec.directory.join("etc").join(name);
        fs::write(&own, text).with_context(|| format!("write {}", own.display()))?;
        bind(&own, &Path::new("/etc").join(name))?;
    }
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SHARED, NONE).context("share the mounts within the host")
}

fn hosts(spec: &HostSpec) -> String {
    let own = spec.address.map(|address| format!("{address} {}\n", spec.name)).unwrap_or_default();
    format!("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{own}")
}

fn bind(own: &Path, over: &Path) -> Result<()> {
    if !over.exists() {
        return Ok(());
    }
    mount(Some(own), over, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("mount {} over {}", own.display(), over.display()))
}

/// A program's restart clock: at once after a long life, after up to 5 s when it keeps dying.
struct Slot<'a> {
    program: &'a Program,
    pid: Option<Pid>,
    started: Instant,
    delay: Duration,
    due: Instant,
}

fn supervise(spec: &HostSpec) -> Result<()> {
    let now = Instant::now();
    let mut slots: Vec<Slot<'_>> =
        spec.programs.iter().map(|program| Slot { program, pid: None, started: now, delay: Duration::ZERO, due: now }).collect();
    loop {
        for slot in &mut slots {
            if slot.pid.is_none() && Instant::now() >= slot.due {
                slot.started = Instant::now();
                match start(spec, slot.program) {
                    Ok(pid) => slot.pid = Some(pid),
                    Err(error) => {
                        eprintln!("{}: {error:#}", slot.program.name);
                        back_off(slot);
                    }
                }
            }
        }
        // As the first process of a PID namespace it inherits every orphan, so it waits for any child.
        let flags = if slots.iter().all(|slot| slot.pid.is_some()) { WaitPidFlag::empty() } else { WaitPidFlag::WNOHANG };
        match waitpid(None, Some(flags)) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => {
                if let Some(slot) = slots.iter_mut().find(|slot| slot.pid == Some(pid)) {
                    slot.pid = None;
                    back_off(slot);
                }
            }
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn back_off(slot: &mut Slot<'_>) {
    let long_life = slot.started.elapsed() > Duration::from_secs(10);
    slot.delay = if long_life { Duration::ZERO } else { (slot.delay * 2).clamp(Duration::from_millis(100), Duration::from_secs(5)) };
    slot.due = Instant::now() + slot.delay;
}

fn start(spec: &HostSpec, program: &Program) -> Result<Pid> {
    let path = spec.directory.join("log").join(format!("{}.log", program.name));
    let log = fs::File::options().create(true).append(true).open(&path).with_context(|| format!("open {}", path.display()))?;
    let mut command = if let Some(listener) = program.listener {
        // LISTEN_PID has to name the process that is going to run the program, so that process sets it.
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &format!("LISTEN_PID=$$ exec \"$@\" 3<&{listener}"), "sh"]).args(&program.command).env("LISTEN_FDS", "1");
        inherit(&mut command, listener);
        command
    } else {
        let mut command = Command::new(&program.command[0]);
        command.args(&program.command[1..]);
        command
    };
    command.envs(&program.env).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // SAFETY: prctl is async-signal-safe.
    unsafe {
        command.pre_exec(|| nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(Into::into));
    }
    let child = command.spawn().with_context(|| format!("start {}", program.command[0]))?;
    Ok(Pid::from_raw(child.id().cast_signed()))
}

/// Lets `command` keep the descriptor across its exec.
pub(crate) fn inherit(command: &mut Command, descriptor: i32) {
    // SAFETY: fcntl is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(move || if libc::fcntl(descriptor, libc::F_SETFD, 0) < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) });
    }
}
