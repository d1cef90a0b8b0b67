//! One kind's shared copy: read by all controllers, fed by one list-and-watch and by their own writes.
//!
//! A write's answer goes into the copy at once, so a controller that looks again sees what it just did and needs
//! no expectations. Resource versions decide between the answer and the watch, whichever comes first.
use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use kube::Client;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::core::Request;
use outrigger_client::Decoded;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::error::SyncError;
use crate::objects::{Key, uid};

/// What a store holds: any built-in kind.
pub trait Object: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize + Send + Sync + 'static {}
impl<K: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize + Send + Sync + 'static> Object for K {}

/// Called with the old and the new state of an object; one of them may be missing. It may read stores, must
/// not write them and must not block: queueing a key is what it is for.
type Handler<K> = Box<dyn Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync>;

#[derive(Debug)]
struct State<K> {
    objects: BTreeMap<Key, Arc<K>>,
    /// The newest resource version that the watch has passed.
    seen: u64,
    /// Objects whose deletion was answered as final but not yet watched.
    gone: HashSet<String>,
}

struct Inner<K> {
    state: RwLock<State<K>>,
    /// Held over a change and its handlers, so that every handler sees all changes in one order.
    handlers: Mutex<Vec<Handler<K>>>,
    synced: watch::Sender<bool>,
    client: Client,
}

/// Cheap to clone; all clones see the same state.
pub struct Store<K>(Arc<Inner<K>>);

impl<K> Clone for Store<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

fn version<K: Object>(object: &K) -> u64 {
    object.meta().resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

type Change<K> = (Option<Arc<K>>, Option<Arc<K>>);

impl<K: Object> State<K> {
    fn new() -> Self {
        Self { objects: BTreeMap::new(), seen: 0, gone: HashSet::new() }
    }

    /// Takes in an added or modified object; `watched` when it comes from the watch, else from a write's answer.
    fn apply(&mut self, object: K, watched: bool) -> Option<Change<K>> {
        let new_version = version(&object);
        if watched {
            self.seen = self.seen.max(new_version);
            if self.gone.contains(uid(object.meta())) {
                return None;
            }
        } else if new_version <= self.seen {
            return None;
        }
        let key = Key::of(&object);
        let old = self.objects.get(&key).cloned();
        if old.as_ref().is_some_and(|old| version(&**old) >= new_version && new_version > 0) {
            return None;
        }
        let object = Arc::new(object);
        self.objects.insert(key, object.clone());
        Some((old, Some(object)))
    }

    fn delete(&mut self, object: &K, watched: bool) -> Option<Change<K>> {
        let id = uid(object.meta());
        if watched {
            self.seen = self.seen.max(version(object));
            self.gone.remove(id);
        }
        let key = Key::of(object);
        if self.objects.get(&key).is_none_or(|held| uid(held.meta()) != id) {
            return None;
        }
        let old = self.objects.remove(&key);
        if watched {
            // The last state tells handlers more than the copy did.
            return Some((Some(Arc::new(object.clone())), None));
        }
        self.gone.insert(id.to_owned());
        Some((old, None))
    }

    fn replace(&mut self, objects: Vec<K>, list_version: u64) -> Vec<Change<K>> {
        self.seen = self.seen.max(list_version);
        self.gone.clear();
        let mut next = BTreeMap::new();
        let mut changes = Vec::new();
        for object in objects {
            let key = Key::of(&object);
            let old = self.objects.remove(&key);
            let same = old.as_ref().is_some_and(|old| uid(old.meta()) == uid(object.meta()) && version(&**old) >= version(&object));
            match old {
                Some(old) if same => {
                    next.insert(key, old);
                }
                old => {
                    let object = Arc::new(object);
                    next.insert(key, object.clone());
                    changes.push((old, Some(object)));
                }
            }
        }
        let mut kept = BTreeMap::new();
        for (key, old) in std::mem::take(&mut self.objects) {
            // Written after the list was taken: the watch will bring it.
            if version(&*old) > list_version && list_version > 0 {
                kept.insert(key, old);
            } else {
                changes.push((Some(old), None));
            }
        }
        next.append(&mut kept);
        self.objects = next;
        changes
    }
}

impl<K: Object> Store<K> {
    pub fn new(client: Client) -> Self {
        let state = RwLock::new(State::new());
        Self(Arc::new(Inner { state, handlers: Mutex::new(Vec::new()), synced: watch::Sender::new(false), client }))
    }

    pub fn client(&self) -> &Client {
        &self.0.client
    }

    pub fn get(&self, key: &Key) -> Option<Arc<K>> {
        self.read().objects.get(key).cloned()
    }

    pub fn list(&self) -> Vec<Arc<K>> {
        self.read().objects.values().cloned().collect()
    }

    pub fn in_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        let from = Key::new(namespace, "");
        self.read().objects.range(from..).take_while(|(key, _)| key.namespace == namespace).map(|(_, object)| object.clone()).collect()
    }

    /// The objects that `keep` wants, without cloning the rest.
    pub fn select(&self, namespace: &str, keep: impl Fn(&K) -> bool) -> Vec<Arc<K>> {
        let from = Key::new(namespace, "");
        let state = self.read();
        let in_namespace = state.objects.range(from..).take_while(|(key, _)| key.namespace == namespace);
        in_namespace.filter(|(_, object)| keep(object)).map(|(_, object)| object.clone()).collect()
    }

    pub fn len(&self) -> usize {
        self.read().objects.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Resolves once the first full list has arrived.
    pub async fn synced(&self) {
        let mut synced = self.0.synced.subscribe();
        // The sender lives as long as `self`, so an error can't come before the flag.
        let _ = synced.wait_for(|synced| *synced).await;
    }

    /// Calls `handler` for every object there is and for every change after that.
    pub fn on_change(&self, handler: impl Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync + 'static) {
        let mut handlers = self.handlers();
        for object in self.list() {
            handler(None, Some(&object));
        }
        handlers.push(Box::new(handler));
    }

    pub fn replace_all(&self, mut objects: Vec<K>, list_version: u64) {
        let handlers = self.handlers();
        objects.iter_mut().for_each(trim);
        let changes = self.write().replace(objects, list_version);
        self.0.synced.send_replace(true);
        notify(&handlers, changes);
    }

    pub fn watched(&self, mut object: K) {
        trim(&mut object);
        let handlers = self.handlers();
        let change = self.write().apply(object, true);
        notify(&handlers, change);
    }

    pub fn watched_gone(&self, mut object: K) {
        trim(&mut object);
        let handlers = self.handlers();
        let change = self.write().delete(&object, true);
        notify(&handlers, change);
    }

    /// A bookmark: the watch has passed this version.
    pub fn passed(&self, version: u64) {
        let mut state = self.write();
        state.seen = state.seen.max(version);
    }

    fn answered(&self, mut object: K) -> Arc<K> {
        trim(&mut object);
        let answer = Arc::new(object.clone());
        let handlers = self.handlers();
        let change = self.write().apply(object, false);
        notify(&handlers, change);
        answer
    }

    fn answered_gone(&self, object: &K) {
        let handlers = self.handlers();
        let change = self.write().delete(object, false);
        notify(&handlers, change);
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State<K>> {
        self.0.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State<K>> {
        self.0.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn handlers(&self) -> std::sync::MutexGuard<'_, Vec<Handler<K>>> {
        self.0.handlers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn notify<K>(handlers: &[Handler<K>], changes: impl IntoIterator<Item = Change<K>>) {
    for (old, new) in changes {
        for handler in handlers {
            handler(old.as_ref(), new.as_ref());
        }
    }
}

/// Nobody here reads managedFields, and an update without them keeps the server's.
fn trim<K: Object>(object: &mut K) {
    object.meta_mut().managed_fields = None;
}

fn post() -> PostParams {
    PostParams { field_manager: Some("kube-controller-manager".into()), ..Default::default() }
}

fn body<K: Serialize>(object: &K) -> Result<Vec<u8>, SyncError> {
    serde_json::to_vec(object).map_err(|error| SyncError::Api(kube::Error::SerdeError(error)))
}

/// Writes. Each goes to the API server, and its answer into the shared copy.
impl<K: Object> Store<K> {
    fn request(&self, namespace: &str) -> Request {
        Request::new(K::url_path(&(), (!namespace.is_empty()).then_some(namespace)))
    }

    fn request_of(&self, object: &K) -> (Request, String) {
        let Key { namespace, name } = Key::of(object);
        (self.request(&namespace), name)
    }

    async fn send(&self, request: Result<http::Request<Vec<u8>>, kube::core::request::Error>) -> Result<Arc<K>, SyncError> {
        let request = request.map_err(kube::Error::BuildRequest)?;
        let answer = self.0.client.request::<Decoded<K>>(request).await?;
        Ok(self.answered(answer.whole().map_err(|error| SyncError::Other(error.to_string()))?))
    }

    pub async fn create(&self, object: &K) -> Result<Arc<K>, SyncError> {
        let (request, _) = self.request_of(object);
        self.send(request.create(&post(), body(object)?)).await
    }

    /// Replaces all but the status; a conflict when `object` isn't the newest.
    pub async fn update(&self, object: &K) -> Result<Arc<K>, SyncError> {
        let (request, name) = self.request_of(object);
        self.send(request.replace(&name, &post(), body(object)?)).await
    }

    pub async fn update_status(&self, object: &K) -> Result<Arc<K>, SyncError> {
        let (request, name) = self.request_of(object);
        self.send(request.replace_subresource("status", &name, &post(), body(object)?)).await
    }

    pub async fn merge(&self, key: &Key, patch: serde_json::Value) -> Result<Arc<K>, SyncError> {
        self.send(self.request(&key.namespace).patch(&key.name, &PatchParams::default(), &Patch::Merge(patch))).await
    }

    pub async fn strategic(&self, key: &Key, patch: serde_json::Value) -> Result<Arc<K>, SyncError> {
        self.send(self.request(&key.namespace).patch(&key.name, &PatchParams::default(), &Patch::Strategic(patch))).await
    }

    pub async fn strategic_status(&self, key: &Key, patch: serde_json::Value) -> Result<Arc<K>, SyncError> {
        let request = self.request(&key.namespace);
        self.send(request.patch_subresource("status", &key.name, &PatchParams::default(), &Patch::Strategic(patch))).await
    }

    /// Starts a deletion, of exactly this object: another one of the same name isn't touched.
    pub async fn delete(&self, object: &K, mut params: DeleteParams) -> Result<(), SyncError> {
        let (request, name) = self.request_of(object);
        let preconditions = params.preconditions.get_or_insert_default();
        preconditions.uid = object.meta().uid.clone();
        let request = request.delete(&name, &params).map_err(kube::Error::BuildRequest)?;
        match self.0.client.request::<serde_json::Value>(request).await {
            Ok(answer) => self.deletion_answered(object, answer),
            Err(error) => {
                let error = SyncError::Api(error);
                if error.is_not_found() {
                    self.answered_gone(object);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// The answer is the object (deletion has begun, or that was its last state) or a Status (it is gone).
    fn deletion_answered(&self, object: &K, answer: serde_json::Value) {
        let is_status = answer.get("kind").and_then(|kind| kind.as_str()) == Some("Status");
        match serde_json::from_value::<K>(answer) {
            Ok(left) if !is_status && left.meta().deletion_timestamp.is_some() && !final_state(&left) => {
                self.answered(left);
            }
            _ => self.answered_gone(object),
        }
    }

    /// A read past the copy, for decisions that must not rest on an old state.
    pub async fn get_live(&self, key: &Key) -> Result<Option<K>, SyncError> {
        let request = self.request(&key.namespace).get(&key.name, &Default::default()).map_err(kube::Error::BuildRequest)?;
        match self.0.client.request::<Decoded<K>>(request).await.map_err(SyncError::Api) {
            Ok(object) => object.whole().map(Some).map_err(|error| SyncError::Other(error.to_string())),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// No finalizer and no grace left: the answer to a deletion shows an object that is no more.
fn final_state<K: Object>(object: &K) -> bool {
    let meta = object.meta();
    meta.finalizers.as_ref().is_none_or(Vec::is_empty) && meta.deletion_grace_period_seconds.unwrap_or(0) == 0
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    fn object(name: &str, uid: &str, version: u64) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.namespace = Some("default".into());
        object.metadata.name = Some(name.into());
        object.metadata.uid = Some(uid.into());
        object.metadata.resource_version = Some(version.to_string());
        object
    }

    #[test]
    fn an_answer_counts_until_the_watch_has_passed_it() {
        let mut state = State::new();
        assert!(state.apply(object("a", "1", 5), false).is_some(), "a fresh answer is taken");
        assert!(state.apply(object("a", "1", 5), true).is_none(), "the watch brings nothing new");
        assert!(state.apply(object("a", "1", 4), true).is_none(), "an older event is ignored");
        assert!(state.apply(object("b", "2", 7), true).is_some());
        assert!(state.delete(&object("b", "2", 8), true).is_some());
        assert!(state.apply(object("b", "2", 7), false).is_none(), "a late answer doesn't bring the dead back");
    }

    #[test]
    fn an_answered_deletion_holds_until_the_watch_confirms_it() {
        let mut state = State::new();
        state.apply(object("a", "1", 5), true);
        assert!(state.delete(&object("a", "1", 5), false).is_some());
        assert!(state.apply(object("a", "1", 6), true).is_none(), "events that were under way are ignored");
        assert!(state.delete(&object("a", "1", 7), true).is_none(), "handlers hear of it once");
        assert!(state.apply(object("a", "9", 8), true).is_some(), "a successor of the same name is taken");
    }

    #[test]
    fn a_new_list_reports_only_differences() {
        let mut state = State::new();
        state.apply(object("same", "1", 5), true);
        state.apply(object("old", "2", 6), true);
        state.apply(object("gone", "3", 7), true);
        state.apply(object("mine", "4", 30), false);
        let changes = state.replace(vec![object("same", "1", 5), object("old", "2", 9), object("new", "5", 10)], 20);
        let names: Vec<_> = changes
            .iter()
            .map(|(old, new)| {
                let object = new.as_ref().or(old.as_ref()).unwrap();
                (object.metadata.name.clone().unwrap(), old.is_some(), new.is_some())
            })
            .collect();
        assert_eq!(names, [("old".into(), true, true), ("new".into(), false, true), ("gone".into(), true, false)]);
        assert_eq!(state.objects.len(), 4, "an answer newer than the list stays");
    }
}
