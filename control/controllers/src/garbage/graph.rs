//! Who owns whom, over all kinds (pure).
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use crate::objects::has_finalizer;

pub const FOREGROUND: &str = "foregroundDeletion";
pub const ORPHAN: &str = "orphan";

/// A kind as owner references name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind {
    pub api_version: String,
    pub kind: String,
}

impl Kind {
    pub fn group(&self) -> &str {
        self.api_version.split_once('/').map_or("", |(group, _)| group)
    }
}

#[derive(Clone, Debug)]
pub struct Owner {
    pub kind: Kind,
    pub name: String,
    pub uid: String,
    pub blocks: bool,
}

impl From<&OwnerReference> for Owner {
    fn from(from: &OwnerReference) -> Self {
        Self {
            kind: Kind { api_version: from.api_version.clone(), kind: from.kind.clone() },
            name: from.name.clone(),
            uid: from.uid.clone(),
            blocks: from.block_owner_deletion == Some(true),
        }
    }
}

/// What the collector remembers of an object.
#[derive(Clone, Debug)]
pub struct Item {
    pub kind: Arc<Kind>,
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub owners: Vec<Owner>,
    pub deleting: bool,
    /// Being deleted, and waiting for its dependents to go first.
    pub waits_for_dependents: bool,
    pub orphans: bool,
    /// Only known from others' references so far.
    pub is_virtual: bool,
}

impl Item {
    fn new(kind: Arc<Kind>, meta: &ObjectMeta) -> Self {
        let deleting = meta.deletion_timestamp.is_some();
        Self {
            kind,
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            owners: meta.owner_references.iter().flatten().map(Owner::from).collect(),
            deleting,
            waits_for_dependents: deleting && has_finalizer(meta, FOREGROUND),
            orphans: deleting && has_finalizer(meta, ORPHAN),
            is_virtual: false,
        }
    }
}

/// What must be looked at after a change.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Task {
    /// Delete it if no owner is left; move its own deletion on.
    Delete(String),
    /// Take it out of its dependents' references.
    Orphan(String),
}

impl std::fmt::Display for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Delete(uid) => write!(f, "delete {uid}"),
            Self::Orphan(uid) => write!(f, "orphan {uid}"),
        }
    }
}

#[derive(Default)]
pub struct Graph {
    items: HashMap<String, Item>,
    dependents: HashMap<String, HashSet<String>>,
}

impl Graph {
    pub fn get(&self, uid: &str) -> Option<&Item> {
        self.items.get(uid)
    }

    pub fn dependents(&self, uid: &str) -> Vec<Item> {
        self.dependents.get(uid).into_iter().flatten().filter_map(|dependent| self.items.get(dependent)).cloned().collect()
    }

    /// Dependents that hold up their owner's deletion.
    pub fn blocking(&self, uid: &str) -> Vec<Item> {
        let blocks = |item: &Item| item.owners.iter().any(|owner| owner.uid == uid && owner.blocks);
        self.dependents(uid).into_iter().filter(blocks).collect()
    }

    /// Takes an object's state in.
    pub fn apply(&mut self, kind: &Arc<Kind>, meta: &ObjectMeta) -> Vec<Task> {
        let item = Item::new(kind.clone(), meta);
        let id = item.uid.clone();
        let mut tasks = Vec::new();
        let before = self.items.remove(&id);
        let known: Vec<Owner> = before.as_ref().map(|before| before.owners.clone()).unwrap_or_default();
        for gone in known.iter().filter(|old| !item.owners.iter().any(|new| new.uid == old.uid)) {
            self.unlink(&gone.uid, &id);
        }
        // Who no longer blocks its owner may have been the last one to do so.
        for old in known.iter().filter(|old| old.blocks && !item.owners.iter().any(|new| new.uid == old.uid && new.blocks)) {
            tasks.push(Task::Delete(old.uid.clone()));
        }
        for owner in &item.owners {
            self.link(owner, &item, &mut tasks);
        }
        if item.orphans {
            tasks.push(Task::Orphan(id.clone()));
        } else if item.waits_for_dependents {
            tasks.extend(self.dependents(&id).into_iter().map(|dependent| Task::Delete(dependent.uid)));
            tasks.push(Task::Delete(id.clone()));
        }
        let changed = before.as_ref().is_none_or(|before| before.is_virtual || known.len() != item.owners.len());
        if changed && !item.owners.is_empty() {
            tasks.push(Task::Delete(id.clone()));
        }
        self.items.insert(id, item);
        tasks
    }

    fn link(&mut self, owner: &Owner, dependent: &Item, tasks: &mut Vec<Task>) {
        let fresh = self.dependents.entry(owner.uid.clone()).or_default().insert(dependent.uid.clone());
        if fresh && !self.items.contains_key(&owner.uid) {
            let placeholder = Item {
                kind: Arc::new(owner.kind.clone()),
                namespace: dependent.namespace.clone(),
                name: owner.name.clone(),
                uid: owner.uid.clone(),
                owners: Vec::new(),
                deleting: false,
                waits_for_dependents: false,
                orphans: false,
                is_virtual: true,
            };
            self.items.insert(owner.uid.clone(), placeholder);
            tasks.push(Task::Delete(owner.uid.clone()));
        }
        if self.items.get(&owner.uid).is_some_and(|item| item.waits_for_dependents) {
            tasks.push(Task::Delete(dependent.uid.clone()));
        }
    }

    fn unlink(&mut self, owner: &str, dependent: &str) {
        if let Some(list) = self.dependents.get_mut(owner) {
            list.remove(dependent);
            if list.is_empty() {
                self.dependents.remove(owner);
                // Nobody names it any more, and nobody has seen it.
                if self.items.get(owner).is_some_and(|item| item.is_virtual) {
                    self.items.remove(owner);
                }
            }
        }
    }

    /// The object is gone.
    pub fn remove(&mut self, uid: &str) -> Vec<Task> {
        let Some(item) = self.items.remove(uid) else { return Vec::new() };
        let mut tasks: Vec<Task> = self.dependents.remove(uid).into_iter().flatten().map(Task::Delete).collect();
        for owner in &item.owners {
            self.unlink(&owner.uid, uid);
            if self.items.get(&owner.uid).is_some_and(|owner| owner.waits_for_dependents) {
                tasks.push(Task::Delete(owner.uid.clone()));
            }
        }
        tasks
    }

    /// A full list of a kind has been taken in: what isn't in it is gone.
    pub fn retain(&mut self, kind: &Kind, there: &HashSet<String>) -> Vec<Task> {
        let gone: Vec<String> = self
            .items
            .values()
            .filter(|item| !item.is_virtual && *item.kind == *kind && !there.contains(&item.uid))
            .map(|item| item.uid.clone())
            .collect();
        gone.iter().flat_map(|uid| self.remove(uid)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::now;

    fn kind(name: &str) -> Arc<Kind> {
        Arc::new(Kind { api_version: "v1".into(), kind: name.into() })
    }

    fn meta(uid: &str, owner: Option<(&str, bool)>) -> ObjectMeta {
        ObjectMeta {
            uid: Some(uid.into()),
            name: Some(uid.into()),
            namespace: Some("ns".into()),
            owner_references: owner.map(|(owner, blocks)| {
                vec![OwnerReference {
                    uid: owner.into(),
                    name: owner.into(),
                    kind: "Owner".into(),
                    block_owner_deletion: Some(blocks),
                    ..Default::default()
                }]
            }),
            ..Default::default()
        }
    }

    #[test]
    fn an_unknown_owner_is_looked_for_and_its_end_is_passed_on() {
        let mut graph = Graph::default();
        let tasks = graph.apply(&kind("Child"), &meta("c", Some(("o", false))));
        assert!(tasks.contains(&Task::Delete("o".into())), "the owner must be verified");
        assert!(graph.get("o").unwrap().is_virtual);
        graph.apply(&kind("Owner"), &meta("o", None));
        assert!(!graph.get("o").unwrap().is_virtual);
        assert_eq!(graph.remove("o"), [Task::Delete("c".into())]);
    }

    #[test]
    fn a_foreground_deletion_waits_for_those_that_block() {
        let mut graph = Graph::default();
        graph.apply(&kind("Owner"), &meta("o", None));
        graph.apply(&kind("Child"), &meta("blocks", Some(("o", true))));
        graph.apply(&kind("Child"), &meta("free", Some(("o", false))));
        let mut dying = meta("o", None);
        dying.deletion_timestamp = Some(now());
        dying.finalizers = Some(vec![FOREGROUND.into()]);
        let mut tasks = graph.apply(&kind("Owner"), &dying);
        tasks.sort();
        assert_eq!(tasks, [Task::Delete("blocks".into()), Task::Delete("free".into()), Task::Delete("o".into())]);
        assert_eq!(graph.blocking("o").len(), 1);
        assert_eq!(graph.remove("blocks"), [Task::Delete("o".into())]);
        assert!(graph.blocking("o").is_empty());
    }

    #[test]
    fn orphaning_and_lost_objects() {
        let mut graph = Graph::default();
        let mut dying = meta("o", None);
        dying.deletion_timestamp = Some(now());
        dying.finalizers = Some(vec![ORPHAN.into()]);
        assert_eq!(graph.apply(&kind("Owner"), &dying), [Task::Orphan("o".into())]);
        graph.apply(&kind("Child"), &meta("c", Some(("o", false))));
        assert_eq!(graph.retain(&kind("Owner"), &HashSet::new()), [Task::Delete("c".into())]);
    }
}
