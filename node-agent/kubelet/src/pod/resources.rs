//! What a pod asks for and may use: QoS class, sums over its containers, and the kernel's units for them.
use k8s_openapi::api::core::v1::{Container, Pod};

use super::meta::{containers, init_containers, is_sidecar};
use crate::quantity::{self, Resources, milli_of, value_of};

const MIN_SHARES: i64 = 2;
const MAX_SHARES: i64 = 262_144;
const SHARES_PER_CPU: i64 = 1024;
/// Microseconds of one CFS period.
pub const CPU_PERIOD: i64 = 100_000;
const MIN_QUOTA: i64 = 1000;

const GUARANTEED_OOM_ADJUST: i64 = -997;
const BEST_EFFORT_OOM_ADJUST: i64 = 1000;
/// Priorities from here on are those of `system-node-critical`.
const NODE_CRITICAL_PRIORITY: i32 = 2_000_001_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl Qos {
    /// As `status.qosClass` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

fn requests(container: &Container) -> Option<&Resources> {
    container.resources.as_ref().and_then(|resources| resources.requests.as_ref())
}

fn limits(container: &Container) -> Option<&Resources> {
    container.resources.as_ref().and_then(|resources| resources.limits.as_ref())
}

/// Pod-level requests and limits, when the pod has any (KEP-2837).
fn pod_level(pod: &Pod) -> (Option<&Resources>, Option<&Resources>) {
    let resources = pod.spec.as_ref().and_then(|spec| spec.resources.as_ref());
    (resources.and_then(|resources| resources.requests.as_ref()), resources.and_then(|resources| resources.limits.as_ref()))
}

/// The request of one resource in thousandths; a limit without a request counts as one.
pub fn request_milli(container: &Container, name: &str) -> i64 {
    milli_of(requests(container), name).or_else(|| milli_of(limits(container), name)).unwrap_or(0)
}

pub fn qos(pod: &Pod) -> Qos {
    if let Some(class) = pod.status.as_ref().and_then(|status| status.qos_class.as_deref()) {
        match class {
            "Guaranteed" => return Qos::Guaranteed,
            "Burstable" => return Qos::Burstable,
            "BestEffort" => return Qos::BestEffort,
            _ => {}
        }
    }
    let (pod_requests, pod_limits) = pod_level(pod);
    if pod_requests.is_some() || pod_limits.is_some() {
        return classify(&[(pod_requests, pod_limits)]);
    }
    let all: Vec<_> =
        containers(pod).iter().chain(init_containers(pod)).map(|container| (requests(container), limits(container))).collect();
    classify(&all)
}

fn classify(all: &[(Option<&Resources>, Option<&Resources>)]) -> Qos {
    let mut any = false;
    let mut guaranteed = true;
    for (requests, limits) in all {
        for name in ["cpu", "memory"] {
            let request = milli_of(*requests, name).filter(|amount| *amount > 0);
            let limit = milli_of(*limits, name).filter(|amount| *amount > 0);
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request.is_none_or(|request| Some(request) == limit);
        }
    }
    match (any, guaranteed) {
        (false, _) => Qos::BestEffort,
        (true, true) => Qos::Guaranteed,
        (true, false) => Qos::Burstable,
    }
}

/// The pod's request of one resource in thousandths: main containers and sidecars together, or more where an init container needs more.
pub fn pod_request_milli(pod: &Pod, name: &str) -> i64 {
    let (requests, _) = pod_level(pod);
    let of_containers = effective(pod, &|container| request_milli(container, name));
    let base = milli_of(requests, name).unwrap_or(of_containers);
    base + overhead(pod, name)
}

/// The pod's limit in thousandths, `None` when a container has no limit.
pub fn pod_limit_milli(pod: &Pod, name: &str) -> Option<i64> {
    let (_, pod_limits) = pod_level(pod);
    if let Some(limit) = milli_of(pod_limits, name) {
        return Some(limit + overhead(pod, name));
    }
    let long_running = containers(pod).iter().chain(init_containers(pod).iter().filter(|container| is_sidecar(container)));
    if long_running.into_iter().any(|container| milli_of(limits(container), name).is_none_or(|limit| limit == 0)) {
        return None;
    }
    Some(effective(pod, &|container| milli_of(limits(container), name).unwrap_or(0)) + overhead(pod, name))
}

fn overhead(pod: &Pod, name: &str) -> i64 {
    milli_of(pod.spec.as_ref().and_then(|spec| spec.overhead.as_ref()), name).unwrap_or(0)
}

fn effective(pod: &Pod, amount: &dyn Fn(&Container) -> i64) -> i64 {
    let main: i64 = containers(pod).iter().map(amount).sum();
    let mut sidecars = 0;
    let mut peak = 0;
    for container in init_containers(pod) {
        if is_sidecar(container) {
            sidecars += amount(container);
            peak = peak.max(sidecars);
        } else {
            peak = peak.max(sidecars + amount(container));
        }
    }
    (main + sidecars).max(peak)
}

pub fn cpu_shares(milli: i64) -> i64 {
    if milli == 0 { MIN_SHARES } else { (milli * SHARES_PER_CPU / 1000).clamp(MIN_SHARES, MAX_SHARES) }
}

/// Microseconds per [`CPU_PERIOD`]; zero for no limit.
pub fn cpu_quota(milli: i64) -> i64 {
    if milli == 0 { 0 } else { (milli * CPU_PERIOD / 1000).max(MIN_QUOTA) }
}

/// A container's CPU limit in thousandths, from the container or else the pod.
pub fn container_cpu_limit(pod: &Pod, container: &Container) -> Option<i64> {
    milli_of(limits(container), "cpu").or_else(|| milli_of(pod_level(pod).1, "cpu"))
}

/// A container's memory limit in bytes, from the container or else the pod.
pub fn container_memory_limit(pod: &Pod, container: &Container) -> Option<i64> {
    value_of(limits(container), "memory").or_else(|| value_of(pod_level(pod).1, "memory"))
}

/// Upstream's formula (KEP-753 for sidecars): the more memory is asked for, the later a container is killed.
pub fn oom_score_adjust(pod: &Pod, container: &Container, memory_capacity: i64) -> i64 {
    if pod.spec.as_ref().and_then(|spec| spec.priority).is_some_and(|priority| priority >= NODE_CRITICAL_PRIORITY) {
        return GUARANTEED_OOM_ADJUST;
    }
    match qos(pod) {
        Qos::Guaranteed => return GUARANTEED_OOM_ADJUST,
        Qos::BestEffort => return BEST_EFFORT_OOM_ADJUST,
        Qos::Burstable => {}
    }
    let memory = |container: &Container| value_of(requests(container), "memory").unwrap_or(0);
    let capacity = memory_capacity.max(1);
    let score = |bytes: i64| 1000 - (i128::from(bytes) * 1000 / i128::from(capacity)) as i64;
    let mut adjust = score(memory(container));
    if is_sidecar(container) && init_containers(pod).iter().any(|init| init.name == container.name) {
        adjust = adjust.min(score(containers(pod).iter().map(memory).min().unwrap_or(0)));
    }
    adjust.clamp(1000 + GUARANTEED_OOM_ADJUST, BEST_EFFORT_OOM_ADJUST - 1)
}

/// `hugepages-<size>` limits as (size in the kernel's notation, bytes).
pub fn hugepage_limits(limits: Option<&Resources>) -> Vec<(String, u64)> {
    let Some(limits) = limits else { return Vec::new() };
    limits
        .iter()
        .filter_map(|(name, amount)| {
            let size = quantity::nano(name.strip_prefix("hugepages-")?)? / 1_000_000_000;
            let bytes = u64::try_from(quantity::value(amount)).ok()?;
            Some((page_size_name(u64::try_from(size).ok()?), bytes))
        })
        .collect()
}

/// 2097152 -> "2MB"
pub fn page_size_name(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB")];
    let unit = UNITS.iter().find(|(size, _)| bytes >= *size && bytes.is_multiple_of(*size));
    unit.map_or_else(|| format!("{bytes}B"), |(size, name)| format!("{}{name}", bytes / size))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodSpec, ResourceRequirements};
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

    use super::*;

    fn list(entries: &[(&str, &str)]) -> Option<Resources> {
        (!entries.is_empty()).then(|| entries.iter().map(|(name, amount)| ((*name).to_owned(), Quantity((*amount).to_owned()))).collect())
    }

    fn container(requests: &[(&str, &str)], limits: &[(&str, &str)]) -> Container {
        Container {
            name: "c".into(),
            resources: Some(ResourceRequirements { requests: list(requests), limits: list(limits), ..ResourceRequirements::default() }),
            ..Container::default()
        }
    }

    fn pod(containers: Vec<Container>) -> Pod {
        Pod { spec: Some(PodSpec { containers, ..PodSpec::default() }), ..Pod::default() }
    }

    #[test]
    fn qos_classes() {
        let full = [("cpu", "1"), ("memory", "1Gi")];
        assert_eq!(qos(&pod(vec![container(&[], &[])])), Qos::BestEffort);
        assert_eq!(qos(&pod(vec![container(&full, &full)])), Qos::Guaranteed);
        assert_eq!(qos(&pod(vec![container(&[], &full)])), Qos::Guaranteed);
        assert_eq!(qos(&pod(vec![container(&full, &full), container(&[], &[])])), Qos::Burstable);
        assert_eq!(qos(&pod(vec![container(&[("cpu", "1")], &[])])), Qos::Burstable);
    }

    #[test]
    fn init_containers_count_by_their_peak() {
        let mut pod = pod(vec![container(&[("cpu", "100m")], &[])]);
        let mut sidecar = container(&[("cpu", "50m")], &[]);
        sidecar.restart_policy = Some("Always".into());
        pod.spec.as_mut().unwrap().init_containers = Some(vec![sidecar, container(&[("cpu", "200m")], &[])]);
        assert_eq!(pod_request_milli(&pod, "cpu"), 250);
    }

    #[test]
    fn kernel_units() {
        assert_eq!((cpu_shares(0), cpu_shares(1000), cpu_shares(1)), (2, 1024, 2));
        assert_eq!((cpu_quota(0), cpu_quota(500), cpu_quota(1)), (0, 50_000, 1000));
        assert_eq!(page_size_name(2 << 20), "2MB");
    }
}
