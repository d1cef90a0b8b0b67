//! Keeps managed fields in step with writes: what an update changed becomes its manager's, what is applied is merged, checked for conflicts
//! and pruned of what its manager applied before and no longer does.
use jiff::Timestamp;
use serde_json::Value;

use super::managers::{self, Conflict, Entry};
use super::schema::{self, Type};
use super::set::FieldSet;
use super::walk::{self, Comparison, with_parents};
use crate::convert;
use crate::meta;
use crate::resource::{Catalog, Resource, split_api_version};
use crate::status::Status;

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Who owns what was there before managed fields were kept.
const BEFORE: &str = "before-first-apply";
/// Never owned by anyone.
const SYSTEM: [&str; 12] = [
    "apiVersion",
    "kind",
    "metadata",
    "metadata.name",
    "metadata.namespace",
    "metadata.creationTimestamp",
    "metadata.selfLink",
    "metadata.uid",
    "metadata.clusterName",
    "metadata.generation",
    "metadata.managedFields",
    "metadata.resourceVersion",
];

/// One write's view of managed fields.
pub struct Tracker<'a> {
    pub catalog: &'a Catalog,
    pub resource: &'a Resource,
    pub subresource: &'a str,
    pub manager: &'a str,
    pub now: Timestamp,
}

/// The object without its managed fields.
fn bare(object: &Value) -> Value {
    let mut object = object.clone();
    meta::remove(&mut object, "metadata.managedFields");
    object
}

impl Tracker<'_> {
    /// Makes what the write changed its manager's. `live` is none for a creation.
    pub fn update(&self, live: Option<&Value>, new: &mut Value) {
        let mut entries = match live {
            Some(live) if !self.subresource.is_empty() => managers::read(live).unwrap_or_default(),
            _ if managers::is_reset(new) => Vec::new(),
            _ => match managers::read(new).filter(|entries| !entries.is_empty()) {
                Some(entries) => entries,
                None => live.and_then(managers::read).unwrap_or_default(),
            },
        };
        meta::remove(new, "metadata.managedFields");
        if live.is_some() && entries.is_empty() {
            return;
        }
        let before = live.map_or_else(|| self.empty(), bare);
        self.track(&before, new, &mut entries, self.manager);
        managers::cap(&mut entries);
        managers::write(new, entries);
    }

    /// The live object with the configuration on it; its managed fields say so.
    pub fn apply(&self, live: Option<&Value>, config: &Value, force: bool) -> Result<Value, Status> {
        let expected = self.resource.api_version();
        let said = meta::api_version(config);
        if said != expected {
            let why = format!("Incorrect version specified in apply patch. Specified patch version: {said}, expected: {expected}");
            return Err(Status::bad_request(why));
        }
        if !meta::get(config, "metadata.managedFields").is_null() {
            return Err(Status::bad_request("metadata.managedFields must be nil"));
        }
        let mut entries = live.and_then(managers::read).unwrap_or_default();
        let live_object = live.map_or_else(|| self.empty(), bare);
        walk::check(self.root(), config).map_err(|error| {
            let place = format!("{}/{}; {expected}, Kind={}", meta::namespace(config), meta::name(config), self.resource.kind);
            Status::new(500, "", format!("failed to create typed patch object ({place}): {error}"))
        })?;
        if entries.is_empty() && live.is_some() {
            let empty = self.empty();
            Tracker { subresource: "", ..*self }.track(&empty, &live_object, &mut entries, BEFORE);
        }
        let applied = self.applied(&live_object, config, entries.clone(), force);
        let (mut object, entries) = match applied {
            Err(conflicts) if self.manager == "kubectl" => {
                // What client-side apply left as it is now belongs to kubectl, whoever the entries name.
                let own = self.last_applied_fields(&live_object);
                let foreign: Vec<Conflict> = conflicts.into_iter().filter(|conflict| !own.has(&conflict.path)).collect();
                if !foreign.is_empty() {
                    return Err(managers::refusal(foreign));
                }
                self.applied(&live_object, config, entries, true).map_err(managers::refusal)?
            }
            other => other.map_err(managers::refusal)?,
        };
        if self.manager == "kubectl" && meta::annotation(&object, LAST_APPLIED).is_some_and(|text| !text.is_empty()) {
            self.renew_last_applied(&mut object, config);
        }
        managers::write(&mut object, entries);
        Ok(object)
    }

    /// One apply without regard to client-side apply: the merged object and its entries, or the conflicts.
    fn applied(&self, live: &Value, config: &Value, mut entries: Vec<Entry>, force: bool) -> Result<(Value, Vec<Entry>), Vec<Conflict>> {
        let merged = walk::merge(self.root(), Some(live), Some(config)).unwrap_or_default();
        let mut own = self.entry(self.manager, true, walk::fields(self.root(), config).without(&self.reset_fields()));
        let last = entries.extract_if(.., |entry| entry.is_same(&own)).next();
        own.time = last.as_ref().and_then(|last| last.time.clone());
        let pruned = match &last {
            Some(last) => self.prune(merged, &entries, &own, last),
            None => merged,
        };
        let conflicts = self.disown(live, &pruned, &mut entries);
        if !force && !conflicts.is_empty() {
            return Err(conflicts);
        }
        if pruned != *live {
            own.time = Some(crate::time::format(self.now));
        }
        own.fields = own.fields.difference(&FieldSet::of(&SYSTEM));
        entries.push(own);
        Ok((pruned, entries))
    }

    fn root(&self) -> Type<'_> {
        schema::root(self.resource)
    }

    fn entry(&self, manager: &str, applied: bool, fields: FieldSet) -> Entry {
        let manager = if manager.is_empty() { "unknown" } else { manager }.to_string();
        Entry { manager, applied, api_version: self.resource.api_version(), subresource: self.subresource.to_string(), time: None, fields }
    }

    /// What an object of the kind is before anything is set: the structs that Go always has.
    fn empty(&self) -> Value {
        let mut object = Value::Object(Default::default());
        if self.resource.custom.is_none() {
            // An empty object fits every kind.
            let _ = crate::types::decode(self.resource, &mut object);
        }
        meta::child_mut(&mut object, "metadata");
        object
    }

    /// What this endpoint ignores of what it is sent.
    fn reset_fields(&self) -> FieldSet {
        let has_status = self.resource.strategy.has_status;
        match self.subresource {
            "" if has_status => FieldSet::of(&["status"]),
            "status" if self.resource.is("apps", "Deployment") => FieldSet::of(&["spec", "metadata.labels"]),
            "status" if self.resource.custom.is_some() => FieldSet::of(&["spec", "metadata"]),
            "status" => FieldSet::of(&["spec"]),
            _ => FieldSet::default(),
        }
    }

    /// An object of this resource's version in another one of its kind.
    fn in_version(&self, object: &Value, api_version: &str) -> Option<(&Resource, Value)> {
        if api_version == self.resource.api_version() {
            return Some((self.resource, object.clone()));
        }
        let (group, version) = split_api_version(api_version);
        let target = self.catalog.by_kind(group, version, &self.resource.kind)?;
        let mut converted = object.clone();
        convert::to_storage(self.resource, &mut converted);
        convert::to_version(target, &mut converted);
        Some((target, converted))
    }

    fn compare(&self, old: &Value, new: &Value, api_version: &str) -> Option<Comparison> {
        if api_version == self.resource.api_version() {
            return Some(walk::compare(self.root(), old, new).without(&self.reset_fields()));
        }
        let ((target, old), (_, new)) = (self.in_version(old, api_version)?, self.in_version(new, api_version)?);
        Some(walk::compare(schema::root(target), &old, &new).without(&self.reset_fields()))
    }

    /// Takes from all entries what the change took from them: what it removed, and what it gave another value (the conflicts).
    fn disown(&self, old: &Value, new: &Value, entries: &mut Vec<Entry>) -> Vec<Conflict> {
        let mut conflicts = Vec::new();
        let mut known: Vec<(String, Option<Comparison>)> = Vec::new();
        entries.retain_mut(|entry| {
            if !known.iter().any(|(version, _)| *version == entry.api_version) {
                known.push((entry.api_version.clone(), self.compare(old, new, &entry.api_version)));
            }
            let comparison = known.iter().find(|(version, _)| *version == entry.api_version).and_then(|(_, found)| found.as_ref());
            // Entries of a version that is gone go with it.
            let Some(comparison) = comparison else { return false };
            let taken = entry.fields.intersection(&comparison.modified.union(&comparison.added));
            conflicts.extend(taken.paths().into_iter().map(|path| Conflict { entry: entry.clone(), path }));
            entry.fields = entry.fields.difference(&taken).difference(&comparison.removed);
            !entry.fields.is_empty()
        });
        conflicts
    }

    /// Gives what changed to `manager`.
    fn track(&self, old: &Value, new: &Value, entries: &mut Vec<Entry>, manager: &str) {
        self.disown(old, new, entries);
        let comparison = walk::compare(self.root(), old, new).without(&self.reset_fields());
        let changed = comparison.modified.union(&comparison.added).difference(&FieldSet::of(&SYSTEM));
        if changed.is_empty() {
            return;
        }
        let mut own = self.entry(manager, false, changed);
        own.time = Some(crate::time::format(self.now));
        match entries.iter_mut().find(|entry| entry.is_same(&own)) {
            Some(entry) => {
                entry.fields = entry.fields.union(&own.fields);
                entry.time = own.time;
            }
            None => entries.push(own),
        }
    }

    /// The merged object without what its manager applied last time and not now, unless somebody else has it.
    fn prune(&self, merged: Value, others: &[Entry], own: &Entry, last: &Entry) -> Value {
        let Some((target, old)) = self.in_version(&merged, &last.api_version) else { return merged };
        let ty = schema::root(target);
        let last_fields = with_parents(ty, &last.fields);
        let pruned = walk::remove(ty, &old, &last_fields).unwrap_or_default();
        let merged_fields = with_parents(ty, &walk::fields(ty, &old));
        let owned = others.iter().filter(|entry| entry.api_version == last.api_version).chain([own]);
        let owned = owned.fold(FieldSet::default(), |all, entry| all.union(&entry.fields));
        let kept = with_parents(ty, &walk::fields(ty, &pruned)).union(&with_parents(ty, &owned));
        let pruned = walk::remove(ty, &old, &merged_fields.difference(&kept)).unwrap_or_default();
        // Whatever else went was never this manager's.
        let pruned_fields = with_parents(ty, &walk::fields(ty, &pruned));
        let gone = merged_fields.difference(&pruned_fields).intersection(&last_fields);
        let mut result = walk::remove(ty, &old, &gone).unwrap_or_default();
        if target.version != self.resource.version {
            convert::to_storage(target, &mut result);
            convert::to_version(self.resource, &mut result);
        }
        result
    }

    /// The fields of the last client-side applied configuration that are still as it said.
    fn last_applied_fields(&self, live: &Value) -> FieldSet {
        let text = meta::annotation(live, LAST_APPLIED).unwrap_or_default();
        let Ok(config) = serde_json::from_str::<Value>(text) else { return FieldSet::default() };
        if meta::api_version(&config) != self.resource.api_version() {
            return FieldSet::default();
        }
        let changed = walk::compare(self.root(), &config, live);
        walk::fields(self.root(), &config).difference(&changed.modified).difference(&changed.added).difference(&changed.removed)
    }

    fn renew_last_applied(&self, object: &mut Value, config: &Value) {
        let mut config = config.clone();
        if let Some(annotations) = config.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
            annotations.shift_remove(LAST_APPLIED);
        }
        meta::child_mut(&mut object["metadata"], "annotations").insert(LAST_APPLIED.into(), format!("{config}\n").into());
    }
}
