//! Ends pods that don't tolerate their node's NoExecute taints, at once or when their toleration runs out.
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ObjectReference, Pod, PodCondition, Taint, Toleration};
use kube::api::DeleteParams;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::taints::taints;
use crate::Context;
use crate::conditions::TRUE;
use crate::error::{SyncError, unless_gone};
use crate::events::{Recorder, Severity};
use crate::informers::Informers;
use crate::objects::{Key, is_terminating, pod_node, seconds, uid};
use crate::store::Store;
use crate::worker::{self, Outcome, Queue};

/// Pods whose time runs: by key, their uid and since when.
type Clocks = Arc<Mutex<HashMap<Key, (String, Instant)>>>;

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let (add, nodes) = (queue.clone(), context.informers.nodes.clone());
    context.informers.pods.on_change(move |old, new| {
        let Some(pod) = new.or(old) else { return };
        let moved = old.map(|pod| pod_node(pod)) != new.map(|pod| pod_node(pod));
        let tolerations = |pod: Option<&Arc<Pod>>| pod.and_then(|pod| pod.spec.as_ref()).and_then(|spec| spec.tolerations.clone());
        let tainted =
            || nodes.get(&Key::new("", pod_node(pod))).is_some_and(|node| taints(&node).iter().any(|taint| taint.effect == "NoExecute"));
        if new.is_none() || moved && tainted() || !moved && tolerations(old) != tolerations(new) {
            add.add(Key::of(&**pod));
        }
    });
    let (add, pods) = (queue.clone(), context.informers.pods.clone());
    context.informers.nodes.on_change(move |old, new| {
        let no_execute = |node: &Arc<_>| taints(node).iter().filter(|taint| taint.effect == "NoExecute").cloned().collect::<Vec<_>>();
        let (before, after) = (old.map(no_execute).unwrap_or_default(), new.map(no_execute).unwrap_or_default());
        if let Some(node) = new.filter(|_| before != after) {
            let title = node.metadata.name.as_deref().unwrap_or_default();
            pods.list().iter().filter(|pod| pod_node(pod) == title).for_each(|pod| add.add(Key::of(&**pod)));
        }
    });
    let worker = Worker {
        informers: context.informers.clone(),
        recorder: context.recorder.named("taint-eviction-controller"),
        clocks: Clocks::default(),
    };
    tasks.spawn(worker::run("taint-eviction", queue, 8, move |key| sync(worker.clone(), key)));
}

#[derive(Clone)]
struct Worker {
    informers: Arc<Informers>,
    recorder: Recorder,
    clocks: Clocks,
}

async fn sync(worker: Worker, key: Key) -> Outcome {
    let pod = worker.informers.pods.get(&key).filter(|pod| !is_terminating(&pod.metadata));
    let Some(pod) = pod else {
        worker.stop_clock(&key);
        return Ok(None);
    };
    let node = worker.informers.nodes.get(&Key::new("", pod_node(&pod)));
    let bad: Vec<Taint> = node.iter().flat_map(|node| taints(node)).filter(|taint| taint.effect == "NoExecute").cloned().collect();
    match allowance(&bad, pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default()) {
        Allowance::Forever => {
            if worker.stop_clock(&key) {
                worker.tell(&pod, format!("Cancelling deletion of Pod {key}"));
            }
            Ok(None)
        }
        Allowance::None => worker.evict(&key, &pod).await,
        Allowance::For(time) => {
            let since = worker.clock(&key, uid(&pod.metadata));
            match time.checked_sub(since.elapsed()).filter(|left| !left.is_zero()) {
                Some(left) => Ok(Some(left)),
                None => worker.evict(&key, &pod).await,
            }
        }
    }
}

impl Worker {
    fn clock(&self, key: &Key, uid: &str) -> Instant {
        let mut clocks = self.clocks.lock().unwrap_or_else(PoisonError::into_inner);
        let clock = clocks.entry(key.clone()).or_insert_with(|| (uid.to_owned(), Instant::now()));
        if clock.0 != uid {
            *clock = (uid.to_owned(), Instant::now());
        }
        clock.1
    }

    fn stop_clock(&self, key: &Key) -> bool {
        self.clocks.lock().unwrap_or_else(PoisonError::into_inner).remove(key).is_some()
    }

    fn tell(&self, pod: &Pod, message: String) {
        let about = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..Default::default()
        };
        self.recorder.record(about, Severity::Normal, "TaintManagerEviction", message);
    }

    async fn evict(&self, key: &Key, pod: &Pod) -> Outcome {
        self.tell(pod, format!("Marking for deletion Pod {key}"));
        let message = "Taint manager: deleting due to NoExecute taint";
        disrupt(&self.informers.pods, pod, "DeletionByTaintManager", message, None).await?;
        unless_gone(self.informers.pods.delete(pod, DeleteParams::default()).await)?;
        self.stop_clock(key);
        Ok(None)
    }
}

/// Writes on a pod why it is about to be deleted; with `phase`, that it has ended.
pub async fn disrupt(pods: &Store<Pod>, pod: &Pod, reason: &str, message: &str, phase: Option<&str>) -> Result<(), SyncError> {
    let condition = PodCondition {
        type_: "DisruptionTarget".into(),
        status: TRUE.into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        last_transition_time: Some(seconds(Timestamp::now())),
        observed_generation: pod.metadata.generation,
        ..Default::default()
    };
    let mut status = json!({});
    if !reason.is_empty() {
        status["conditions"] = json!([condition]);
    }
    if let Some(phase) = phase {
        status["phase"] = json!(phase);
    }
    unless_gone(pods.strategic_status(&Key::of(pod), json!({"metadata": {"uid": uid(&pod.metadata)}, "status": status})).await)
}

#[derive(Debug, PartialEq)]
enum Allowance {
    None,
    For(Duration),
    Forever,
}

pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let any = |text: Option<&String>| text.is_none_or(String::is_empty);
    let effect = any(toleration.effect.as_ref()) || toleration.effect.as_ref() == Some(&taint.effect);
    let key = any(toleration.key.as_ref()) || toleration.key.as_ref() == Some(&taint.key);
    let value = match toleration.operator.as_deref() {
        Some("Exists") => true,
        None | Some("" | "Equal") => toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default(),
        Some(_) => false,
    };
    effect && key && value
}

/// How long all `taints` are tolerated together.
fn allowance(taints: &[Taint], tolerations: &[Toleration]) -> Allowance {
    let used: Vec<&Toleration> = tolerations.iter().filter(|toleration| taints.iter().any(|taint| tolerates(toleration, taint))).collect();
    if !taints.iter().all(|taint| used.iter().any(|toleration| tolerates(toleration, taint))) {
        return Allowance::None;
    }
    match used.iter().filter_map(|toleration| toleration.toleration_seconds).min() {
        None => Allowance::Forever,
        Some(seconds) if seconds <= 0 => Allowance::None,
        Some(seconds) => Allowance::For(Duration::from_secs(seconds.unsigned_abs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taint(key: &str) -> Taint {
        Taint { key: key.into(), effect: "NoExecute".into(), ..Default::default() }
    }

    fn exists(key: &str, seconds: Option<i64>) -> Toleration {
        Toleration { key: Some(key.into()), operator: Some("Exists".into()), toleration_seconds: seconds, ..Default::default() }
    }

    #[test]
    fn the_shortest_toleration_counts() {
        let two = [taint("a"), taint("b")];
        let cases = [
            (vec![], vec![], Allowance::Forever),
            (two.to_vec(), vec![exists("a", None)], Allowance::None),
            (two.to_vec(), vec![exists("a", Some(300)), exists("b", Some(30))], Allowance::For(Duration::from_secs(30))),
            (two.to_vec(), vec![exists("", None)], Allowance::Forever),
            (two.to_vec(), vec![exists("a", Some(0)), exists("b", None)], Allowance::None),
            (vec![taint("a")], vec![exists("a", None), exists("other", Some(1))], Allowance::Forever),
        ];
        for (taints, tolerations, expected) in cases {
            assert_eq!(allowance(&taints, &tolerations), expected, "{tolerations:?}");
        }
    }
}
