//! Saves the node: when it runs short of memory, disk or processes, what nobody uses goes first, then pods, one at a time.
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Pod, Toleration};
use outrigger_cluster::status::events::Kind;
use outrigger_cluster::status::reference_to_node;
use tracing::{info, warn};

use crate::gc;
use crate::host::Host;
use crate::pod::meta::{full_name, is_terminal_phase, reference, uid_of};
use crate::pod::resources::{Qos, qos};
use crate::pod::status::Verdict;
use crate::registry::Registry;

mod rank;
mod signals;
mod usage;

pub use signals::{DISK_PRESSURE, MEMORY_PRESSURE, PID_PRESSURE, Pressure, Thresholds};

use signals::{Observations, Threshold};

const PERIOD: Duration = Duration::from_secs(10);
/// An evicted pod's resources are waited for before anybody else is chosen.
const CLEAN_UP: Duration = Duration::from_secs(30);
const CLEAN_UP_LOOK: Duration = Duration::from_secs(1);
/// Seconds that an evicted pod gets to end.
const GRACE: i64 = 1;
const REASON: &str = "Evicted";

/// Runs for ever.
pub async fn run(host: Arc<Host>, registry: Arc<Registry>) {
    let images = gc::image_mount(&host).await;
    loop {
        let evicted = look(&host, &registry, images.as_ref()).await;
        if evicted.is_empty() {
            tokio::time::sleep(PERIOD).await;
        } else {
            wait_for_clean_up(&host, &evicted).await;
        }
    }
}

/// One look at the node; gives the pods that were evicted.
async fn look(host: &Arc<Host>, registry: &Registry, images: Option<&PathBuf>) -> Vec<Arc<Pod>> {
    let observations = usage::observe(host, images.map(PathBuf::as_path));
    let met = signals::met(&host.config.eviction_hard, &observations);
    host.pressure.observe(&met, host.config.pressure_transition, Instant::now());
    let active = active(registry);
    let limited: Vec<Arc<Pod>> = active.iter().filter(|pod| rank::has_storage_limits(pod)).cloned().collect();
    if !limited.is_empty() {
        let usages = usage::measure(host, &limited).await;
        let over = limited.into_iter().filter(|pod| {
            let message = usages.get(uid_of(pod)).and_then(|usage| rank::over_storage_limit(pod, usage));
            message.is_some_and(|message| evict(host, registry, pod, message, false))
        });
        let over: Vec<Arc<Pod>> = over.collect();
        if !over.is_empty() {
            return over;
        }
    }
    match met.first() {
        Some(threshold) => reclaim(host, registry, threshold, &observations, images, active).await,
        None => Vec::new(),
    }
}

fn active(registry: &Registry) -> Vec<Arc<Pod>> {
    let mut pods = Vec::new();
    for record in registry.all() {
        let ended = record.status().phase.as_deref().is_some_and(is_terminal_phase) || record.failed().is_some();
        let pod = record.pod();
        if !ended && pod.metadata.deletion_timestamp.is_none() {
            pods.push(pod);
        }
    }
    pods
}

async fn reclaim(
    host: &Arc<Host>,
    registry: &Registry,
    threshold: &Threshold,
    observations: &Observations,
    images: Option<&PathBuf>,
    mut pods: Vec<Arc<Pod>>,
) -> Vec<Arc<Pod>> {
    let resource = threshold.signal.resource();
    info!(resource, ?threshold, "the node runs short");
    let node = reference_to_node(&host.config.node_name);
    host.writer.event(&node, Kind::Warning, "EvictionThresholdMet", format!("Attempting to reclaim {resource}"));
    if threshold.signal.condition() == DISK_PRESSURE {
        gc::free_disk(host, registry).await;
        let now = usage::observe(host, images.map(PathBuf::as_path));
        if signals::met(&host.config.eviction_hard, &now).is_empty() {
            return Vec::new();
        }
    }
    let usages = usage::measure(host, &pods).await;
    rank::rank(&mut pods, threshold.signal, &usages);
    let chosen = pods.into_iter().find(|pod| {
        let message = rank::message(pod, threshold, observations, usages.get(uid_of(pod)));
        evict(host, registry, pod, message, true)
    });
    if chosen.is_none() {
        warn!(resource, "there is no pod to evict");
    }
    chosen.into_iter().collect()
}

/// False when the pod mustn't be evicted.
fn evict(host: &Host, registry: &Registry, pod: &Pod, message: String, disruption: bool) -> bool {
    let Some(record) = registry.get(uid_of(pod)).filter(|_| !rank::is_critical(pod)) else { return false };
    info!(pod = %full_name(pod), message, "evicting");
    host.writer.event(&reference(pod), Kind::Warning, REASON, message.clone());
    record.fail(Verdict { reason: REASON.into(), message, grace: Some(GRACE), disruption });
    true
}

async fn wait_for_clean_up(host: &Host, pods: &[Arc<Pod>]) {
    let began = Instant::now();
    while began.elapsed() < CLEAN_UP && pods.iter().any(|pod| host.config.pod_dir(uid_of(pod)).exists()) {
        tokio::time::sleep(CLEAN_UP_LOOK).await;
    }
}

/// Whether a new pod may come while the node is under those pressures.
pub fn admit(pod: &Pod, conditions: &[&str]) -> Result<(), Verdict> {
    if conditions.is_empty() || rank::is_critical(pod) {
        return Ok(());
    }
    let tolerates = |toleration: &Toleration| {
        let key = toleration.key.as_deref().unwrap_or_default();
        let effect = toleration.effect.as_deref().unwrap_or_default();
        (key.is_empty() || key == "node.kubernetes.io/memory-pressure") && (effect.is_empty() || effect == "NoSchedule")
    };
    let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
    if conditions == [MEMORY_PRESSURE] && (qos(pod) != Qos::BestEffort || tolerations.iter().any(tolerates)) {
        return Ok(());
    }
    let message = format!("Pod was rejected: The node had condition: [{}]. ", conditions.join(" "));
    Err(Verdict { reason: REASON.into(), message, ..Verdict::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::test_data::pod;

    #[test]
    fn under_pressure_few_pods_are_let_in() {
        let best_effort = pod("Always", &[], &["a"]);
        let mut tolerant = best_effort.clone();
        let toleration = Toleration { key: Some("node.kubernetes.io/memory-pressure".into()), ..Toleration::default() };
        tolerant.spec.as_mut().unwrap().tolerations = Some(vec![toleration]);
        let mut critical = best_effort.clone();
        critical.spec.as_mut().unwrap().priority = Some(2_000_001_000);
        let let_in = |pod: &Pod, conditions: &[&str]| admit(pod, conditions).is_ok();
        assert!(let_in(&best_effort, &[]));
        assert!(!let_in(&best_effort, &[MEMORY_PRESSURE]));
        assert!(let_in(&tolerant, &[MEMORY_PRESSURE]));
        assert!(!let_in(&tolerant, &[DISK_PRESSURE, MEMORY_PRESSURE]));
        assert!(let_in(&critical, &[DISK_PRESSURE]));
        assert_eq!(
            admit(&best_effort, &[MEMORY_PRESSURE]).unwrap_err().message,
            "Pod was rejected: The node had condition: [MemoryPressure]. "
        );
    }
}
