//! The task behind one probe of one container.
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ContainerStatus, Probe};
use outrigger_cluster::status::events::Kind;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::check::{self, Outcome};
use super::{ProbeKind, Subject, Tools, Verdict, seconds};
use crate::pod::meta::{container_reference, is_terminal_phase};

/// An attempt that can't be made is tried this often before it's given up for the period.
const ATTEMPTS: usize = 3;

pub(super) struct Worker {
    tools: Tools,
    subject: Arc<dyn Subject>,
    container: Container,
    kind: ProbeKind,
    probe: Probe,
    /// The container that is looked at now.
    container_id: String,
    /// The container failed and is going to be killed: nothing more is asked of it.
    on_hold: bool,
    last: Option<Verdict>,
    run: i32,
    was_started: bool,
}

impl Worker {
    pub(super) fn new(tools: Tools, subject: Arc<dyn Subject>, container: Container, kind: ProbeKind, probe: Probe) -> Self {
        Self { tools, subject, container, kind, probe, container_id: String::new(), on_hold: false, last: None, run: 0, was_started: false }
    }

    pub(super) async fn run(mut self, kick: Arc<Notify>) {
        let period = seconds(self.probe.period_seconds, 10).max(Duration::from_secs(1));
        let mut due = Instant::now();
        loop {
            let kicked = tokio::select! {
                () = tokio::time::sleep_until(due) => false,
                () = kick.notified() => true,
            };
            let Some(status) = self.subject.container_status(&self.container.name) else {
                if !kicked {
                    due = Instant::now() + period;
                }
                continue;
            };
            // A kick is only heard when there's a new container, or when it has just passed its startup probe.
            let id = container_id(&status);
            let started = status.started == Some(true);
            if kicked && id == self.container_id && started == self.was_started {
                continue;
            }
            self.was_started = started;
            if is_terminal_phase(&self.subject.phase()) {
                return;
            }
            self.round(&status, &id).await;
            due = Instant::now() + period;
            // Until the initial delay is over there is nothing to ask.
            if let Some(left) = self.initial_delay_left(&status) {
                due = Instant::now() + left.min(period).max(Duration::from_millis(100));
            }
        }
    }

    fn initial_delay_left(&self, status: &ContainerStatus) -> Option<Duration> {
        let started_at = status.state.as_ref()?.running.as_ref()?.started_at.as_ref()?.0;
        let delay = seconds(self.probe.initial_delay_seconds, 0);
        let passed = Duration::try_from(Timestamp::now().duration_since(started_at)).unwrap_or(Duration::ZERO);
        delay.checked_sub(passed).filter(|left| !left.is_zero())
    }

    async fn round(&mut self, status: &ContainerStatus, id: &str) {
        if id.is_empty() {
            return;
        }
        if self.container_id != id {
            self.adopt(status, id);
        }
        if self.on_hold {
            return;
        }
        let running = status.state.as_ref().is_some_and(|state| state.running.is_some());
        if !running {
            self.set(Verdict::Failure);
            return;
        }
        let ending = self.subject.pod().metadata.deletion_timestamp.is_some();
        if ending && self.kind != ProbeKind::Readiness {
            self.set(Verdict::Success);
            return;
        }
        let started = status.started == Some(true);
        // Only the startup probe runs before the container has started, and only then.
        if started == (self.kind == ProbeKind::Startup) || self.initial_delay_left(status).is_some() {
            return;
        }
        let Some(verdict) = self.ask(id).await else { return };
        self.run = if self.last == Some(verdict) { self.run + 1 } else { 1 };
        self.last = Some(verdict);
        let threshold = match verdict {
            Verdict::Failure => self.probe.failure_threshold.unwrap_or(3),
            _ => self.probe.success_threshold.unwrap_or(1),
        };
        if self.run < threshold {
            return;
        }
        self.set(verdict);
        if verdict == Verdict::Failure && self.kind != ProbeKind::Readiness {
            self.on_hold = true;
            self.run = 0;
        }
    }

    /// A new container starts from the initial verdict, unless it ran before the agent did: then it keeps what its status said.
    fn adopt(&mut self, status: &ContainerStatus, id: &str) {
        self.tools.probes.clear(self.kind, &self.container_id);
        self.container_id = id.to_owned();
        self.on_hold = false;
        self.last = None;
        self.run = 0;
        let before_agent = status
            .state
            .as_ref()
            .and_then(|state| state.running.as_ref())
            .and_then(|running| running.started_at.as_ref())
            .is_some_and(|at| at.0 < self.tools.agent_started);
        let kept = match self.kind {
            ProbeKind::Readiness => status.ready,
            ProbeKind::Startup => status.started == Some(true),
            ProbeKind::Liveness => false,
        };
        if self.tools.probes.result(self.kind, id).is_none() {
            self.set(if before_agent && kept { Verdict::Success } else { self.kind.initial() });
        }
    }

    fn set(&self, verdict: Verdict) {
        if self.tools.probes.set(self.kind, &self.container_id, verdict) {
            self.subject.wake();
        }
    }

    /// `None`: the attempt couldn't be made.
    async fn ask(&self, id: &str) -> Option<Verdict> {
        let pod = self.subject.pod();
        let ip = self.subject.pod_ip();
        let mut outcome = Err(String::new());
        for _ in 0..ATTEMPTS {
            outcome = check::attempt(&self.tools.cri, &pod, &self.container, id, &ip, &self.probe).await;
            if outcome.is_ok() {
                break;
            }
        }
        let name = self.kind.name();
        let event = |message: String| {
            self.tools.writer.event(&container_reference(&pod, &self.container.name), Kind::Warning, "Unhealthy", message);
        };
        match outcome {
            Ok(Outcome::Success) => Some(Verdict::Success),
            Ok(Outcome::Failure(output)) => {
                event(format!("{name} probe failed: {output}"));
                Some(Verdict::Failure)
            }
            Err(error) => {
                event(format!("{name} probe errored and resulted in unknown state: {error}"));
                None
            }
        }
    }
}

/// The bare id of `containerd://id`.
fn container_id(status: &ContainerStatus) -> String {
    let full = status.container_id.as_deref().unwrap_or_default();
    full.rsplit("://").next().unwrap_or_default().to_owned()
}
