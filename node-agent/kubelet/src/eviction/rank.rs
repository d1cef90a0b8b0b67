//! Who has to go when the node runs short, and what the pod is told. Pure.
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::signals::{Observations, Signal, Threshold};
use crate::pod::meta::{containers, init_containers, is_mirror, is_static, uid_of};
use crate::pod::resources::{pod_limit_milli, pod_request_milli};
use crate::quantity::{self, value_of};

/// `system-cluster-critical` and above.
const CRITICAL_PRIORITY: i32 = 2_000_000_000;

/// Bytes and inodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    pub bytes: i64,
    pub inodes: i64,
}

impl std::ops::AddAssign for Disk {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.inodes += other.inodes;
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerUsage {
    pub memory: i64,
    /// The writable layer and the logs.
    pub disk: Disk,
}

/// What one pod uses of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub containers: BTreeMap<String, ContainerUsage>,
    /// emptyDirs by name: on disk, and in memory.
    pub volumes: BTreeMap<String, Disk>,
    pub memory_volumes: BTreeMap<String, Disk>,
    pub processes: i64,
}

impl Usage {
    fn disk(&self) -> Disk {
        let mut sum = Disk::default();
        self.containers.values().for_each(|container| sum += container.disk);
        self.volumes.values().for_each(|volume| sum += *volume);
        sum
    }

    fn of(&self, signal: Signal) -> i64 {
        match signal.resource() {
            "memory" => self.containers.values().map(|container| container.memory).sum(),
            "ephemeral-storage" => self.disk().bytes,
            "inodes" => self.disk().inodes,
            _ => self.processes,
        }
    }
}

/// By the pod's UID.
pub type Usages = BTreeMap<String, Usage>;

/// Static pods aren't admitted again, and the cluster can't do without those of the highest priorities.
pub fn is_critical(pod: &Pod) -> bool {
    is_static(pod) || is_mirror(pod) || priority(pod) >= CRITICAL_PRIORITY
}

fn priority(pod: &Pod) -> i32 {
    pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0)
}

/// Sorts the pods, the first to go first: those of which nothing is known, those that use more than they asked for, by priority, by
/// how much more they use.
pub fn rank(pods: &mut [Arc<Pod>], signal: Signal, usages: &Usages) {
    pods.sort_by_cached_key(|pod| {
        let Some(usage) = usages.get(uid_of(pod)) else { return (false, false, priority(pod), Reverse(0)) };
        let used = usage.of(signal);
        // Nobody asks for inodes or processes.
        let asked = match signal.resource() {
            resource @ ("memory" | "ephemeral-storage") => pod_request_milli(pod, resource) / 1000,
            _ => 0,
        };
        let exceeds = signal != Signal::PidAvailable && used > asked;
        (true, !exceeds, priority(pod), Reverse(used - asked))
    });
}

/// What the pod's status and event say.
pub fn message(pod: &Pod, threshold: &Threshold, observations: &Observations, usage: Option<&Usage>) -> String {
    let resource = threshold.signal.resource();
    let mut text = format!("The node was low on resource: {resource}. ");
    if let Some(seen) = observations.get(&threshold.signal) {
        let amount = |amount| threshold.signal.amount(amount);
        text += &format!("Threshold quantity: {}, available: {}. ", amount(threshold.quantity(seen.capacity)), amount(seen.available));
    }
    for container in containers(pod).iter().chain(init_containers(pod)) {
        let Some(used) = usage.and_then(|usage| usage.containers.get(&container.name)) else { continue };
        let used = match resource {
            "memory" => used.memory,
            "ephemeral-storage" => used.disk.bytes,
            _ => continue,
        };
        let requests = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
        if used > value_of(requests, resource).unwrap_or(0) {
            let request = requests.and_then(|requests| requests.get(resource)).map_or("0", |request| request.0.as_str());
            let (name, used) = (&container.name, quantity::binary(used));
            text += &format!("Container {name} was using {used}, request is {request}, has larger consumption of {resource}. ");
        }
    }
    text
}

fn storage_limit(container: &Container) -> Option<&Quantity> {
    container.resources.as_ref()?.limits.as_ref()?.get("ephemeral-storage")
}

/// Whether the pod has limits of its own to local storage, which are looked after all the time.
pub fn has_storage_limits(pod: &Pod) -> bool {
    let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_deref()).unwrap_or_default();
    let sized = volumes.iter().filter_map(|volume| volume.empty_dir.as_ref()).any(|source| source.size_limit.is_some());
    sized || containers(pod).iter().any(|container| storage_limit(container).is_some())
}

/// Why the pod has to go for using more local storage than its spec allows.
pub fn over_storage_limit(pod: &Pod, usage: &Usage) -> Option<String> {
    for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        let Some(limit) = volume.empty_dir.as_ref().and_then(|source| source.size_limit.as_ref()) else { continue };
        let used = usage.volumes.get(&volume.name).or_else(|| usage.memory_volumes.get(&volume.name));
        let allowed = quantity::value(limit);
        if allowed > 0 && used.is_some_and(|used| used.bytes > allowed) {
            return Some(format!("Usage of EmptyDir volume \"{}\" exceeds the limit \"{}\". ", volume.name, limit.0));
        }
    }
    if let Some(limit) = pod_limit_milli(pod, "ephemeral-storage").map(|milli| milli / 1000)
        && usage.disk().bytes > limit
    {
        let limit = quantity::binary(limit);
        return Some(format!("Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "));
    }
    containers(pod).iter().find_map(|container| {
        let limit = storage_limit(container)?;
        let used = usage.containers.get(&container.name)?.disk.bytes;
        let (name, allowed) = (&container.name, quantity::value(limit));
        (allowed > 0 && used > allowed).then(|| format!("Container {name} exceeded its local ephemeral storage limit \"{}\". ", limit.0))
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, ResourceRequirements, Volume};

    use super::*;
    use crate::eviction::signals::{Limit, Observation};
    use crate::pod::test_data::pod;

    fn sized(uid: &str, memory: &str, priority: i32) -> Arc<Pod> {
        let mut pod = pod("Always", &[], &["a"]);
        pod.metadata.uid = Some(uid.into());
        let spec = pod.spec.as_mut().unwrap();
        spec.priority = Some(priority);
        spec.containers[0].resources = Some(ResourceRequirements {
            requests: Some([("memory".to_owned(), Quantity(memory.into()))].into()),
            ..ResourceRequirements::default()
        });
        Arc::new(pod)
    }

    fn using(memory: i64, bytes: i64) -> Usage {
        let container = ContainerUsage { memory, disk: Disk { bytes, inodes: 1 } };
        Usage { containers: [("a".to_owned(), container)].into(), ..Usage::default() }
    }

    #[test]
    fn those_over_their_requests_go_first_by_priority_and_excess() {
        let mut pods: Vec<Arc<Pod>> =
            [("within", "1Gi", 0), ("little", "1Mi", 0), ("much", "1Mi", 0), ("important", "1Mi", 9), ("unknown", "1Mi", 99)]
                .map(|(uid, memory, priority)| sized(uid, memory, priority))
                .into();
        let usages: Usages = [("within", 900 << 20), ("little", 2 << 20), ("much", 500 << 20), ("important", 800 << 20)]
            .map(|(uid, memory)| (uid.to_owned(), using(memory, 0)))
            .into();
        rank(&mut pods, Signal::MemoryAvailable, &usages);
        let order: Vec<&str> = pods.iter().map(|pod| uid_of(pod)).collect();
        assert_eq!(order, ["unknown", "much", "little", "important", "within"]);
    }

    #[test]
    fn the_message_blames_containers() {
        let threshold = Threshold { signal: Signal::MemoryAvailable, limit: Limit::Amount(100 << 20) };
        let observations = [(Signal::MemoryAvailable, Observation { available: 50 << 20, capacity: 1 << 30 })].into();
        assert_eq!(
            message(&sized("u", "1Mi", 0), &threshold, &observations, Some(&using(3 << 20, 0))),
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. Container a was using 3Mi, request is 1Mi, has larger consumption of memory. "
        );
    }

    #[test]
    fn local_storage_has_limits() {
        let mut pod = (*sized("u", "1Mi", 0)).clone();
        assert!(!has_storage_limits(&pod));
        let spec = pod.spec.as_mut().unwrap();
        spec.volumes = Some(vec![Volume {
            name: "v".into(),
            empty_dir: Some(EmptyDirVolumeSource { size_limit: Some(Quantity("1Mi".into())), ..EmptyDirVolumeSource::default() }),
            ..Volume::default()
        }]);
        let limits = [("ephemeral-storage".to_owned(), Quantity("4Mi".into()))];
        spec.containers[0].resources.as_mut().unwrap().limits = Some(limits.into());
        assert!(has_storage_limits(&pod));
        let mut usage = using(0, 1 << 20);
        assert_eq!(over_storage_limit(&pod, &usage), None);
        usage.volumes.insert("v".into(), Disk { bytes: 2 << 20, inodes: 1 });
        assert_eq!(over_storage_limit(&pod, &usage).unwrap(), "Usage of EmptyDir volume \"v\" exceeds the limit \"1Mi\". ");
        usage = using(0, 5 << 20);
        assert_eq!(
            over_storage_limit(&pod, &usage).unwrap(),
            "Pod ephemeral local storage usage exceeds the total limit of containers 4Mi. "
        );
    }
}
