//! Feeds the graph: from the shared stores for kinds that have one, from watches of metadata alone for all others.
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use kube::api::{ListParams, ObjectList, WatchEvent, WatchParams};
use kube::core::{DynamicObject, PartialObjectMeta, Request};
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use super::Collector;
use super::graph::Kind;
use crate::discovery::{Resource, discover};
use crate::informers::Informers;
use crate::store::{Object, Store};

/// How often kinds are looked for, besides when a definition changes.
const REDISCOVERY: Duration = Duration::from_secs(30);

/// Kinds that own nothing, are owned by nothing and are many.
fn is_ignored(resource: &Resource) -> bool {
    resource.api.kind == "Event" && matches!(resource.api.group.as_str(), "" | "events.k8s.io")
}

pub fn kind_of(resource: &Resource) -> Kind {
    Kind { api_version: resource.api.api_version.clone(), kind: resource.api.kind.clone() }
}

fn feed<K: Object>(store: &Store<K>, collector: &Arc<Collector>, covered: &mut HashSet<(String, String)>) {
    let kind = Arc::new(Kind { api_version: K::api_version(&()).into_owned(), kind: K::kind(&()).into_owned() });
    covered.insert((K::group(&()).into_owned(), K::plural(&()).into_owned()));
    let collector = collector.clone();
    store.on_change(move |old, new| match (old, new) {
        (_, Some(object)) => collector.applied(&kind, object.meta()),
        (Some(gone), None) => collector.gone(gone.meta()),
        (None, None) => {}
    });
}

/// Kinds that are watched whole anyway: (group, plural).
pub fn feed_from_stores(informers: &Informers, collector: &Arc<Collector>) -> HashSet<(String, String)> {
    let mut covered = HashSet::new();
    let seen = &mut covered;
    feed(&informers.pods, collector, seen);
    feed(&informers.nodes, collector, seen);
    feed(&informers.namespaces, collector, seen);
    feed(&informers.services, collector, seen);
    feed(&informers.endpoints, collector, seen);
    feed(&informers.endpoint_slices, collector, seen);
    feed(&informers.replica_sets, collector, seen);
    feed(&informers.deployments, collector, seen);
    feed(&informers.replication_controllers, collector, seen);
    feed(&informers.daemon_sets, collector, seen);
    feed(&informers.stateful_sets, collector, seen);
    feed(&informers.controller_revisions, collector, seen);
    feed(&informers.jobs, collector, seen);
    feed(&informers.cron_jobs, collector, seen);
    feed(&informers.service_accounts, collector, seen);
    feed(&informers.quotas, collector, seen);
    feed(&informers.disruption_budgets, collector, seen);
    feed(&informers.volumes, collector, seen);
    feed(&informers.volume_claims, collector, seen);
    feed(&informers.storage_classes, collector, seen);
    feed(&informers.cluster_roles, collector, seen);
    feed(&informers.csrs, collector, seen);
    covered
}

/// Keeps one metadata watch per further kind, as kinds come and go.
pub async fn watch_kinds(client: Client, collector: Arc<Collector>, covered: HashSet<(String, String)>) {
    let mut watches: BTreeMap<Kind, JoinHandle<()>> = BTreeMap::new();
    loop {
        match discover(&client).await {
            Ok(found) => {
                let wanted: BTreeMap<Kind, Resource> = found
                    .resources
                    .iter()
                    .filter(|resource| ["list", "watch", "delete"].iter().all(|verb| resource.can(verb)) && !is_ignored(resource))
                    .map(|resource| (kind_of(resource), resource.clone()))
                    .collect();
                // A group that can't be asked right now hasn't gone.
                if found.failures.is_empty() {
                    let left: Vec<Kind> = watches.keys().filter(|kind| !wanted.contains_key(kind)).cloned().collect();
                    for kind in left {
                        info!(kind = kind.kind, "kind is gone");
                        if let Some(watch) = watches.remove(&kind) {
                            watch.abort();
                        }
                        collector.retained(&kind, &HashSet::new());
                    }
                }
                collector.set_resources(found.resources.clone(), found.failures.is_empty());
                for (kind, resource) in wanted {
                    let known = covered.contains(&(resource.api.group.clone(), resource.api.plural.clone()));
                    if !known && !watches.contains_key(&kind) {
                        debug!(kind = kind.kind, "watching metadata");
                        let task = tokio::spawn(watch(client.clone(), collector.clone(), resource));
                        watches.insert(kind, task);
                    }
                }
            }
            Err(error) => warn!(%error, "can't ask for kinds; it is tried again"),
        }
        tokio::select! { () = tokio::time::sleep(REDISCOVERY) => {}, () = collector.kinds_changed.notified() => tokio::time::sleep(Duration::from_millis(200)).await }
    }
}

type Meta = PartialObjectMeta<DynamicObject>;

async fn watch(client: Client, collector: Arc<Collector>, resource: Resource) {
    let kind = Arc::new(kind_of(&resource));
    let definitions = resource.api.plural == "customresourcedefinitions";
    let requests = Request::new(resource.path(None));
    let mut failures = 0u32;
    loop {
        match list(&client, &collector, &kind, &requests).await {
            Ok(version) => {
                failures = 0;
                follow(&client, &collector, &kind, &requests, version, definitions).await;
            }
            Err(error) => {
                failures = (failures + 1).min(8);
                debug!(kind = kind.kind, %error, "can't list metadata; it is tried again");
            }
        }
        tokio::time::sleep(Duration::from_millis(100 << failures)).await;
    }
}

async fn list(client: &Client, collector: &Collector, kind: &Arc<Kind>, requests: &Request) -> Result<String, kube::Error> {
    let mut params = ListParams::default().limit(500);
    let mut there = HashSet::new();
    loop {
        let request = requests.list_metadata(&params).map_err(kube::Error::BuildRequest)?;
        let page = client.request::<ObjectList<Meta>>(request).await?;
        for object in &page.items {
            there.insert(object.metadata.uid.clone().unwrap_or_default());
            collector.applied(kind, &object.metadata);
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => {
                collector.retained(kind, &there);
                return Ok(page.metadata.resource_version.unwrap_or_default());
            }
        }
    }
}

async fn follow(client: &Client, collector: &Collector, kind: &Arc<Kind>, requests: &Request, mut version: String, definitions: bool) {
    let params = WatchParams::default().timeout(290);
    let note = |meta: &ObjectMeta| meta.resource_version.clone().unwrap_or_default();
    loop {
        let Ok(request) = requests.watch_metadata(&params, &version) else { return };
        let Ok(stream) = client.request_events::<Meta>(request).await else { return };
        let mut stream = std::pin::pin!(stream);
        loop {
            match stream.try_next().await {
                Ok(Some(WatchEvent::Added(object) | WatchEvent::Modified(object))) => {
                    version = note(&object.metadata);
                    collector.applied(kind, &object.metadata);
                }
                Ok(Some(WatchEvent::Deleted(object))) => {
                    version = note(&object.metadata);
                    collector.gone(&object.metadata);
                }
                Ok(Some(WatchEvent::Bookmark(bookmark))) => {
                    version = bookmark.metadata.resource_version;
                    continue;
                }
                Ok(Some(WatchEvent::Error(_))) => return,
                Ok(None) | Err(_) => break,
            }
            if definitions {
                collector.kinds_changed.notify_one();
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
