//! The task of one pod: turns what happens into events of the [`machine`](super::machine) and carries out its effects.
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;

use super::machine::{Effect, Event, Stage, State, step};
use super::meta::{full_name, grace_period, is_terminal_phase, phase};
use super::record::Record;
use super::sync::{self, Pass};
use crate::host::Host;

type Operation = Pin<Box<dyn Future<Output = (Event, bool)> + Send>>;

/// Pauses after failed passes.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LAST: Duration = Duration::from_secs(10);

struct Worker {
    host: Arc<Host>,
    record: Arc<Record>,
    state: State,
    operation: Option<Operation>,
    /// When to look again without being woken.
    due: Option<Instant>,
    failures: u32,
}

/// Runs until the pod is gone from the node and from where it came.
pub async fn run(host: Arc<Host>, record: Arc<Record>) {
    let mut worker = Worker { host, record, state: State::default(), operation: None, due: None, failures: 0 };
    let mut event = worker.observe();
    loop {
        let (state, effects) = step(worker.state.clone(), event);
        if state.stage != worker.state.stage {
            debug!(pod = %full_name(&worker.record.pod()), from = ?worker.state.stage, to = ?state.stage, "stage");
        }
        worker.state = state;
        for effect in effects {
            if !worker.carry_out(effect) {
                sync::purge(&worker.host, &worker.record).await;
                return;
            }
        }
        event = worker.next().await;
    }
}

impl Worker {
    /// What the record says, the most final first.
    fn observe(&self) -> Event {
        let pod = self.record.pod();
        if self.record.is_gone() {
            return Event::Gone { grace: sync::grace_of(&pod) };
        }
        if pod.metadata.deletion_timestamp.is_some() {
            return Event::DeletionRequested { grace: sync::grace_of(&pod) };
        }
        if self.record.failed().is_some() || is_terminal_phase(phase(&pod)) {
            let granted = self.record.failed().and_then(|verdict| verdict.grace);
            return Event::Ended { grace: granted.unwrap_or_else(|| grace_period(&pod)) };
        }
        Event::Changed
    }

    async fn next(&mut self) -> Event {
        let due = self.due;
        tokio::select! {
            // A finished operation first, so that its outcome isn't thrown away by a change that came at the same time.
            biased;
            (event, failed) = async {
                match self.operation.as_mut() {
                    Some(operation) => operation.await,
                    None => std::future::pending().await,
                }
            } => {
                self.operation = None;
                self.schedule(failed);
                event
            }
            () = self.record.wake.notified() => self.observe(),
            () = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            } => {
                self.due = None;
                Event::Changed
            }
        }
    }

    fn schedule(&mut self, failed: bool) {
        let asked = self.record.take_retry();
        let after = if failed {
            let pause = (RETRY_FIRST * 2u32.saturating_pow(self.failures.min(10))).min(RETRY_LAST);
            self.failures += 1;
            asked.map_or(pause, |asked| asked.min(pause))
        } else {
            self.failures = 0;
            asked.unwrap_or(self.host.config.sync_period).min(self.host.config.sync_period)
        };
        self.due = (failed || self.state.stage == Stage::Syncing).then(|| Instant::now() + after);
    }

    /// False when the worker is to end.
    fn carry_out(&mut self, effect: Effect) -> bool {
        let (host, record) = (self.host.clone(), self.record.clone());
        match effect {
            // Dropping the future gives the operation up; the runtime is read anew by the next one.
            Effect::Abort => self.operation = None,
            Effect::Sync => {
                self.due = None;
                self.operation = Some(Box::pin(async move {
                    match sync::sync(&host, &record).await {
                        Pass::Done => (Event::Synced, false),
                        Pass::Failed => (Event::Synced, true),
                        Pass::Ended => (Event::Ended { grace: grace_period(&record.pod()) }, false),
                    }
                }));
            }
            Effect::Stop { grace } => {
                self.operation = Some(Box::pin(async move {
                    let done = sync::stop(&host, &record, grace).await;
                    (Event::Stopped(done), !done)
                }));
            }
            Effect::CleanUp => {
                self.operation = Some(Box::pin(async move {
                    let done = sync::clean_up(&host, &record).await;
                    (Event::CleanedUp(done), !done)
                }));
            }
            Effect::DeleteObject => {
                self.operation = Some(Box::pin(async move {
                    let done = sync::delete_object(&host, &record).await;
                    (Event::Synced, !done)
                }));
            }
            Effect::RetryLater => {}
            Effect::Forget => return false,
        }
        true
    }
}
