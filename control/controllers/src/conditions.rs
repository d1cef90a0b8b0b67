//! Conditions: the same few rules over the API's many condition types.
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{DaemonSetCondition, DeploymentCondition, ReplicaSetCondition, StatefulSetCondition};
use k8s_openapi::api::batch::v1::JobCondition;
use k8s_openapi::api::core::v1::{NamespaceCondition, NodeCondition, PodCondition, ReplicationControllerCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

pub const TRUE: &str = "True";
pub const FALSE: &str = "False";
pub const UNKNOWN: &str = "Unknown";

/// What all condition types have in common.
pub trait ConditionLike {
    fn kind(&self) -> &str;
    fn status(&self) -> &str;
    fn reason(&self) -> &str;
}

macro_rules! condition_like {
    ($($type:ty),+) => {$(
        impl ConditionLike for $type {
            fn kind(&self) -> &str {
                &self.type_
            }
            fn status(&self) -> &str {
                &self.status
            }
            fn reason(&self) -> &str {
                self.reason.as_deref().unwrap_or_default()
            }
        }
    )+};
}

condition_like!(
    DaemonSetCondition,
    DeploymentCondition,
    JobCondition,
    NamespaceCondition,
    NodeCondition,
    PodCondition,
    ReplicaSetCondition,
    ReplicationControllerCondition,
    StatefulSetCondition
);

impl ConditionLike for Condition {
    fn kind(&self) -> &str {
        &self.type_
    }
    fn status(&self) -> &str {
        &self.status
    }
    fn reason(&self) -> &str {
        &self.reason
    }
}

pub fn find<'a, C: ConditionLike>(conditions: Option<&'a Vec<C>>, kind: &str) -> Option<&'a C> {
    conditions?.iter().find(|condition| condition.kind() == kind)
}

pub fn is_true<C: ConditionLike>(conditions: Option<&Vec<C>>, kind: &str) -> bool {
    find(conditions, kind).is_some_and(|condition| condition.status() == TRUE)
}

/// Replaces or adds a condition, unless one of the same status and reason is there already.
pub fn set<C: ConditionLike>(conditions: &mut Option<Vec<C>>, condition: C) -> bool {
    let list = conditions.get_or_insert_default();
    if let Some(known) = list.iter().find(|known| known.kind() == condition.kind())
        && known.status() == condition.status()
        && known.reason() == condition.reason()
    {
        return false;
    }
    list.retain(|known| known.kind() != condition.kind());
    list.push(condition);
    true
}

pub fn remove<C: ConditionLike>(conditions: &mut Option<Vec<C>>, kind: &str) {
    if let Some(list) = conditions {
        list.retain(|condition| condition.kind() != kind);
        if list.is_empty() {
            *conditions = None;
        }
    }
}

/// When a condition of `status` last changed: the known one's time if the status stays, else now.
pub fn since<C: ConditionLike>(known: Option<&C>, status: &str, known_time: impl Fn(&C) -> Option<Time>, now: Timestamp) -> Time {
    known.filter(|known| known.status() == status).and_then(known_time).unwrap_or_else(|| crate::objects::seconds(now))
}
