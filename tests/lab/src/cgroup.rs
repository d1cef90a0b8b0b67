//! Cgroups of the lab, in every hierarchy that the machine has mounted: cgroup v1, v2 or both side by side.
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The mounted hierarchies below `/sys/fs/cgroup`.
#[derive(Clone, Debug)]
pub struct Hierarchies {
    v1: Vec<PathBuf>,
    v2: Option<PathBuf>,
}

impl Hierarchies {
    /// Reads `/proc/self/mounts`.
    pub fn detect() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
        let mut found = Self { v1: Vec::new(), v2: None };
        let mut seen = BTreeSet::new();
        for line in mounts.lines() {
            let mut fields = line.split(' ').skip(1);
            let (Some(path), Some(kind)) = (fields.next(), fields.next()) else { continue };
            if !seen.insert(path.to_owned()) || !path.starts_with("/sys/fs/cgroup") {
                continue;
            }
            match kind {
                "cgroup" => found.v1.push(path.into()),
                "cgroup2" => found.v2 = Some(path.into()),
                _ => {}
            }
        }
        if found.v1.is_empty() && found.v2.is_none() {
            bail!("no cgroup hierarchy is mounted at /sys/fs/cgroup");
        }
        Ok(found)
    }

    /// The cgroup v2 mount point, where eBPF programs attach.
    pub fn v2(&self) -> Option<&Path> {
        self.v2.as_deref()
    }

    fn roots(&self) -> impl Iterator<Item = &PathBuf> {
        self.v1.iter().chain(&self.v2)
    }

    /// Makes the cgroup `path` (such as `outrigger/lab/node-1`) in every hierarchy.
    pub fn create(&self, path: &str) -> Result<()> {
        // Another lab that ends takes parents along that are empty at that moment.
        let is_gone = |error: &anyhow::Error| {
            error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::NotFound)
        };
        let mut made = self.make(path);
        for _ in 0..100 {
            match made {
                Err(error) if is_gone(&error) => made = self.make(path),
                _ => break,
            }
        }
        made
    }

    fn make(&self, path: &str) -> Result<()> {
        for root in self.roots() {
            let mut directory = root.clone();
            for part in path.split('/').filter(|part| !part.is_empty()) {
                if self.v2.as_ref() == Some(root) {
                    enable_controllers(&directory);
                }
                directory.push(part);
                match fs::create_dir(&directory) {
                    Ok(()) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(error).with_context(|| format!("create the cgroup {}", directory.display())),
                }
                inherit_cpuset(&directory)?;
            }
        }
        Ok(())
    }

    /// Moves a process into `path` in every hierarchy.
    pub fn enter(&self, path: &str, pid: u32) -> Result<()> {
        for root in self.roots() {
            let file = root.join(path).join("cgroup.procs");
            fs::write(&file, pid.to_string()).with_context(|| format!("move process {pid} to {}", file.display()))?;
        }
        Ok(())
    }

    /// Every process in `path` or below it, in any hierarchy.
    pub fn processes(&self, path: &str) -> BTreeSet<u32> {
        let mut pids = BTreeSet::new();
        for root in self.roots() {
            for directory in tree(&root.join(path)) {
                let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
                pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
            }
        }
        pids
    }

    pub fn exists(&self, path: &str) -> bool {
        self.roots().any(|root| root.join(path).exists())
    }

    /// Ends every process in `path` and removes the cgroup from every hierarchy.
    pub fn destroy(&self, path: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            for pid in self.processes(path) {
                // A process that ended meanwhile is what we want.
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), nix::sys::signal::Signal::SIGKILL);
            }
            let mut left = Vec::new();
            for root in self.roots() {
                for directory in tree(&root.join(path)) {
                    if let Err(error) = fs::remove_dir(&directory)
                        && error.kind() != std::io::ErrorKind::NotFound
                    {
                        left.push(directory);
                    }
                }
            }
            if left.is_empty() {
                // What only groups labs goes with the last of them; it isn't empty as long as there is another.
                let parents = Path::new(path).ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty());
                for parent in parents {
                    for root in self.roots() {
                        let _ = fs::remove_dir(root.join(parent));
                    }
                }
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("cgroups that can't be removed (processes: {:?}): {left:?}", self.processes(path));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// `directory` and all below it, the deepest first; empty when it isn't there.
fn tree(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let children = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let mut all: Vec<PathBuf> = children.flat_map(|child| tree(&child.path())).collect();
    all.push(directory.to_owned());
    all
}

/// A new v1 cpuset has no CPUs and takes no process until it is given some. One that is there may be as new: somebody else's, made a
/// moment ago.
fn inherit_cpuset(directory: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (own, parent) = (directory.join(file), directory.parent().map(|parent| parent.join(file)));
        if directory.join("cgroup.controllers").exists() || !own.exists() {
            return Ok(());
        }
        if fs::read_to_string(&own).is_ok_and(|value| !value.trim().is_empty()) {
            continue;
        }
        let value = parent.and_then(|parent| fs::read_to_string(parent).ok()).unwrap_or_default();
        fs::write(&own, value.trim()).with_context(|| format!("write {}", own.display()))?;
    }
    Ok(())
}

/// On a machine with cgroup v2 alone the controllers have to be handed down level by level.
fn enable_controllers(directory: &Path) {
    let available = fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        // Refused for controllers that another hierarchy holds; what is missing shows when limits are set.
        let _ = fs::write(directory.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}
