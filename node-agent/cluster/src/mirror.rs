//! A shared, read-only copy of one kind's objects, with change subscriptions.
//!
//! One [`Mirror`] per watched kind serves every part of the agent (kubelet, proxy, DNS, routes), so an object
//! is decoded and held once however many parts look at it.
use std::collections::HashMap;
use std::sync::{Arc, Mutex, RwLock};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tokio::sync::{mpsc, watch};

/// `namespace/name`; the namespace is empty for cluster-scoped kinds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub namespace: String,
    pub name: String,
}

impl Key {
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    pub fn of<K: kube::Resource>(object: &K) -> Self {
        Self::of_meta(object.meta())
    }

    pub fn of_meta(meta: &ObjectMeta) -> Self {
        Self::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

/// What a mirror holds: any Kubernetes object that can be shared between threads.
pub trait Object: kube::Resource + Clone + Send + Sync + 'static {}
impl<K: kube::Resource + Clone + Send + Sync + 'static> Object for K {}

/// One change of a mirrored kind.
#[derive(Clone, Debug)]
pub enum Delta<K> {
    /// The whole state: sent first after the initial sync, and again after the watch had to start over.
    /// Whatever the receiver holds and is not in here is gone.
    Replaced(Arc<Vec<Arc<K>>>),
    Applied(Arc<K>),
    Deleted(Arc<K>),
}

/// The receiving end of [`Mirror::subscribe`]; deltas arrive in the order in which the API server sent them.
pub type Subscription<K> = mpsc::UnboundedReceiver<Delta<K>>;

struct Subscribers<K>(Vec<mpsc::UnboundedSender<Delta<K>>>);

impl<K: Clone> Subscribers<K> {
    fn send(&mut self, delta: &Delta<K>) {
        self.0.retain(|subscriber| subscriber.send(delta.clone()).is_ok());
    }
}

/// The shared copy of one kind. Cheap to clone; all clones see the same state.
pub struct Mirror<K> {
    objects: Arc<RwLock<HashMap<Key, Arc<K>>>>,
    // Held while the state changes, so that a new subscriber's snapshot and its deltas have no gap.
    subscribers: Arc<Mutex<Subscribers<K>>>,
    synced: watch::Sender<bool>,
    /// Objects are handed to the first subscriber and forgotten.
    passing: bool,
}

impl<K> Clone for Mirror<K> {
    fn clone(&self) -> Self {
        Self { objects: self.objects.clone(), subscribers: self.subscribers.clone(), synced: self.synced.clone(), passing: self.passing }
    }
}

impl<K: Object> Default for Mirror<K> {
    fn default() -> Self {
        Self {
            objects: Arc::default(),
            subscribers: Arc::new(Mutex::new(Subscribers(Vec::new()))),
            synced: watch::Sender::new(false),
            passing: false,
        }
    }
}

impl<K: Object> Mirror<K> {
    /// For a kind that has one subscriber, who keeps what it needs: tens of thousands of objects take a hundred megabytes.
    pub fn passing() -> Self {
        Self { passing: true, ..Self::default() }
    }

    pub fn get(&self, key: &Key) -> Option<Arc<K>> {
        self.read().get(key).cloned()
    }

    pub fn list(&self) -> Vec<Arc<K>> {
        self.read().values().cloned().collect()
    }

    pub fn is_synced(&self) -> bool {
        *self.synced.borrow()
    }

    /// Resolves once the first full list has arrived.
    pub async fn synced(&self) {
        let mut synced = self.synced.subscribe();
        // The sender lives as long as `self`, so an error can't come before the flag.
        let _ = synced.wait_for(|synced| *synced).await;
    }

    /// The current state as one `Replaced` (when there is one already), then every change after it.
    pub fn subscribe(&self) -> Subscription<K> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut subscribers = lock(&self.subscribers);
        if self.is_synced() {
            // The receiver is in hand, so the send can't fail.
            let _ = sender.send(Delta::Replaced(Arc::new(self.list())));
            if self.passing {
                *self.objects.write().unwrap_or_else(std::sync::PoisonError::into_inner) = HashMap::new();
            }
        }
        subscribers.0.push(sender);
        receiver
    }

    /// Takes a full list in.
    pub fn replace(&self, objects: Vec<K>) {
        let mut subscribers = lock(&self.subscribers);
        let objects: Vec<Arc<K>> = objects.into_iter().map(Arc::new).collect();
        let kept = objects.iter().filter(|_| self.keeps(&subscribers)).map(|object| (Key::of(&**object), object.clone()));
        *self.objects.write().unwrap_or_else(std::sync::PoisonError::into_inner) = kept.collect();
        self.synced.send_replace(true);
        subscribers.send(&Delta::Replaced(Arc::new(objects)));
    }

    pub fn apply(&self, object: K) {
        let mut subscribers = lock(&self.subscribers);
        let object = Arc::new(object);
        if self.keeps(&subscribers) {
            self.objects.write().unwrap_or_else(std::sync::PoisonError::into_inner).insert(Key::of(&*object), object.clone());
        }
        subscribers.send(&Delta::Applied(object));
    }

    pub fn delete(&self, object: K) {
        let mut subscribers = lock(&self.subscribers);
        let object = Arc::new(object);
        self.objects.write().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&Key::of(&*object));
        subscribers.send(&Delta::Deleted(object));
    }

    fn keeps(&self, subscribers: &Subscribers<K>) -> bool {
        !self.passing || subscribers.0.is_empty()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, HashMap<Key, Arc<K>>> {
        self.objects.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::ResourceExt;

    use super::*;

    fn config_map(name: &str) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.namespace = Some("default".into());
        object.metadata.name = Some(name.into());
        object
    }

    #[tokio::test]
    async fn a_late_subscriber_sees_the_state_then_the_changes() {
        let mirror = Mirror::<ConfigMap>::default();
        assert!(!mirror.is_synced());
        mirror.replace(vec![config_map("a")]);
        mirror.synced().await;
        let mut subscription = mirror.subscribe();
        mirror.apply(config_map("b"));
        mirror.delete(config_map("a"));
        let Some(Delta::Replaced(all)) = subscription.recv().await else { panic!("the state comes first") };
        assert_eq!(all.len(), 1);
        assert!(matches!(subscription.recv().await, Some(Delta::Applied(b)) if b.name_any() == "b"));
        assert!(matches!(subscription.recv().await, Some(Delta::Deleted(a)) if a.name_any() == "a"));
        assert_eq!(mirror.list().len(), 1);
        assert!(mirror.get(&Key::new("default", "b")).is_some());
    }

    #[tokio::test]
    async fn what_passes_is_held_until_somebody_takes_it() {
        let mirror = Mirror::<ConfigMap>::passing();
        mirror.replace(vec![config_map("a")]);
        let mut subscription = mirror.subscribe();
        assert!(matches!(subscription.recv().await, Some(Delta::Replaced(all)) if all.len() == 1));
        mirror.apply(config_map("b"));
        assert!(matches!(subscription.recv().await, Some(Delta::Applied(b)) if b.name_any() == "b"));
        assert_eq!(mirror.list().len(), 0);
    }
}
