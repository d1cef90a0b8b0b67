//! A lab on the real kernel: hosts reach each other and nothing else, programs are kept running, nothing is left.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use outrigger_lab::{HostSpec, Lab, LabSpec, Program, Running, cgroup::Hierarchies};

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_outrigger-lab");

fn host(lab: &str, directory: &Path, index: u8, programs: Vec<Program>) -> HostSpec {
    let name = format!("host-{index}");
    HostSpec {
        cgroup: format!("{}/{name}", Lab::cgroup(lab)),
        directory: directory.join("hosts").join(&name),
        address: Some([10, 89, 0, 10 + index].into()),
        name,
        programs,
    }
}

fn start(name: &str) -> Result<(Lab, PathBuf)> {
    ensure!(nix::unistd::geteuid().is_root(), "this test makes namespaces, mounts and cgroups: run it as root");
    let directory = PathBuf::from("/var/lib/outrigger").join(name);
    Lab::destroy(name, &directory)?;
    fs::create_dir_all(&directory)?;
    let lab = Lab::start(Path::new(EXECUTABLE), LabSpec { name: name.into(), directory: directory.clone(), hosts: Vec::new() })?;
    Ok((lab, directory))
}

fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        ensure!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn hosts_reach_each_other_and_nothing_else() -> Result<()> {
    let (mut lab, directory) = start("labtest-net")?;
    for index in 1..=2 {
        lab.add(Path::new(EXECUTABLE), host("labtest-net", &directory, index, Vec::new()))?;
    }
    let running = Running::read(&directory)?;
    let first = running.host("host-1")?;
    let dial = |address: &str| format!("exec 3<>/dev/tcp/{address}/9");
    // A refused connection proves the way there and back; a place outside answers that it can't be reached.
    let near = first.command("bash").args(["-c", &dial("10.89.0.12")]).output()?;
    ensure!(String::from_utf8_lossy(&near.stderr).contains("refused"), "host-2 is not reached: {near:?}");
    let far = first.command("bash").args(["-c", &dial("192.0.2.1")]).output()?;
    ensure!(String::from_utf8_lossy(&far.stderr).contains("No route"), "a way out of the lab: {far:?}");
    ensure!(succeeds(first.command("test").args(["-d", "/sys/fs/cgroup"])), "no cgroups in the host");
    ensure!(succeeds(first.command("sh").args(["-c", "test $(hostname) = host-1 && test -z \"$(cat /etc/resolv.conf)\""])));
    drop(lab);
    Lab::destroy("labtest-net", &directory)?;
    ensure!(!directory.exists());
    Ok(())
}

#[test]
fn a_killed_program_comes_back_and_a_destroyed_lab_leaves_nothing() -> Result<()> {
    let (mut lab, directory) = start("labtest-kill")?;
    let sleep = Program { name: "sleep".into(), command: vec!["sleep".into(), "1000".into()], env: [].into(), listener: None };
    lab.add(Path::new(EXECUTABLE), host("labtest-kill", &directory, 1, vec![sleep]))?;
    let running = Running::read(&directory)?;
    let first = running.host("host-1")?;
    let pid = eventually("the program's start", || first.processes("sleep").ok()?.first().copied())?;
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL)?;
    eventually("the program's restart", || first.processes("sleep").ok()?.first().copied().filter(|again| *again != pid))?;

    // A process that left every parent behind is still found by its cgroup.
    ensure!(succeeds(first.command("sh").args(["-c", "setsid sleep 1001 >/dev/null 2>&1 &"])));
    drop(lab);
    Lab::destroy("labtest-kill", &directory).context("destroy")?;
    ensure!(Hierarchies::detect()?.processes("outrigger/labtest-kill").is_empty());
    ensure!(!Hierarchies::detect()?.exists("outrigger/labtest-kill") && !directory.exists());
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    ensure!(!mounts.contains("labtest-kill"), "mounts are left");
    Ok(())
}
