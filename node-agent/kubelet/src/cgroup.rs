//! The QoS tree of cgroups: `<root>/kubepods[/burstable|/besteffort]/pod<uid>`, on cgroup v1 and v2, whichever is mounted.
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use k8s_openapi::api::core::v1::Pod;
use tracing::debug;

use crate::pod::meta::uid_of;
use crate::pod::resources::{CPU_PERIOD, Qos, cpu_quota, cpu_shares, hugepage_limits, pod_limit_milli, pod_request_milli, qos};

const TREE: &str = "kubepods";

/// The hierarchies of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Layout {
    /// One mount for all controllers.
    Unified(PathBuf),
    /// A mount per controller (v1); `others` are hierarchies without limits to set (named ones, and a v2 beside them), in which the
    /// runtime makes cgroups too, so that they have to be cleaned.
    Split {
        cpu: Option<PathBuf>,
        memory: Option<PathBuf>,
        pids: Option<PathBuf>,
        hugetlb: Option<PathBuf>,
        cpuset: Option<PathBuf>,
        others: Vec<PathBuf>,
    },
}

/// How a pod's limits are set while its containers are resized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Only to more: containers that still have their old limits must have room.
    Grow,
    Exact,
}

/// The cgroups of this node's pods.
pub struct Cgroups {
    layout: Layout,
    /// Below each hierarchy, without a leading slash.
    root: PathBuf,
    /// Requests of the burstable pods by UID, in thousandths of a CPU: their sum is the weight of the whole tier.
    burstable: Mutex<std::collections::HashMap<String, i64>>,
}

/// Reads the layout from the text of /proc/self/mountinfo.
fn layout(mountinfo: &str) -> Option<Layout> {
    let mut split: [Option<PathBuf>; 5] = [const { None }; 5];
    let mut others = Vec::new();
    let mut unified = None;
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(point) = left.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut words = right.split(' ');
        match (words.next(), words.nth(1)) {
            (Some("cgroup2"), _) => {
                unified.get_or_insert(point);
            }
            (Some("cgroup"), Some(options)) => {
                let names: Vec<&str> = options.split(',').collect();
                let mut limits = false;
                for (slot, name) in split.iter_mut().zip(["cpu", "memory", "pids", "hugetlb", "cpuset"]) {
                    if names.contains(&name) {
                        slot.get_or_insert(point.clone());
                        limits = true;
                    }
                }
                if !limits {
                    others.push(point);
                }
            }
            _ => {}
        }
    }
    if split.iter().any(Option::is_some) {
        others.extend(unified);
        let [cpu, memory, pids, hugetlb, cpuset] = split;
        return Some(Layout::Split { cpu, memory, pids, hugetlb, cpuset, others });
    }
    unified.map(Layout::Unified)
}

impl Layout {
    fn all(&self) -> Vec<&PathBuf> {
        match self {
            Self::Unified(mount) => vec![mount],
            Self::Split { cpu, memory, pids, hugetlb, cpuset, others } => {
                let mut all: Vec<&PathBuf> = [cpu, memory, pids, hugetlb, cpuset].into_iter().flatten().chain(others).collect();
                all.sort();
                all.dedup();
                all
            }
        }
    }

    /// Those in which the tree is made by the agent; the runtime makes the rest.
    fn own(&self) -> Vec<&PathBuf> {
        match self {
            Self::Unified(mount) => vec![mount],
            Self::Split { cpu, memory, pids, hugetlb, .. } => {
                let mut own: Vec<&PathBuf> = [cpu, memory, pids, hugetlb].into_iter().flatten().collect();
                own.sort();
                own.dedup();
                own
            }
        }
    }
}

/// v1's cpu.shares in v2's cpu.weight, by the runtimes' common formula.
fn weight(shares: i64) -> i64 {
    1 + ((shares.max(2) - 2) * 9999) / 262_142
}

impl Cgroups {
    /// Makes the tree's upper part. `cpus` (thousandths) is the weight of all pods together.
    pub fn open(root: &str, cpus: i64) -> io::Result<Self> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
        let layout = layout(&mountinfo).ok_or_else(|| io::Error::new(ErrorKind::NotFound, "no cgroup hierarchy is mounted"))?;
        debug!(?layout, root, "cgroups");
        let cgroups = Self { layout, root: root.trim_start_matches('/').into(), burstable: Mutex::default() };
        for tier in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
            cgroups.make(&cgroups.tier(tier))?;
        }
        cgroups.set_cpu(&cgroups.tier(Qos::Guaranteed), cpu_shares(cpus), 0)?;
        cgroups.set_cpu(&cgroups.tier(Qos::BestEffort), cpu_shares(0), 0)?;
        cgroups.set_cpu(&cgroups.tier(Qos::Burstable), cpu_shares(0), 0)?;
        Ok(cgroups)
    }

    pub fn is_unified(&self) -> bool {
        matches!(self.layout, Layout::Unified(_))
    }

    /// Guaranteed pods stand directly below the tree's root.
    fn tier(&self, qos: Qos) -> PathBuf {
        let tree = self.root.join(TREE);
        match qos {
            Qos::Guaranteed => tree,
            Qos::Burstable => tree.join("burstable"),
            Qos::BestEffort => tree.join("besteffort"),
        }
    }

    fn pod_path(&self, qos: Qos, uid: &str) -> PathBuf {
        self.tier(qos).join(format!("pod{uid}"))
    }

    /// What the runtime is told as the sandbox's cgroup parent.
    pub fn parent_of(&self, pod: &Pod) -> String {
        format!("/{}", self.pod_path(qos(pod), uid_of(pod)).display())
    }

    /// Makes the pod's cgroup and sets its limits; repeating it is cheap and corrects what changed.
    pub fn set_up_pod(&self, pod: &Pod, fit: Fit) -> io::Result<()> {
        let class = qos(pod);
        let path = self.pod_path(class, uid_of(pod));
        self.make(&path)?;
        let request = pod_request_milli(pod, "cpu");
        let quota = cpu_quota(pod_limit_milli(pod, "cpu").unwrap_or(0));
        let quota = match (fit, self.quota(&path)) {
            (Fit::Grow, Some(before)) if quota > 0 => quota.max(before),
            (Fit::Grow, None) => 0,
            _ => quota,
        };
        self.set_cpu(&path, cpu_shares(request), quota)?;
        let memory = pod_limit_milli(pod, "memory").map(|milli| milli / 1000).filter(|memory| *memory > 0);
        if let Some(memory) = memory.filter(|memory| fit == Fit::Exact || self.memory_limit(pod).is_some_and(|before| *memory > before)) {
            self.set_memory(&path, memory)?;
        }
        let limits = pod.spec.as_ref().map(|spec| spec.containers.iter()).into_iter().flatten();
        for container in limits {
            let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
            for (size, bytes) in hugepage_limits(limits) {
                self.set_hugetlb(&path, &size, bytes)?;
            }
        }
        if class == Qos::Burstable {
            self.weigh_burstable(|requests| requests.insert(uid_of(pod).to_owned(), request))?;
        }
        Ok(())
    }

    fn weigh_burstable<T>(&self, change: impl FnOnce(&mut std::collections::HashMap<String, i64>) -> T) -> io::Result<()> {
        let sum = {
            let mut requests = self.burstable.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let before: i64 = requests.values().sum();
            change(&mut requests);
            let after: i64 = requests.values().sum();
            if before == after {
                return Ok(());
            }
            after
        };
        self.set_cpu(&self.tier(Qos::Burstable), cpu_shares(sum), 0)
    }

    /// Removes the pod's cgroups of every tier and hierarchy, with whatever the runtime left below them.
    pub fn remove_pod(&self, uid: &str) -> io::Result<()> {
        self.weigh_burstable(|requests| requests.remove(uid))?;
        for hierarchy in self.layout.all() {
            for tier in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
                remove_tree(&hierarchy.join(self.pod_path(tier, uid)))?;
            }
        }
        Ok(())
    }

    /// UIDs of all pods that have a cgroup.
    pub fn pods(&self) -> Vec<String> {
        let mut uids = Vec::new();
        for hierarchy in self.layout.all() {
            for tier in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
                let Ok(entries) = fs::read_dir(hierarchy.join(self.tier(tier))) else { continue };
                let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
                uids.extend(names.filter_map(|name| name.strip_prefix("pod").map(str::to_owned)));
            }
        }
        uids.sort();
        uids.dedup();
        uids
    }

    fn make(&self, path: &Path) -> io::Result<()> {
        for hierarchy in self.layout.own() {
            fs::create_dir_all(hierarchy.join(path))?;
        }
        if let Layout::Unified(mount) = &self.layout {
            delegate(mount, path)?;
        }
        Ok(())
    }

    fn set_cpu(&self, path: &Path, shares: i64, quota: i64) -> io::Result<()> {
        match &self.layout {
            Layout::Unified(mount) => {
                write(&mount.join(path), "cpu.weight", &weight(shares).to_string())?;
                let quota = if quota > 0 { quota.to_string() } else { "max".into() };
                write(&mount.join(path), "cpu.max", &format!("{quota} {CPU_PERIOD}"))
            }
            Layout::Split { cpu: Some(mount), .. } => {
                let dir = mount.join(path);
                write(&dir, "cpu.shares", &shares.to_string())?;
                write(&dir, "cpu.cfs_period_us", &CPU_PERIOD.to_string())?;
                write(&dir, "cpu.cfs_quota_us", &if quota > 0 { quota } else { -1 }.to_string())
            }
            Layout::Split { .. } => Ok(()),
        }
    }

    /// The CPU quota that is set; `None`: no limit.
    fn quota(&self, path: &Path) -> Option<i64> {
        let text = match &self.layout {
            Layout::Unified(mount) => fs::read_to_string(mount.join(path).join("cpu.max")),
            Layout::Split { cpu: Some(mount), .. } => fs::read_to_string(mount.join(path).join("cpu.cfs_quota_us")),
            Layout::Split { .. } => return None,
        };
        text.ok()?.split_whitespace().next()?.parse().ok().filter(|quota| *quota > 0)
    }

    fn memory_file(&self, pod: &Pod, unified: &str, split: &str) -> Option<i64> {
        let path = self.pod_path(qos(pod), uid_of(pod));
        let text = match &self.layout {
            Layout::Unified(mount) => fs::read_to_string(mount.join(path).join(unified)),
            Layout::Split { memory: Some(mount), .. } => fs::read_to_string(mount.join(path).join(split)),
            Layout::Split { .. } => return None,
        };
        text.ok()?.trim().parse().ok()
    }

    /// The pod's memory limit that is set; v1 shows none as a very large number, v2 as `None`.
    pub fn memory_limit(&self, pod: &Pod) -> Option<i64> {
        self.memory_file(pod, "memory.max", "memory.limit_in_bytes")
    }

    /// How many processes and threads the pod has.
    pub fn processes(&self, pod: &Pod) -> Option<i64> {
        let path = self.pod_path(qos(pod), uid_of(pod));
        let mount = match &self.layout {
            Layout::Unified(mount) | Layout::Split { pids: Some(mount), .. } => mount,
            Layout::Split { .. } => return None,
        };
        fs::read_to_string(mount.join(path).join("pids.current")).ok()?.trim().parse().ok()
    }

    /// Bytes that the pod's processes use, caches included.
    pub fn memory_usage(&self, pod: &Pod) -> Option<i64> {
        self.memory_file(pod, "memory.current", "memory.usage_in_bytes")
    }

    fn set_memory(&self, path: &Path, bytes: i64) -> io::Result<()> {
        match &self.layout {
            Layout::Unified(mount) => write(&mount.join(path), "memory.max", &bytes.to_string()),
            Layout::Split { memory: Some(mount), .. } => write(&mount.join(path), "memory.limit_in_bytes", &bytes.to_string()),
            Layout::Split { .. } => Ok(()),
        }
    }

    fn set_hugetlb(&self, path: &Path, size: &str, bytes: u64) -> io::Result<()> {
        match &self.layout {
            Layout::Unified(mount) => write(&mount.join(path), &format!("hugetlb.{size}.max"), &bytes.to_string()),
            Layout::Split { hugetlb: Some(mount), .. } => {
                write(&mount.join(path), &format!("hugetlb.{size}.limit_in_bytes"), &bytes.to_string())
            }
            Layout::Split { .. } => Ok(()),
        }
    }
}

/// Lets the children of every cgroup on the way use all controllers that it has.
fn delegate(mount: &Path, path: &Path) -> io::Result<()> {
    let mut dir = mount.to_owned();
    let mut parts: Vec<_> = path.components().collect();
    parts.pop();
    for part in std::iter::once(None).chain(parts.into_iter().map(Some)) {
        if let Some(part) = part {
            dir.push(part);
        }
        let has = fs::read_to_string(dir.join("cgroup.controllers"))?;
        let enabled = fs::read_to_string(dir.join("cgroup.subtree_control"))?;
        for name in has.split_whitespace().filter(|name| !enabled.split_whitespace().any(|enabled| enabled == *name)) {
            // Some can't be (a cgroup with processes of its own, or a controller that is threaded only): the others still can.
            if let Err(error) = fs::write(dir.join("cgroup.subtree_control"), format!("+{name}")) {
                debug!(cgroup = %dir.display(), controller = name, %error, "controller not delegated");
            }
        }
    }
    Ok(())
}

/// Sets one value unless it's set already. A file that the kernel doesn't have means a controller that isn't there.
fn write(dir: &Path, file: &str, value: &str) -> io::Result<()> {
    let path = dir.join(file);
    match fs::read_to_string(&path) {
        Ok(current) if current.trim() == value => return Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        _ => {}
    }
    fs::write(&path, value).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io::Error::new(error.kind(), format!("{}: {error}", dir.display()))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts() {
        let pure = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(layout(pure), Some(Layout::Unified("/sys/fs/cgroup".into())));
        let mixed = "1 1 0:1 / /c/cpu rw - cgroup cgroup rw,cpu\n2 1 0:2 / /c/cpuacct rw - cgroup cgroup rw,cpuacct\n3 1 0:3 / /c/memory rw - cgroup cgroup rw,memory\n4 1 0:4 / /c/systemd rw - cgroup cgroup rw,name=systemd\n5 1 0:5 / /c/unified rw - cgroup2 cgroup2 rw\n";
        let Some(Layout::Split { cpu, memory, pids, others, .. }) = layout(mixed) else { panic!("a split layout") };
        assert_eq!((cpu, memory, pids), (Some("/c/cpu".into()), Some("/c/memory".into()), None));
        assert_eq!(others, [PathBuf::from("/c/cpuacct"), "/c/systemd".into(), "/c/unified".into()]);
        assert_eq!(layout(""), None);
    }

    #[test]
    fn weights_span_the_range() {
        assert_eq!((weight(2), weight(1024), weight(262_144)), (1, 39, 10_000));
    }
}
