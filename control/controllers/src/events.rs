//! Events: what a controller tells people about an object. Repetitions are counted, not repeated.
use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSeries, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::debug;

use crate::objects::{now, reference};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    Normal,
    Warning,
}

impl Severity {
    fn name(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

/// Which of the two shapes of an Event a component writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// core/v1: source, count, first and last time.
    Counted,
    /// events.k8s.io/v1: action, event time, series.
    Series,
}

#[derive(Clone, Debug)]
struct Occurrence {
    component: &'static str,
    about: ObjectReference,
    severity: Severity,
    reason: &'static str,
    action: &'static str,
    message: String,
    related: Option<ObjectReference>,
}

/// Queues events for one task that writes them. Cheap to clone; recording never waits and never fails.
#[derive(Clone)]
pub struct Recorder {
    sender: mpsc::Sender<Occurrence>,
    component: &'static str,
}

/// More than this many waiting events are dropped, as upstream's broadcaster does.
const QUEUE: usize = 1000;

impl Recorder {
    pub fn start(client: Client, shape: Shape, component: &'static str) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(write(client, shape, receiver));
        Self { sender, component }
    }

    /// The same queue under another component's name.
    pub fn named(&self, component: &'static str) -> Self {
        Self { sender: self.sender.clone(), component }
    }

    pub fn normal<K: Resource<DynamicType = ()>>(&self, object: &K, reason: &'static str, message: impl Into<String>) {
        self.record(reference(object), Severity::Normal, reason, message);
    }

    pub fn warning<K: Resource<DynamicType = ()>>(&self, object: &K, reason: &'static str, message: impl Into<String>) {
        self.record(reference(object), Severity::Warning, reason, message);
    }

    pub fn record(&self, about: ObjectReference, severity: Severity, reason: &'static str, message: impl Into<String>) {
        self.act(about, severity, reason, "", message, None);
    }

    pub fn act(
        &self,
        about: ObjectReference,
        severity: Severity,
        reason: &'static str,
        action: &'static str,
        message: impl Into<String>,
        related: Option<ObjectReference>,
    ) {
        let occurrence = Occurrence { component: self.component, about, severity, reason, action, message: message.into(), related };
        // A full queue drops the event: telling must never hold up doing.
        let _ = self.sender.try_send(occurrence);
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Similar {
    component: &'static str,
    uid: String,
    name: String,
    reason: &'static str,
    severity: Severity,
}

struct Written {
    name: String,
    count: i32,
    message: String,
    at: Timestamp,
}

/// What has been written about one object for one reason.
struct Group {
    written: Vec<Written>,
    /// Set once too many different messages came: they share one event from then on.
    combined: Option<Written>,
    last: Timestamp,
}

/// Budget of events per component and object: 25 at once, one more every five minutes.
struct Budget {
    tokens: f64,
    at: Timestamp,
}

const BURST: f64 = 25.0;
const PER_SECOND: f64 = 1.0 / 300.0;
const SIMILAR_LIMIT: usize = 10;
const SIMILAR_WINDOW: i64 = 600;
const REMEMBERED: usize = 2048;

/// What to do about one occurrence.
#[derive(Debug, PartialEq)]
enum Step {
    Drop,
    Create { name: String, message: String },
    Count { name: String, count: i32, message: String },
}

#[derive(Default)]
struct Correlator {
    groups: HashMap<Similar, Group>,
    budgets: HashMap<(&'static str, String, String), Budget>,
}

impl Correlator {
    fn step(&mut self, occurrence: &Occurrence, at: Timestamp) -> Step {
        self.forget_old(at);
        let uid = occurrence.about.uid.clone().unwrap_or_default();
        let name = occurrence.about.name.clone().unwrap_or_default();
        let budget = self
            .budgets
            .entry((occurrence.component, uid.clone(), format!("{}/{name}", occurrence.about.namespace.as_deref().unwrap_or_default())))
            .or_insert(Budget { tokens: BURST, at });
        let passed = (at.as_second() - budget.at.as_second()).max(0) as f64;
        budget.tokens = (budget.tokens + passed * PER_SECOND).min(BURST);
        budget.at = at;
        let similar =
            Similar { component: occurrence.component, uid, name: name.clone(), reason: occurrence.reason, severity: occurrence.severity };
        let group = self.groups.entry(similar).or_insert(Group { written: Vec::new(), combined: None, last: at });
        if at.as_second() - group.last.as_second() > SIMILAR_WINDOW {
            group.written.clear();
            group.combined = None;
        }
        group.last = at;
        if budget.tokens < 1.0 {
            return Step::Drop;
        }
        budget.tokens -= 1.0;
        let fresh = format!("{name}.{:x}", at.as_nanosecond());
        let message = occurrence.message.clone();
        if let Some(known) = group.written.iter_mut().find(|written| written.message == message) {
            known.count += 1;
            known.at = at;
            return Step::Count { name: known.name.clone(), count: known.count, message };
        }
        if group.written.len() + 1 < SIMILAR_LIMIT {
            group.written.push(Written { name: fresh.clone(), count: 1, message: message.clone(), at });
            return Step::Create { name: fresh, message };
        }
        let message = format!("(combined from similar events): {message}");
        if let Some(known) = &mut group.combined {
            known.count += 1;
            known.at = at;
            return Step::Count { name: known.name.clone(), count: known.count, message };
        }
        group.combined = Some(Written { name: fresh.clone(), count: 1, message: message.clone(), at });
        Step::Create { name: fresh, message }
    }

    fn forget_old(&mut self, at: Timestamp) {
        if self.groups.len() > REMEMBERED {
            self.groups.retain(|_, group| at.as_second() - group.last.as_second() <= SIMILAR_WINDOW);
            if self.groups.len() > REMEMBERED {
                self.groups.clear();
            }
        }
        if self.budgets.len() > REMEMBERED {
            self.budgets.retain(|_, budget| (at.as_second() - budget.at.as_second()) as f64 * PER_SECOND + budget.tokens < BURST);
            if self.budgets.len() > 2 * REMEMBERED {
                self.budgets.clear();
            }
        }
    }
}

async fn write(client: Client, shape: Shape, mut receiver: mpsc::Receiver<Occurrence>) {
    let mut correlator = Correlator::default();
    while let Some(occurrence) = receiver.recv().await {
        let at = Timestamp::now();
        let step = correlator.step(&occurrence, at);
        if let Err(error) = send(&client, shape, &occurrence, step, at).await {
            debug!(reason = occurrence.reason, %error, "an event could not be written");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn home(about: &ObjectReference) -> String {
    about.namespace.clone().filter(|namespace| !namespace.is_empty()).unwrap_or_else(|| "default".to_owned())
}

async fn send(client: &Client, shape: Shape, occurrence: &Occurrence, step: Step, at: Timestamp) -> Result<(), kube::Error> {
    let api = Api::<Event>::namespaced(client.clone(), &home(&occurrence.about));
    match step {
        Step::Drop => {}
        Step::Create { name, message } => {
            api.create(&PostParams::default(), &event(shape, occurrence, name, message, at, 1)).await?;
        }
        Step::Count { name, count, message } => {
            let patch = match shape {
                Shape::Counted => json!({"count": count, "lastTimestamp": now(), "message": message}),
                Shape::Series => json!({"series": {"count": count, "lastObservedTime": MicroTime(at)}}),
            };
            match api.patch(&name, &PatchParams::default(), &Patch::Strategic(patch)).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {
                    let again = format!("{}.{:x}", occurrence.about.name.as_deref().unwrap_or_default(), at.as_nanosecond());
                    api.create(&PostParams::default(), &event(shape, occurrence, again, message, at, count)).await?;
                }
                other => {
                    other?;
                }
            }
        }
    }
    Ok(())
}

fn event(shape: Shape, occurrence: &Occurrence, name: String, message: String, at: Timestamp, count: i32) -> Event {
    let mut event = Event {
        metadata: ObjectMeta { name: Some(name), namespace: Some(home(&occurrence.about)), ..Default::default() },
        involved_object: occurrence.about.clone(),
        reason: Some(occurrence.reason.to_owned()),
        message: Some(message),
        type_: Some(occurrence.severity.name().to_owned()),
        reporting_component: Some(occurrence.component.to_owned()),
        related: occurrence.related.clone(),
        ..Default::default()
    };
    match shape {
        Shape::Counted => {
            event.source = Some(EventSource { component: Some(occurrence.component.to_owned()), host: None });
            event.first_timestamp = Some(now());
            event.last_timestamp = Some(now());
            event.count = Some(count);
            event.reporting_instance = Some(String::new());
        }
        Shape::Series => {
            event.event_time = Some(MicroTime(at));
            event.action = Some(occurrence.action.to_owned());
            event.reporting_instance = Some(format!("{}-outrigger-control", occurrence.component));
            event.series = (count > 1).then_some(EventSeries { count: Some(count), last_observed_time: Some(MicroTime(at)) });
        }
    }
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    fn occurrence(message: &str) -> Occurrence {
        Occurrence {
            component: "test",
            about: ObjectReference { name: Some("web".into()), uid: Some("1".into()), ..Default::default() },
            severity: Severity::Normal,
            reason: "Reason",
            action: "",
            message: message.into(),
            related: None,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_repeated_message_is_counted_on_its_first_event() {
        let mut correlator = Correlator::default();
        let Step::Create { name, .. } = correlator.step(&occurrence("a"), at(1)) else { panic!("the first is created") };
        assert_eq!(name, format!("web.{:x}", 1_000_000_000));
        assert_eq!(correlator.step(&occurrence("a"), at(2)), Step::Count { name, count: 2, message: "a".into() });
    }

    #[test]
    fn many_different_messages_are_combined_and_a_flood_is_cut() {
        let mut correlator = Correlator::default();
        let steps: Vec<_> = (0..30).map(|number| correlator.step(&occurrence(&number.to_string()), at(number))).collect();
        assert!(matches!(&steps[8], Step::Create { message, .. } if message == "8"));
        assert!(matches!(&steps[9], Step::Create { message, .. } if message == "(combined from similar events): 9"));
        assert!(matches!(&steps[10], Step::Count { count: 2, .. }));
        assert_eq!(steps[25], Step::Drop);
        assert!(matches!(correlator.step(&occurrence("x"), at(400)), Step::Count { .. }), "the budget refills");
    }
}
