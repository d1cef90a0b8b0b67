//! The machine under the node: processors, memory, disk, and what identifies it.
use std::path::Path;

use k8s_openapi::api::core::v1::{NodeSwapStatus, NodeSystemInfo};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use nix::sys::statvfs::statvfs;

use crate::pod::resources::page_size_name;
use crate::quantity::Resources;

/// The level of the Kubernetes API that this kubelet speaks.
pub const KUBELET_VERSION: &str = "v1.35.4";

#[derive(Clone, Debug, Default)]
pub struct Machine {
    pub cpus: i64,
    /// Bytes.
    pub memory: i64,
    /// Sizes in bytes and how many pages of each are set aside.
    pub hugepages: Vec<(u64, u64)>,
    pub kernel: String,
    pub os_image: String,
    pub machine_id: String,
    pub system_uuid: String,
    pub boot_id: String,
    pub swap: u64,
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// `Name:   123 kB` -> bytes
fn meminfo(text: &str, name: &str) -> Option<i64> {
    let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse::<i64>().ok().map(|kilobytes| kilobytes * 1024)
}

fn os_image(os_release: &str) -> String {
    let line = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    line.map_or_else(|| "Linux".into(), |name| name.trim_matches('"').to_owned())
}

impl Machine {
    pub fn read() -> Self {
        let memory = read("/proc/meminfo");
        let cpus = std::thread::available_parallelism().map_or(1, |count| i64::try_from(count.get()).unwrap_or(1));
        let mut hugepages = Vec::new();
        for entry in std::fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let size = name.strip_prefix("hugepages-").and_then(|name| name.strip_suffix("kB")).and_then(|size| size.parse::<u64>().ok());
            let count = read(&entry.path().join("nr_hugepages").display().to_string()).parse().unwrap_or(0);
            hugepages.extend(size.map(|size| (size * 1024, count)));
        }
        hugepages.sort_unstable();
        Self {
            cpus,
            memory: meminfo(&memory, "MemTotal").unwrap_or(0),
            hugepages,
            kernel: read("/proc/sys/kernel/osrelease"),
            os_image: os_image(&read("/etc/os-release")),
            machine_id: read("/etc/machine-id"),
            system_uuid: read("/sys/class/dmi/id/product_uuid"),
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            swap: meminfo(&memory, "SwapTotal").and_then(|swap| u64::try_from(swap).ok()).unwrap_or(0),
        }
    }

    /// Limits for every page size that the machine has: what isn't asked for is zero.
    pub fn hugepage_limits(&self, asked: &[(String, u64)]) -> Vec<(String, u64)> {
        let limit = |name: &str| asked.iter().find(|(size, _)| size == name).map_or(0, |(_, bytes)| *bytes);
        self.hugepages.iter().map(|(size, _)| page_size_name(*size)).map(|name| (name.clone(), limit(&name))).collect()
    }

    pub fn capacity(&self, disk: &Path, pods: u32) -> Resources {
        let mut capacity = Resources::from([
            ("cpu".to_owned(), Quantity(self.cpus.to_string())),
            ("memory".to_owned(), Quantity(format!("{}Ki", self.memory / 1024))),
            ("pods".to_owned(), Quantity(pods.to_string())),
        ]);
        if let Some((size, _)) = disk_space(disk) {
            capacity.insert("ephemeral-storage".into(), Quantity(format!("{}Ki", size / 1024)));
        }
        for (size, count) in &self.hugepages {
            let bytes = size * count;
            let text = if bytes == 0 { "0".into() } else { format!("{}Ki", bytes / 1024) };
            capacity.insert(format!("hugepages-{}", binary_size(*size)), Quantity(text));
        }
        capacity
    }

    /// What pods may use: all but the memory that is set aside as huge pages.
    pub fn allocatable(&self, capacity: &Resources) -> Resources {
        let mut allocatable = capacity.clone();
        let huge: u64 = self.hugepages.iter().map(|(size, count)| size * count).sum();
        if huge > 0 {
            let left = self.memory - i64::try_from(huge).unwrap_or(0);
            allocatable.insert("memory".into(), Quantity(format!("{}Ki", left / 1024)));
        }
        allocatable
    }

    pub fn system_info(&self, runtime_version: String) -> NodeSystemInfo {
        NodeSystemInfo {
            architecture: architecture().into(),
            boot_id: self.boot_id.clone(),
            container_runtime_version: runtime_version,
            kernel_version: self.kernel.clone(),
            kube_proxy_version: String::new(),
            kubelet_version: KUBELET_VERSION.into(),
            machine_id: self.machine_id.clone(),
            operating_system: "linux".into(),
            os_image: self.os_image.clone(),
            swap: (self.swap > 0).then(|| NodeSwapStatus { capacity: i64::try_from(self.swap).ok() }),
            system_uuid: if self.system_uuid.is_empty() { self.machine_id.clone() } else { self.system_uuid.clone() },
        }
    }
}

/// `2097152` -> `2Mi`
fn binary_size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")];
    let unit = UNITS.iter().find(|(size, _)| bytes.is_multiple_of(*size));
    unit.map_or_else(|| bytes.to_string(), |(size, name)| format!("{}{name}", bytes / size))
}

/// Size and free bytes of the file system.
pub fn disk_space(path: &Path) -> Option<(u64, u64)> {
    let facts = statvfs(path).ok()?;
    let block = facts.fragment_size();
    // What is reserved is nobody's to use: it is no part of the size, or a half empty disk may look full.
    let reserved = facts.blocks_free().saturating_sub(facts.blocks_available());
    Some((facts.blocks().saturating_sub(reserved) * block, facts.blocks_available() * block))
}

/// As Go calls it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Free memory as upstream's eviction sees it: what the kernel could hand out.
pub fn available_memory() -> Option<i64> {
    meminfo(&read("/proc/meminfo"), "MemAvailable")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_the_system() {
        assert_eq!(meminfo("MemTotal:   1024 kB\nMemFree: 1 kB\n", "MemTotal"), Some(1 << 20));
        assert_eq!(os_image("NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n"), "Debian GNU/Linux 12");
        assert_eq!(binary_size(2 << 20), "2Mi");
    }

    #[test]
    fn capacity_and_allocatable() {
        let machine = Machine { cpus: 2, memory: 8 << 30, hugepages: vec![(2 << 20, 512)], ..Machine::default() };
        let capacity = machine.capacity(Path::new("/"), 110);
        assert_eq!(capacity["cpu"].0, "2");
        assert_eq!(capacity["hugepages-2Mi"].0, "1048576Ki");
        assert_eq!(machine.allocatable(&capacity)["memory"].0, format!("{}Ki", 7 << 20));
        assert_eq!(machine.hugepage_limits(&[]), [("2MB".to_owned(), 0)]);
    }
}
