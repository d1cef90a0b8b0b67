//! One list-and-watch per kind for the whole control plane.
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, ReplicationController, ResourceQuota, Secret,
    Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::ClusterRole;
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::{Api, Client, Resource};
use outrigger_client::Decoded;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::objects::Key;
use crate::store::{Object, Store};

/// Every kind that some controller, or the scheduler, follows.
pub struct Informers {
    pub client: Client,
    pub cluster_roles: Store<ClusterRole>,
    /// Only the bundles called kube-root-ca.crt.
    pub config_maps: Store<ConfigMap>,
    pub controller_revisions: Store<ControllerRevision>,
    pub cron_jobs: Store<CronJob>,
    pub csrs: Store<CertificateSigningRequest>,
    pub daemon_sets: Store<DaemonSet>,
    pub deployments: Store<Deployment>,
    pub disruption_budgets: Store<PodDisruptionBudget>,
    pub endpoint_slices: Store<EndpointSlice>,
    pub endpoints: Store<Endpoints>,
    pub jobs: Store<Job>,
    /// Only those of kube-node-lease.
    pub leases: Store<Lease>,
    pub namespaces: Store<Namespace>,
    pub nodes: Store<Node>,
    pub pods: Store<Pod>,
    pub quotas: Store<ResourceQuota>,
    pub replica_sets: Store<ReplicaSet>,
    pub replication_controllers: Store<ReplicationController>,
    /// Only those of type kubernetes.io/service-account-token.
    pub secrets: Store<Secret>,
    pub service_accounts: Store<ServiceAccount>,
    pub services: Store<Service>,
    pub stateful_sets: Store<StatefulSet>,
    pub storage_classes: Store<StorageClass>,
    pub volume_claims: Store<PersistentVolumeClaim>,
    pub volumes: Store<PersistentVolume>,
}

impl Informers {
    /// Starts a watch per kind; they run until the set is dropped.
    pub fn start(client: Client) -> (Arc<Self>, JoinSet<()>) {
        let mut tasks = JoinSet::new();
        let c = &client;
        let t = &mut tasks;
        let informers = Self {
            cluster_roles: follow(c, t, Filter::default()),
            config_maps: follow(c, t, Filter::fields("metadata.name=kube-root-ca.crt")),
            controller_revisions: follow(c, t, Filter::default()),
            cron_jobs: follow(c, t, Filter::default()),
            csrs: follow(c, t, Filter::default()),
            daemon_sets: follow(c, t, Filter::default()),
            deployments: follow(c, t, Filter::default()),
            disruption_budgets: follow(c, t, Filter::default()),
            endpoint_slices: follow(c, t, Filter::default()),
            endpoints: follow(c, t, Filter::default()),
            jobs: follow(c, t, Filter::default()),
            leases: follow(c, t, Filter::namespace("kube-node-lease")),
            namespaces: follow(c, t, Filter::default()),
            nodes: follow(c, t, Filter::default()),
            pods: follow(c, t, Filter::default()),
            quotas: follow(c, t, Filter::default()),
            replica_sets: follow(c, t, Filter::default()),
            replication_controllers: follow(c, t, Filter::default()),
            secrets: follow(c, t, Filter::fields("type=kubernetes.io/service-account-token")),
            service_accounts: follow(c, t, Filter::default()),
            services: follow(c, t, Filter::default()),
            stateful_sets: follow(c, t, Filter::default()),
            storage_classes: follow(c, t, Filter::default()),
            volume_claims: follow(c, t, Filter::default()),
            volumes: follow(c, t, Filter::default()),
            client: client.clone(),
        };
        (Arc::new(informers), tasks)
    }

    /// Resolves when every kind has been listed once: before that no controller may judge what is missing.
    pub async fn synced(&self) {
        tokio::join!(
            self.cluster_roles.synced(),
            self.config_maps.synced(),
            self.controller_revisions.synced(),
            self.cron_jobs.synced(),
            self.csrs.synced(),
            self.daemon_sets.synced(),
            self.deployments.synced(),
            self.disruption_budgets.synced(),
            self.endpoint_slices.synced(),
            self.endpoints.synced(),
            self.jobs.synced(),
            self.leases.synced(),
            self.namespaces.synced(),
            self.nodes.synced(),
            self.pods.synced(),
            self.quotas.synced(),
        );
        tokio::join!(
            self.replica_sets.synced(),
            self.replication_controllers.synced(),
            self.secrets.synced(),
            self.service_accounts.synced(),
            self.services.synced(),
            self.stateful_sets.synced(),
            self.storage_classes.synced(),
            self.volume_claims.synced(),
            self.volumes.synced(),
        );
    }
}

/// The part of a kind that is followed.
#[derive(Clone, Copy, Default)]
struct Filter {
    namespace: &'static str,
    fields: &'static str,
}

impl Filter {
    fn fields(fields: &'static str) -> Self {
        Self { fields, ..Self::default() }
    }

    fn namespace(namespace: &'static str) -> Self {
        Self { namespace, ..Self::default() }
    }
}

fn follow<K: Object>(client: &Client, tasks: &mut JoinSet<()>, filter: Filter) -> Store<K> {
    let store = Store::<K>::new(client.clone());
    tasks.spawn(keep(client.clone(), store.clone(), filter));
    store
}

/// Keeps `store` equal to what the API server has; it keeps its last state while the server is away.
async fn keep<K: Object>(client: Client, store: Store<K>, filter: Filter) {
    let kind = K::kind(&());
    let mut failures = 0u32;
    loop {
        match list(&client, &store, filter).await {
            Ok(version) => {
                failures = 0;
                debug!(%kind, objects = store.len(), "listed");
                watch(&client, &store, filter, version).await;
            }
            Err(error) => {
                failures = (failures + 1).min(7);
                if failures > 3 {
                    warn!(%kind, %error, "can't list; it is tried again");
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(100u64 << failures)).await;
    }
}

/// A path of the whole kind or of one namespace, in a form that lists and watches.
fn requests<K: Object>(filter: Filter) -> kube::core::Request {
    kube::core::Request::new(K::url_path(&(), (!filter.namespace.is_empty()).then_some(filter.namespace)))
}

async fn list<K: Object>(client: &Client, store: &Store<K>, filter: Filter) -> Result<String, kube::Error> {
    let requests = requests::<K>(filter);
    let mut params = ListParams::default().limit(500);
    if !filter.fields.is_empty() {
        params = params.fields(filter.fields);
    }
    let mut objects = Vec::new();
    loop {
        let request = requests.list(&params).map_err(kube::Error::BuildRequest)?;
        let page = client.request::<kube::api::ObjectList<Decoded<K>>>(request).await?;
        objects.extend(page.items.into_iter().filter_map(Decoded::readable));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => {
                let version = page.metadata.resource_version.unwrap_or_default();
                store.replace_all(objects, version.parse().unwrap_or(0));
                return Ok(version);
            }
        }
    }
}

/// Follows the changes after `version`; returns when a new list is needed.
async fn watch<K: Object>(client: &Client, store: &Store<K>, filter: Filter, mut version: String) {
    let kind = K::kind(&());
    let requests = requests::<K>(filter);
    let mut params = WatchParams::default().timeout(290);
    if !filter.fields.is_empty() {
        params = params.fields(filter.fields);
    }
    let mut failures = 0u32;
    loop {
        let Ok(request) = requests.watch(&params, &version) else { return };
        let stream = match client.request_events::<Decoded<K>>(request).await {
            Ok(stream) => stream,
            Err(kube::Error::Api(status)) if status.code == 410 => return,
            Err(error) => {
                failures = (failures + 1).min(7);
                if failures > 3 {
                    warn!(%kind, %error, "can't watch; it is tried again");
                }
                tokio::time::sleep(Duration::from_millis(50u64 << failures)).await;
                continue;
            }
        };
        failures = 0;
        let mut stream = stream.boxed();
        loop {
            match stream.try_next().await {
                Ok(Some(WatchEvent::Added(object) | WatchEvent::Modified(object))) => {
                    version = object.meta().resource_version.clone().unwrap_or(version);
                    object.readable().into_iter().for_each(|object| store.watched(object));
                }
                Ok(Some(WatchEvent::Deleted(object))) => {
                    version = object.meta().resource_version.clone().unwrap_or(version);
                    let last = object.last_state(|gone| store.get(&Key::of_meta(gone)));
                    last.into_iter().for_each(|object| store.watched_gone(object));
                }
                Ok(Some(WatchEvent::Bookmark(bookmark))) => {
                    store.passed(bookmark.metadata.resource_version.parse().unwrap_or(0));
                    version = bookmark.metadata.resource_version;
                }
                Ok(Some(WatchEvent::Error(status))) => {
                    debug!(%kind, code = status.code, message = status.message, "the watch asks for a new list");
                    return;
                }
                Ok(None) => break,
                Err(error) => {
                    debug!(%kind, %error, "the watch broke off; it is taken up again");
                    break;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A typed client of one namespace, for subresources.
pub fn api<K: Object + kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>>(client: &Client, namespace: &str) -> Api<K> {
    Api::namespaced(client.clone(), namespace)
}
