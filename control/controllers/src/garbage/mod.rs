//! Garbage collection: what nobody owns any more goes, in the order its deletion asked for.
//!
//! `graph` knows who owns whom, `monitor` feeds it, this file deletes. Nothing is deleted on the graph's word
//! alone: that an owner is gone is asked of the API server first.
mod graph;
mod monitor;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions, PropagationPolicy};
use kube::core::{DynamicObject, PartialObjectMeta, Request};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::debug;

use crate::Context;
use crate::discovery::Resource;
use crate::error::SyncError;
use crate::objects::{has_finalizer, namespace, uid};
use crate::quota::Recount;
use crate::worker::{self, Outcome, Queue};

use graph::{FOREGROUND, Graph, Item, Kind, ORPHAN, Owner, Task};

/// `gone` hears the namespace of every object that is no more.
pub fn start(context: &Context, tasks: &mut JoinSet<()>, gone: Recount) {
    let queue = Queue::<Task>::new();
    let client = context.informers.client.clone();
    let collector = Arc::new(Collector {
        client: client.clone(),
        graph: Mutex::default(),
        queue: queue.clone(),
        resources: Mutex::default(),
        kinds_changed: Notify::new(),
        gone,
    });
    let covered = monitor::feed_from_stores(&context.informers, &collector);
    tasks.spawn(monitor::watch_kinds(client, collector.clone(), covered));
    tasks.spawn(worker::run("garbage-collector", queue, 20, move |task| work(collector.clone(), task)));
}

/// The graph with its feeders and its workers.
pub struct Collector {
    client: Client,
    graph: Mutex<Graph>,
    queue: Queue<Task>,
    resources: Mutex<Vec<Resource>>,
    /// Rung when a definition of a kind changes.
    kinds_changed: Notify,
    gone: Recount,
}

type Meta = PartialObjectMeta<DynamicObject>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Collector {
    fn applied(&self, kind: &Arc<Kind>, meta: &ObjectMeta) {
        let tasks = lock(&self.graph).apply(kind, meta);
        tasks.into_iter().for_each(|task| self.queue.add(task));
    }

    fn gone(&self, meta: &ObjectMeta) {
        self.gone_uid(uid(meta));
        (self.gone)(namespace(meta));
    }

    fn gone_uid(&self, uid: &str) {
        let tasks = lock(&self.graph).remove(uid);
        tasks.into_iter().for_each(|task| self.queue.add(task));
    }

    fn retained(&self, kind: &Kind, there: &HashSet<String>) {
        let tasks = lock(&self.graph).retain(kind, there);
        tasks.into_iter().for_each(|task| self.queue.add(task));
    }

    /// With `complete` unset, kinds that weren't found stay known.
    fn set_resources(&self, found: Vec<Resource>, complete: bool) {
        let mut resources = lock(&self.resources);
        if complete {
            *resources = found;
        } else {
            resources.retain(|known| !found.iter().any(|new| new.api.group == known.api.group && new.api.plural == known.api.plural));
            resources.extend(found);
        }
    }

    /// The resource of a kind; another version of its group will do.
    fn resource(&self, kind: &Kind) -> Result<Resource, SyncError> {
        let resources = lock(&self.resources);
        let of_kind = || resources.iter().filter(|resource| resource.api.kind == kind.kind && resource.api.group == kind.group());
        let exact = of_kind().find(|resource| resource.api.api_version == kind.api_version);
        let found = exact.or_else(|| of_kind().next()).cloned();
        found.ok_or_else(|| SyncError::Other(format!("unable to get REST mapping for {}/{}.", kind.api_version, kind.kind)))
    }

    fn requests(&self, item: &Item) -> Result<(Request, Resource), SyncError> {
        let resource = self.resource(&item.kind)?;
        Ok((Request::new(resource.path(Some(&item.namespace))), resource))
    }

    async fn live(&self, requests: &Request, name: &str) -> Result<Option<Meta>, SyncError> {
        let request = requests.get_metadata(name, &Default::default()).map_err(kube::Error::BuildRequest)?;
        match self.client.request::<Meta>(request).await.map_err(SyncError::Api) {
            Ok(object) => Ok(Some(object)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn patch(&self, requests: &Request, name: &str, patch: Value) -> Result<(), SyncError> {
        let request = requests.patch(name, &PatchParams::default(), &Patch::Merge(patch)).map_err(kube::Error::BuildRequest)?;
        unless_not_found(self.client.request::<Value>(request).await.map_err(SyncError::Api))
    }

    async fn delete(&self, requests: &Request, live: &ObjectMeta, policy: PropagationPolicy) -> Result<(), SyncError> {
        let params = DeleteParams {
            propagation_policy: Some(policy),
            preconditions: Some(Preconditions { uid: live.uid.clone(), resource_version: live.resource_version.clone() }),
            ..Default::default()
        };
        let request = requests.delete(live.name.as_deref().unwrap_or_default(), &params).map_err(kube::Error::BuildRequest)?;
        unless_not_found(self.client.request::<Value>(request).await.map_err(SyncError::Api))
    }
}

fn unless_not_found<T>(result: Result<T, SyncError>) -> Result<(), SyncError> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other.map(drop),
    }
}

async fn work(collector: Arc<Collector>, task: Task) -> Outcome {
    let (Task::Delete(id) | Task::Orphan(id)) = &task;
    let Some(item) = lock(&collector.graph).get(id).cloned() else { return Ok(None) };
    match task {
        Task::Delete(_) => collector.consider(&item).await?,
        Task::Orphan(_) => collector.orphan(&item).await?,
    }
    Ok(None)
}

/// An item's owners, by what can be expected of them.
#[derive(Default)]
struct Owners {
    /// There, and there to stay.
    solid: Vec<Owner>,
    absent: Vec<Owner>,
    /// Under deletion, waiting for this item among others.
    waiting: Vec<Owner>,
}

impl Collector {
    async fn consider(&self, item: &Item) -> Result<(), SyncError> {
        if item.deleting && !item.waits_for_dependents {
            return Ok(());
        }
        let (requests, resource) = match self.requests(item) {
            Ok(found) => found,
            // The kind of an owner that nobody has seen: its dependents stay as long as it can't be asked for.
            Err(error) if item.is_virtual => {
                debug!(kind = item.kind.kind, error = %error.message(), "an owner's kind isn't known");
                return Err(error);
            }
            Err(_) => return Ok(()),
        };
        if item.is_virtual && resource.namespaced && item.namespace.is_empty() {
            debug!(owner = item.name, "a cluster-scoped object names a namespaced owner");
            return Ok(());
        }
        let live = self.live(&requests, &item.name).await?.filter(|live| uid(&live.metadata) == item.uid);
        let Some(live) = live else {
            self.gone_uid(&item.uid);
            return Ok(());
        };
        if item.waits_for_dependents {
            return self.move_foreground_on(item, &requests, &live.metadata).await;
        }
        let references: Vec<Owner> = live.metadata.owner_references.iter().flatten().map(Owner::from).collect();
        if references.is_empty() || live.metadata.deletion_timestamp.is_some() {
            return Ok(());
        }
        let owners = self.classify(&references, &item.namespace, resource.namespaced).await?;
        self.act(item, &requests, &live.metadata, owners).await
    }

    async fn act(&self, item: &Item, requests: &Request, live: &ObjectMeta, owners: Owners) -> Result<(), SyncError> {
        if !owners.solid.is_empty() {
            let lost: Vec<&str> = owners.absent.iter().chain(&owners.waiting).map(|owner| owner.uid.as_str()).collect();
            if lost.is_empty() {
                return Ok(());
            }
            return self.drop_references(requests, live, &lost).await;
        }
        if !owners.waiting.is_empty() && !lock(&self.graph).dependents(&item.uid).is_empty() {
            self.break_circles(item).await?;
            return self.delete(requests, live, PropagationPolicy::Foreground).await;
        }
        let policy = if has_finalizer(live, ORPHAN) {
            PropagationPolicy::Orphan
        } else if has_finalizer(live, FOREGROUND) {
            PropagationPolicy::Foreground
        } else {
            PropagationPolicy::Background
        };
        debug!(kind = item.kind.kind, namespace = item.namespace, name = item.name, "no owner is left; deleting");
        match self.delete(requests, live, policy).await {
            // Somebody wrote it meanwhile, perhaps a new owner: look again.
            Err(error) if error.is_conflict() => Err(error),
            other => other,
        }
    }

    /// Dependents that wait for their own dependents could be waiting for this very item.
    async fn break_circles(&self, item: &Item) -> Result<(), SyncError> {
        let dependents = lock(&self.graph).dependents(&item.uid);
        for dependent in dependents.iter().filter(|dependent| dependent.waits_for_dependents) {
            let (requests, _) = self.requests(dependent)?;
            let Some(live) = self.live(&requests, &dependent.name).await? else { continue };
            let mut references = live.metadata.owner_references.clone().unwrap_or_default();
            references.iter_mut().for_each(|reference| reference.block_owner_deletion = Some(false));
            let patch = json!({"metadata": {"uid": live.metadata.uid, "resourceVersion": live.metadata.resource_version, "ownerReferences": references}});
            self.patch(&requests, &dependent.name, patch).await?;
        }
        Ok(())
    }

    async fn classify(&self, references: &[Owner], namespace: &str, namespaced: bool) -> Result<Owners, SyncError> {
        let mut owners = Owners::default();
        for owner in references {
            let known = lock(&self.graph).get(&owner.uid).cloned().filter(|known| !known.is_virtual && known.name == owner.name);
            if let Some(known) = known {
                let list = if known.waits_for_dependents { &mut owners.waiting } else { &mut owners.solid };
                list.push(owner.clone());
                continue;
            }
            let resource = self.resource(&owner.kind)?;
            if resource.namespaced && !namespaced {
                // Such a reference can't be resolved: the object is left alone.
                owners.solid.push(owner.clone());
                continue;
            }
            let requests = Request::new(resource.path(Some(namespace)));
            match self.live(&requests, &owner.name).await?.filter(|live| uid(&live.metadata) == owner.uid) {
                None => owners.absent.push(owner.clone()),
                Some(live) if live.metadata.deletion_timestamp.is_some() && has_finalizer(&live.metadata, FOREGROUND) => {
                    owners.waiting.push(owner.clone())
                }
                Some(_) => owners.solid.push(owner.clone()),
            }
        }
        Ok(owners)
    }

    /// The finalizer goes when nothing blocks any more; until then the dependents are looked at.
    async fn move_foreground_on(&self, item: &Item, requests: &Request, live: &ObjectMeta) -> Result<(), SyncError> {
        let blocking = lock(&self.graph).blocking(&item.uid);
        if blocking.is_empty() {
            return self.drop_finalizer(requests, live, FOREGROUND).await;
        }
        for dependent in blocking.iter().filter(|dependent| !dependent.waits_for_dependents) {
            self.queue.add(Task::Delete(dependent.uid.clone()));
        }
        Ok(())
    }

    async fn drop_references(&self, requests: &Request, live: &ObjectMeta, lost: &[&str]) -> Result<(), SyncError> {
        let left: Vec<_> = live.owner_references.iter().flatten().filter(|reference| !lost.contains(&reference.uid.as_str())).collect();
        let patch = json!({"metadata": {"uid": live.uid, "resourceVersion": live.resource_version, "ownerReferences": left}});
        self.patch(requests, live.name.as_deref().unwrap_or_default(), patch).await
    }

    async fn drop_finalizer(&self, requests: &Request, live: &ObjectMeta, finalizer: &str) -> Result<(), SyncError> {
        if !has_finalizer(live, finalizer) {
            return Ok(());
        }
        let left: Vec<_> = live.finalizers.iter().flatten().filter(|entry| *entry != finalizer).collect();
        let patch = json!({"metadata": {"uid": live.uid, "resourceVersion": live.resource_version, "finalizers": left}});
        self.patch(requests, live.name.as_deref().unwrap_or_default(), patch).await
    }

    async fn orphan(&self, item: &Item) -> Result<(), SyncError> {
        let dependents = lock(&self.graph).dependents(&item.uid);
        for dependent in dependents {
            let (requests, _) = self.requests(&dependent)?;
            if let Some(live) = self.live(&requests, &dependent.name).await?.filter(|live| uid(&live.metadata) == dependent.uid)
                && live.metadata.owner_references.iter().flatten().any(|reference| reference.uid == item.uid)
            {
                self.drop_references(&requests, &live.metadata, &[&item.uid]).await?;
            }
        }
        let (requests, _) = self.requests(item)?;
        match self.live(&requests, &item.name).await?.filter(|live| uid(&live.metadata) == item.uid) {
            Some(live) => self.drop_finalizer(&requests, &live.metadata, ORPHAN).await,
            None => Ok(()),
        }
    }
}
