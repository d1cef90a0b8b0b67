//! Which node's pods refer to which objects.

use std::collections::{HashMap, HashSet};
use std::sync::{PoisonError, RwLock};

use super::references::{self, PodFacts, VolumeFacts};

/// What a kubelet may ask for by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    Pod,
    Secret,
    ConfigMap,
    ServiceAccount,
    Claim,
    Volume,
    ResourceClaim,
    Attachment,
    ResourceSlice,
}

/// (namespace, name)
pub(super) type Key = (String, String);

/// Fed from the API server's watches.
#[derive(Default)]
pub struct NodeGraph {
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    pods: HashMap<Key, PodFacts>,
    /// Object -> node -> how many of the node's pods refer to it.
    referred: HashMap<(Kind, Key), HashMap<String, u32>>,
    /// PersistentVolumes that are bound.
    volumes: HashMap<String, VolumeFacts>,
    /// Secret -> the volumes that need it.
    volume_secrets: HashMap<Key, HashSet<String>>,
    /// Objects that name their node themselves.
    named: HashMap<(Kind, String), String>,
}

impl NodeGraph {
    pub fn new() -> Self {
        Self::default()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Adds or replaces an object of `resource`: `pods`, `persistentvolumes`, `volumeattachments`, `resourceslices`.
    /// Other resources are ignored.
    pub fn apply(&self, resource: &str, json: &[u8]) -> Result<(), serde_json::Error> {
        match resource {
            "pods" => {
                // A pod without a node gives nobody rights.
                if let Some((key, facts)) = references::pod(json)? {
                    let known = self.state.read().unwrap_or_else(PoisonError::into_inner).pods.get(&key) == Some(&facts);
                    if !known {
                        self.change(|state| state.add_pod(key, facts));
                    }
                }
            }
            "persistentvolumes" => {
                let (name, facts) = references::volume(json)?;
                self.change(|state| {
                    state.remove_volume(&name);
                    if let Some(facts) = facts {
                        state.add_volume(name, facts);
                    }
                });
            }
            "volumeattachments" => self.name_node(Kind::Attachment, json)?,
            "resourceslices" => self.name_node(Kind::ResourceSlice, json)?,
            _ => {}
        }
        Ok(())
    }

    fn name_node(&self, kind: Kind, json: &[u8]) -> Result<(), serde_json::Error> {
        let (name, node) = references::node_named_in_spec(json)?;
        self.change(|state| {
            match node {
                Some(node) => state.named.insert((kind, name), node),
                None => state.named.remove(&(kind, name)),
            };
        });
        Ok(())
    }

    pub fn delete(&self, resource: &str, namespace: &str, name: &str) {
        self.change(|state| match resource {
            "pods" => state.remove_pod(&(namespace.to_owned(), name.to_owned())),
            "persistentvolumes" => state.remove_volume(name),
            "volumeattachments" => drop(state.named.remove(&(Kind::Attachment, name.to_owned()))),
            "resourceslices" => drop(state.named.remove(&(Kind::ResourceSlice, name.to_owned()))),
            _ => {}
        });
    }

    /// Whether a path leads from the object to the node.
    pub(super) fn reaches(&self, kind: Kind, namespace: &str, name: &str, node: &str) -> bool {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let key = (namespace.to_owned(), name.to_owned());
        match kind {
            Kind::Pod => state.pods.get(&key).is_some_and(|pod| pod.node == node),
            Kind::Attachment | Kind::ResourceSlice => state.named.get(&(kind, name.to_owned())).is_some_and(|own| own == node),
            Kind::Volume => state.volume_reaches(name, node),
            Kind::Secret => {
                let by_volume = || {
                    state.volume_secrets.get(&key).is_some_and(|volumes| volumes.iter().any(|volume| state.volume_reaches(volume, node)))
                };
                state.refers(kind, &key, node) || by_volume()
            }
            Kind::ConfigMap | Kind::ServiceAccount | Kind::Claim | Kind::ResourceClaim => state.refers(kind, &key, node),
        }
    }
}

impl State {
    fn refers(&self, kind: Kind, key: &Key, node: &str) -> bool {
        // A borrowed pair can't be looked up in a map of owned ones; the clone is small against the request.
        self.referred.get(&(kind, key.clone())).is_some_and(|nodes| nodes.contains_key(node))
    }

    fn volume_reaches(&self, volume: &str, node: &str) -> bool {
        self.volumes.get(volume).is_some_and(|facts| self.refers(Kind::Claim, &facts.claim, node))
    }

    fn add_pod(&mut self, key: Key, facts: PodFacts) {
        self.remove_pod(&key);
        for (kind, name) in &facts.references {
            let object = (*kind, (key.0.clone(), name.clone()));
            *self.referred.entry(object).or_default().entry(facts.node.clone()).or_default() += 1;
        }
        self.pods.insert(key, facts);
    }

    fn remove_pod(&mut self, key: &Key) {
        let Some(facts) = self.pods.remove(key) else { return };
        for (kind, name) in facts.references {
            let object = (kind, (key.0.clone(), name));
            let Some(nodes) = self.referred.get_mut(&object) else { continue };
            if let Some(count) = nodes.get_mut(&facts.node) {
                *count -= 1;
                if *count == 0 {
                    nodes.remove(&facts.node);
                }
            }
            if nodes.is_empty() {
                self.referred.remove(&object);
            }
        }
    }

    fn add_volume(&mut self, name: String, facts: VolumeFacts) {
        for secret in &facts.secrets {
            self.volume_secrets.entry(secret.clone()).or_default().insert(name.clone());
        }
        self.volumes.insert(name, facts);
    }

    fn remove_volume(&mut self, name: &str) {
        let Some(facts) = self.volumes.remove(name) else { return };
        for secret in facts.secrets {
            if let Some(volumes) = self.volume_secrets.get_mut(&secret) {
                volumes.remove(name);
                if volumes.is_empty() {
                    self.volume_secrets.remove(&secret);
                }
            }
        }
    }
}
