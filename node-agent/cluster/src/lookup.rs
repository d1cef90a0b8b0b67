//! Single objects read on demand: config maps and secrets are watched one by one while a pod refers to them; the rest is fetched.
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::certificates::v1beta1::ClusterTrustBundle;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolume, PersistentVolumeClaim, Pod, Secret};
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::{broadcast, watch};
use tracing::debug;

use crate::mirror::Key;

/// How long a first read waits for the object's watch before it asks the API server directly.
const FIRST_SYNC: Duration = Duration::from_secs(1);

/// A failed read: the API server's own message, as users will see it in events.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub message: String,
    pub not_found: bool,
}

impl Error {
    fn from_kube(error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self { message: status.message.clone(), not_found: status.code == 404 },
            other => Self { message: other.to_string(), not_found: false },
        }
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// The config maps and secrets that one pod refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct References {
    pub config_maps: BTreeSet<Key>,
    pub secrets: BTreeSet<Key>,
}

#[derive(Clone)]
enum Known<K> {
    NotYet,
    Missing,
    Present(Arc<K>),
}

struct Entry<K> {
    holders: HashSet<String>,
    state: watch::Sender<Known<K>>,
    task: tokio::task::AbortHandle,
}

struct Referenced<K> {
    client: Client,
    entries: Mutex<HashMap<Key, Entry<K>>>,
    changed: broadcast::Sender<String>,
}

impl<K> Referenced<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    fn new(client: Client, changed: broadcast::Sender<String>) -> Arc<Self> {
        Arc::new(Self { client, entries: Mutex::default(), changed })
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Entry<K>>> {
        self.entries.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn hold(self: &Arc<Self>, holder: &str, keys: &BTreeSet<Key>) {
        let mut entries = self.entries();
        for key in keys {
            entries.entry(key.clone()).or_insert_with(|| self.start(key)).holders.insert(holder.to_owned());
        }
        entries.retain(|key, entry| {
            if !keys.contains(key) {
                entry.holders.remove(holder);
            }
            let keep = !entry.holders.is_empty();
            if !keep {
                entry.task.abort();
            }
            keep
        });
    }

    fn start(self: &Arc<Self>, key: &Key) -> Entry<K> {
        let state = watch::Sender::new(Known::NotYet);
        let task = tokio::spawn(follow(Arc::downgrade(self), self.client.clone(), key.clone(), state.clone()));
        Entry { holders: HashSet::new(), state, task: task.abort_handle() }
    }

    /// `None` when there is no such object.
    async fn get(&self, key: &Key) -> Result<Option<Arc<K>>> {
        let subscription = self.entries().get(key).map(|entry| entry.state.subscribe());
        if let Some(mut state) = subscription {
            let known = tokio::time::timeout(FIRST_SYNC, state.wait_for(|known| !matches!(known, Known::NotYet))).await;
            match known.ok().and_then(std::result::Result::ok).map(|known| known.clone()) {
                Some(Known::Present(object)) => return Ok(Some(object)),
                // The watch may lag behind an object made a moment ago: ask once more below.
                Some(Known::Missing | Known::NotYet) | None => {}
            }
        }
        let api: Api<K> = Api::namespaced(self.client.clone(), &key.namespace);
        Ok(api.get_opt(&key.name).await.map_err(|error| Error::from_kube(&error))?.map(Arc::new))
    }

    fn tell_holders(&self, key: &Key) {
        let holders: Vec<String> = self.entries().get(key).map(|entry| entry.holders.iter().cloned().collect()).unwrap_or_default();
        for holder in holders {
            // Nobody listening is fine.
            let _ = self.changed.send(holder);
        }
    }
}

async fn follow<K>(owner: std::sync::Weak<Referenced<K>>, client: Client, key: Key, state: watch::Sender<Known<K>>)
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let api: Api<K> = Api::namespaced(client, &key.namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={}", key.name));
    let mut events = watcher(api, config).default_backoff().boxed();
    let mut listed = None;
    while let Some(event) = events.next().await {
        let now = match event {
            Ok(watcher::Event::Init) => {
                listed = None;
                continue;
            }
            Ok(watcher::Event::InitApply(object)) => {
                listed = Some(object);
                continue;
            }
            Ok(watcher::Event::InitDone) => listed.take().map_or(Known::Missing, |object| Known::Present(Arc::new(object))),
            Ok(watcher::Event::Apply(object)) => Known::Present(Arc::new(object)),
            Ok(watcher::Event::Delete(_)) => Known::Missing,
            Err(error) => {
                debug!(object = %key, %error, "the watch of a referenced object broke off; it is taken up again");
                continue;
            }
        };
        let version = |known: &Known<K>| if let Known::Present(object) = known { object.resource_version() } else { None };
        let before = state.send_replace(now.clone());
        if !matches!(before, Known::NotYet)
            && version(&before) != version(&now)
            && let Some(owner) = owner.upgrade()
        {
            owner.tell_holders(&key);
        }
    }
}

/// Reads of single objects. Cheap to clone; clones share the watches.
#[derive(Clone)]
pub struct Lookup {
    client: Client,
    config_maps: Arc<Referenced<ConfigMap>>,
    secrets: Arc<Referenced<Secret>>,
    changed: broadcast::Sender<String>,
}

impl Lookup {
    pub fn new(client: Client) -> Self {
        let changed = broadcast::Sender::new(1024);
        Self {
            config_maps: Referenced::new(client.clone(), changed.clone()),
            secrets: Referenced::new(client.clone(), changed.clone()),
            client,
            changed,
        }
    }

    /// Declares all objects that the pod (by UID) refers to now; what it no longer refers to is let go.
    pub fn hold(&self, pod_uid: &str, references: &References) {
        self.config_maps.hold(pod_uid, &references.config_maps);
        self.secrets.hold(pod_uid, &references.secrets);
    }

    pub fn release(&self, pod_uid: &str) {
        self.hold(pod_uid, &References::default());
    }

    /// UIDs of pods of which a referenced object has changed.
    pub fn changes(&self) -> broadcast::Receiver<String> {
        self.changed.subscribe()
    }

    pub async fn config_map(&self, namespace: &str, name: &str) -> Result<Option<Arc<ConfigMap>>> {
        self.config_maps.get(&Key::new(namespace, name)).await
    }

    pub async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Arc<Secret>>> {
        self.secrets.get(&Key::new(namespace, name)).await
    }

    /// The pod as the API server has it now.
    pub async fn pod(&self, namespace: &str, name: &str) -> Result<Option<Pod>> {
        self.namespaced(namespace, name).await
    }

    pub async fn claim(&self, namespace: &str, name: &str) -> Result<Option<PersistentVolumeClaim>> {
        self.namespaced(namespace, name).await
    }

    pub async fn volume(&self, name: &str) -> Result<Option<PersistentVolume>> {
        self.cluster_wide(name).await
    }

    pub async fn runtime_class(&self, name: &str) -> Result<Option<RuntimeClass>> {
        self.cluster_wide(name).await
    }

    pub async fn trust_bundles(&self) -> Result<Vec<ClusterTrustBundle>> {
        let api: Api<ClusterTrustBundle> = Api::all(self.client.clone());
        Ok(api.list(&kube::api::ListParams::default()).await.map_err(|error| Error::from_kube(&error))?.items)
    }

    async fn namespaced<K>(&self, namespace: &str, name: &str) -> Result<Option<K>>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        api.get_opt(name).await.map_err(|error| Error::from_kube(&error))
    }

    async fn cluster_wide<K>(&self, name: &str) -> Result<Option<K>>
    where
        K: Resource<Scope = ClusterResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let api: Api<K> = Api::all(self.client.clone());
        api.get_opt(name).await.map_err(|error| Error::from_kube(&error))
    }
}
