//! Liveness, readiness and startup probes: one task per probe, results by container, the pod's worker is woken when one turns.
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod, Probe};
use tokio::sync::Notify;

use crate::pod::meta::{containers, init_containers, is_sidecar, uid_of};
use crate::pod::plan::ProbeResults;
use crate::pod::status::ProbeState;

pub mod check;
pub mod http;
mod worker;

/// What a probe says of a container at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Success,
    Failure,
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProbeKind {
    Readiness,
    Liveness,
    Startup,
}

impl ProbeKind {
    pub const ALL: [Self; 3] = [Self::Readiness, Self::Liveness, Self::Startup];

    pub fn name(self) -> &'static str {
        match self {
            Self::Readiness => "Readiness",
            Self::Liveness => "Liveness",
            Self::Startup => "Startup",
        }
    }

    /// What holds before the first attempt.
    fn initial(self) -> Verdict {
        match self {
            Self::Readiness => Verdict::Failure,
            Self::Liveness => Verdict::Success,
            Self::Startup => Verdict::Unknown,
        }
    }

    pub fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            Self::Readiness => container.readiness_probe.as_ref(),
            Self::Liveness => container.liveness_probe.as_ref(),
            Self::Startup => container.startup_probe.as_ref(),
        }
    }
}

type TaskKey = (String, String, ProbeKind);

struct Task {
    handle: tokio::task::AbortHandle,
    kick: Arc<Notify>,
}

/// All probes of the node.
#[derive(Default)]
pub struct Probes {
    results: Mutex<HashMap<(ProbeKind, String), Verdict>>,
    tasks: Mutex<HashMap<TaskKey, Task>>,
}

/// What a probe's task needs from its pod: its current object and status, and a way to wake its worker.
pub trait Subject: Send + Sync + 'static {
    fn pod(&self) -> Arc<Pod>;
    fn container_status(&self, name: &str) -> Option<ContainerStatus>;
    fn pod_ip(&self) -> String;
    fn phase(&self) -> String;
    fn wake(&self);
}

/// What it needs from the node.
#[derive(Clone)]
pub struct Tools {
    pub cri: crate::cri::Cri,
    pub writer: outrigger_cluster::Writer,
    pub probes: Arc<Probes>,
    pub agent_started: jiff::Timestamp,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Probes {
    pub fn result(&self, kind: ProbeKind, container_id: &str) -> Option<Verdict> {
        lock(&self.results).get(&(kind, container_id.to_owned())).copied()
    }

    /// True when the verdict turned.
    fn set(&self, kind: ProbeKind, container_id: &str, verdict: Verdict) -> bool {
        lock(&self.results).insert((kind, container_id.to_owned()), verdict) != Some(verdict)
    }

    fn clear(&self, kind: ProbeKind, container_id: &str) {
        lock(&self.results).remove(&(kind, container_id.to_owned()));
    }

    /// Starts the tasks of all the pod's probes that don't run yet.
    pub fn ensure(&self, tools: &Tools, subject: &Arc<dyn Subject>) {
        let pod = subject.pod();
        let probed = containers(&pod).iter().chain(init_containers(&pod).iter().filter(|container| is_sidecar(container)));
        let mut tasks = lock(&self.tasks);
        for container in probed {
            for kind in ProbeKind::ALL {
                let Some(probe) = kind.of(container) else { continue };
                let key = (uid_of(&pod).to_owned(), container.name.clone(), kind);
                tasks.entry(key).or_insert_with(|| {
                    let kick = Arc::new(Notify::new());
                    let worker = worker::Worker::new(tools.clone(), subject.clone(), container.clone(), kind, probe.clone());
                    Task { handle: tokio::spawn(worker.run(kick.clone())).abort_handle(), kick }
                });
            }
        }
    }

    /// Tells the pod's probes that its containers changed.
    pub fn kick(&self, uid: &str) {
        lock(&self.tasks).iter().filter(|((pod, _, _), _)| pod == uid).for_each(|(_, task)| task.kick.notify_one());
    }

    /// A pod that ends is no longer restarted, but may still become unready.
    pub fn stop_liveness_and_startup(&self, uid: &str) {
        self.stop(uid, |kind| kind != ProbeKind::Readiness);
    }

    pub fn stop_all(&self, uid: &str) {
        self.stop(uid, |_| true);
    }

    fn stop(&self, uid: &str, which: impl Fn(ProbeKind) -> bool) {
        lock(&self.tasks).retain(|(pod, _, kind), task| {
            let keep = pod != uid || !which(*kind);
            if !keep {
                task.handle.abort();
            }
            keep
        });
    }

    pub fn forget_container(&self, container_id: &str) {
        lock(&self.results).retain(|(_, id), _| id != container_id);
    }
}

impl ProbeResults for Probes {
    fn liveness(&self, container_id: &str) -> Option<Verdict> {
        self.result(ProbeKind::Liveness, container_id)
    }

    fn startup(&self, container_id: &str) -> Option<Verdict> {
        self.result(ProbeKind::Startup, container_id)
    }
}

/// The probes' results seen from one pod's spec: a container without a probe is started and ready as soon as it runs.
pub struct OfPod<'a> {
    pub probes: &'a Probes,
    pub pod: &'a Pod,
}

impl OfPod<'_> {
    fn passes(&self, kind: ProbeKind, name: &str, container_id: &str) -> bool {
        let probed = http::owner(self.pod, name).is_some_and(|container| kind.of(container).is_some());
        !probed || self.probes.result(kind, container_id) == Some(Verdict::Success)
    }
}

impl ProbeState for OfPod<'_> {
    fn started(&self, name: &str, container_id: &str) -> bool {
        self.passes(ProbeKind::Startup, name, container_id)
    }

    fn ready(&self, name: &str, container_id: &str) -> bool {
        self.passes(ProbeKind::Readiness, name, container_id)
    }
}

fn seconds(value: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(value.and_then(|value| u64::try_from(value).ok()).unwrap_or(default))
}
