//! Empties a deleted namespace, then lets it go.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition, Pod};
use kube::api::{DeleteParams, ListParams, ObjectList, PostParams};
use kube::core::{DynamicObject, PartialObjectMeta, Request};
use tokio::task::JoinSet;

use crate::Context;
use crate::conditions::{self, FALSE, TRUE};
use crate::discovery::{Resource, discover};
use crate::error::SyncError;
use crate::informers::Informers;
use crate::objects::{Key, is_terminal};
use crate::worker::{self, Outcome, Queue};

/// How long finalizers may be expected to take.
const FINALIZER_ESTIMATE: i64 = 15;

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.namespaces.on_change(move |_, new| {
        if let Some(object) = new.filter(|namespace| namespace.metadata.deletion_timestamp.is_some()) {
            add.add(Key::of(&**object));
        }
    });
    // The last pod's end is worth a look at once; the rest is asked again after the estimate.
    let (add, namespaces) = (queue.clone(), context.informers.namespaces.clone());
    context.informers.pods.on_change(move |old, new| {
        if let (Some(gone), None) = (old, new)
            && let Some(namespace) = namespaces.get(&Key::new("", gone.metadata.namespace.clone().unwrap_or_default()))
            && namespace.metadata.deletion_timestamp.is_some()
        {
            add.add_after(Key::of(&*namespace), Duration::from_millis(50));
        }
    });
    let informers = context.informers.clone();
    tasks.spawn(worker::run("namespace", queue, 10, move |key| sync(informers.clone(), key)));
}

async fn sync(informers: Arc<Informers>, key: Key) -> Outcome {
    let Some(live) = informers.namespaces.get_live(&key).await? else { return Ok(None) };
    let Some(deleted_at) = live.metadata.deletion_timestamp.clone() else { return Ok(None) };
    let mut namespace = live;
    if namespace.status.as_ref().and_then(|status| status.phase.as_deref()) != Some("Terminating") {
        namespace.status.get_or_insert_default().phase = Some("Terminating".into());
        namespace = (*informers.namespaces.update_status(&namespace).await?).clone();
    }
    if namespace.spec.as_ref().and_then(|spec| spec.finalizers.as_ref()).is_none_or(Vec::is_empty) {
        return Ok(None);
    }
    let content = delete_content(&informers, &key.name, deleted_at.0).await?;
    let mut updated = namespace.clone();
    let status = updated.status.get_or_insert_default();
    if apply_conditions(&mut status.conditions, content.conditions(), Timestamp::now()) {
        match informers.namespaces.update_status(&updated).await {
            Ok(written) => namespace = (*written).clone(),
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    if let Some((_, message)) = content.failures.first() {
        return Err(SyncError::Other(message.clone()));
    }
    if content.estimate > 0 || !content.remaining.is_empty() {
        return Ok(Some(content.wait()));
    }
    finalize(&informers, namespace).await
}

/// Takes our name off the finalizers: the API server removes the namespace then.
async fn finalize(informers: &Informers, mut namespace: Namespace) -> Outcome {
    let spec = namespace.spec.get_or_insert_default();
    if let Some(finalizers) = &mut spec.finalizers {
        finalizers.retain(|finalizer| finalizer != "kubernetes");
    }
    let name = namespace.metadata.name.clone().unwrap_or_default();
    let bytes = serde_json::to_vec(&namespace).map_err(kube::Error::SerdeError)?;
    let request = Request::new("/api/v1/namespaces").replace_subresource("finalize", &name, &PostParams::default(), bytes);
    let request = request.map_err(kube::Error::BuildRequest)?;
    match informers.client.request::<serde_json::Value>(request).await.map_err(SyncError::Api) {
        Ok(_) => Ok(None),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// What emptying the namespace came to.
#[derive(Debug, Default)]
struct Content {
    /// Seconds that what is left may still take; 0 when nothing is known to take time.
    estimate: i64,
    /// `resource.group` to the number of objects left.
    remaining: BTreeMap<String, usize>,
    finalizers: BTreeMap<String, usize>,
    /// By condition type.
    failures: Vec<(&'static str, String)>,
}

impl Content {
    fn wait(&self) -> Duration {
        // Upstream waits half the estimate and a second; pods' ends wake us earlier.
        Duration::from_secs((self.estimate / 2 + 1).clamp(1, 60).unsigned_abs())
    }

    fn add(&mut self, resource: &Resource, outcome: Result<Left, SyncError>) {
        match outcome {
            Err(error) => self.failures.push(("NamespaceDeletionContentFailure", error.message())),
            Ok(left) if left.count > 0 => {
                self.remaining.insert(format!("{}.{}", resource.api.plural, resource.api.group), left.count);
                for (finalizer, count) in left.finalizers {
                    *self.finalizers.entry(finalizer).or_default() += count;
                }
                self.estimate = self.estimate.max(left.estimate);
            }
            Ok(_) => {}
        }
    }

    /// The five conditions of a namespace under deletion: (type, status, reason, message).
    fn conditions(&self) -> Vec<(&'static str, &'static str, &'static str, String)> {
        let failed =
            |kind: &str| self.failures.iter().filter(|(of, _)| *of == kind).map(|(_, message)| message.clone()).collect::<Vec<_>>();
        let list = |counts: &BTreeMap<String, usize>, verb: &str| {
            counts.iter().map(|(what, count)| format!("{what} {verb} {count} resource instances")).collect::<Vec<_>>().join(", ")
        };
        let discovery = failed("NamespaceDeletionDiscoveryFailure");
        let mut content = failed("NamespaceDeletionContentFailure");
        content.sort();
        let condition = |kind, bad: Option<(&'static str, String)>, good: (&'static str, &'static str)| match bad {
            Some((reason, message)) => (kind, TRUE, reason, message),
            None => (kind, FALSE, good.0, good.1.to_owned()),
        };
        vec![
            condition(
                "NamespaceDeletionDiscoveryFailure",
                discovery.first().map(|message| ("DiscoveryFailed", message.clone())),
                ("ResourcesDiscovered", "All resources successfully discovered"),
            ),
            condition(
                "NamespaceDeletionGroupVersionParsingFailure",
                None,
                ("ParsedGroupVersions", "All legacy kube types successfully parsed"),
            ),
            condition(
                "NamespaceDeletionContentFailure",
                (!content.is_empty()).then(|| {
                    (
                        "ContentDeletionFailed",
                        format!("Failed to delete all resource types, {} remaining: {}", content.len(), content.join(", ")),
                    )
                }),
                ("ContentDeleted", "All content successfully deleted, may be waiting on finalization"),
            ),
            condition(
                "NamespaceContentRemaining",
                (!self.remaining.is_empty())
                    .then(|| ("SomeResourcesRemain", format!("Some resources are remaining: {}", list(&self.remaining, "has")))),
                ("ContentRemoved", "All content successfully removed"),
            ),
            condition(
                "NamespaceFinalizersRemaining",
                (!self.finalizers.is_empty()).then(|| {
                    (
                        "SomeFinalizersRemain",
                        format!("Some content in the namespace has finalizers remaining: {}", list(&self.finalizers, "in")),
                    )
                }),
                ("ContentHasNoFinalizers", "All content-preserving finalizers finished"),
            ),
        ]
    }
}

fn apply_conditions(known: &mut Option<Vec<NamespaceCondition>>, wanted: Vec<(&str, &str, &str, String)>, now: Timestamp) -> bool {
    let mut changed = false;
    for (kind, status, reason, message) in wanted {
        let current = conditions::find(known.as_ref(), kind);
        if current.is_some_and(|current| {
            current.status == status && current.reason.as_deref() == Some(reason) && current.message.as_ref() == Some(&message)
        }) {
            continue;
        }
        let since = conditions::since(current, status, |current| current.last_transition_time.clone(), now);
        let condition = NamespaceCondition {
            type_: kind.into(),
            status: status.into(),
            reason: Some(reason.into()),
            message: Some(message),
            last_transition_time: Some(since),
        };
        let list = known.get_or_insert_default();
        match list.iter_mut().find(|known| known.type_ == kind) {
            Some(place) => *place = condition,
            None => list.push(condition),
        }
        changed = true;
    }
    changed
}

/// What is left of one resource in the namespace.
#[derive(Debug, Default)]
struct Left {
    count: usize,
    finalizers: BTreeMap<String, usize>,
    estimate: i64,
}

/// Deletes everything; pods first and alone, so that what they use (secrets, policies) outlives them.
async fn delete_content(informers: &Informers, namespace: &str, deleted_at: Timestamp) -> Result<Content, SyncError> {
    let mut content = Content::default();
    let found = discover(&informers.client).await?;
    if !found.failures.is_empty() {
        let list = found.failures.iter().map(|(group, error)| format!("{group}: {error}")).collect::<Vec<_>>().join(", ");
        let message = format!(
            "Discovery failed for some groups, {} failing: unable to retrieve the complete list of server APIs: {list}",
            found.failures.len()
        );
        content.failures.push(("NamespaceDeletionDiscoveryFailure", message));
    }
    let deletable = |resource: &&Resource| resource.namespaced && resource.can("delete");
    let is_pods = |resource: &Resource| resource.api.group.is_empty() && resource.api.plural == "pods";
    for resource in found.resources.iter().filter(deletable).filter(|resource| is_pods(resource)) {
        let grace = pods_grace(informers, namespace, deleted_at);
        content.add(resource, delete_all(informers, resource, namespace, grace).await);
        if !content.remaining.is_empty() {
            return Ok(content);
        }
    }
    for resource in found.resources.iter().filter(deletable).filter(|resource| !is_pods(resource)) {
        content.add(resource, delete_all(informers, resource, namespace, 0).await);
    }
    Ok(content)
}

/// Seconds that the namespace's pods may take to end; 0 once they have had that long.
fn pods_grace(informers: &Informers, namespace: &str, deleted_at: Timestamp) -> i64 {
    let grace = |pod: &Arc<Pod>| pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(0);
    let longest = informers.pods.select(namespace, |pod| !is_terminal(pod)).iter().map(grace).max().unwrap_or(0);
    if Timestamp::now().as_second() - deleted_at.as_second() >= longest { 0 } else { longest }
}

async fn delete_all(informers: &Informers, resource: &Resource, namespace: &str, estimate: i64) -> Result<Left, SyncError> {
    let client = &informers.client;
    let requests = Request::new(resource.path(Some(namespace)));
    let params = DeleteParams::background();
    let mut collected = false;
    if resource.can("deletecollection") {
        let request = requests.delete_collection(&params, &ListParams::default()).map_err(kube::Error::BuildRequest)?;
        collected = supported(client.request::<serde_json::Value>(request).await)?;
    }
    if !collected {
        for object in list(informers, resource, &requests).await? {
            let name = object.metadata.name.unwrap_or_default();
            let request = requests.delete(&name, &params).map_err(kube::Error::BuildRequest)?;
            supported(client.request::<serde_json::Value>(request).await)?;
        }
    }
    let left = list(informers, resource, &requests).await?;
    let mut finalizers = BTreeMap::new();
    for finalizer in left.iter().flat_map(|object| object.metadata.finalizers.iter().flatten()) {
        *finalizers.entry(finalizer.clone()).or_default() += 1;
    }
    if left.is_empty() {
        return Ok(Left::default());
    }
    let estimate = match estimate {
        0 if finalizers.is_empty() && left.iter().all(|object| object.metadata.deletion_timestamp.is_none()) => {
            let Resource { api, .. } = resource;
            return Err(SyncError::Other(format!(
                "unexpected items still remain in namespace: {namespace} for gvr: {}/{}, Resource={}",
                api.group, api.version, api.plural
            )));
        }
        0 => FINALIZER_ESTIMATE,
        estimate => estimate,
    };
    Ok(Left { count: left.len(), finalizers, estimate })
}

/// False when the server doesn't do that for the resource, whatever its discovery said.
fn supported<T>(result: Result<T, kube::Error>) -> Result<bool, SyncError> {
    match result {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 405 => Ok(false),
        Err(error) => Err(error.into()),
    }
}

async fn list(informers: &Informers, resource: &Resource, requests: &Request) -> Result<Vec<PartialObjectMeta<DynamicObject>>, SyncError> {
    if !resource.can("list") {
        return Ok(Vec::new());
    }
    let request = requests.list_metadata(&ListParams::default()).map_err(kube::Error::BuildRequest)?;
    match informers.client.request::<ObjectList<PartialObjectMeta<DynamicObject>>>(request).await {
        Ok(list) => Ok(list.items),
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 405 => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::seconds;

    #[test]
    fn what_is_left_is_said_in_the_conditions() {
        let mut content = Content::default();
        let good: Vec<_> = content.conditions().iter().map(|(_, status, ..)| *status).collect();
        assert_eq!(good, [FALSE; 5]);
        content.remaining.insert("pods.".into(), 2);
        content.finalizers.insert("example.com/hold".into(), 1);
        let mut known = None;
        let at = |second| Timestamp::from_second(second).unwrap();
        assert!(apply_conditions(&mut known, content.conditions(), at(1)));
        assert!(!apply_conditions(&mut known, content.conditions(), at(2)), "the same again changes nothing");
        let message = |kind| conditions::find(known.as_ref(), kind).unwrap().message.clone().unwrap();
        assert_eq!(message("NamespaceContentRemaining"), "Some resources are remaining: pods. has 2 resource instances");
        assert_eq!(
            message("NamespaceFinalizersRemaining"),
            "Some content in the namespace has finalizers remaining: example.com/hold in 1 resource instances"
        );
        assert_eq!(conditions::find(known.as_ref(), "NamespaceContentRemaining").unwrap().last_transition_time, Some(seconds(at(1))));
    }
}
