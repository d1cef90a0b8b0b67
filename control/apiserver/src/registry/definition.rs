//! CustomResourceDefinitions: their names are accepted or not when they are written, their resources are served from then on, and deleting
//! one deletes its objects first.

use std::sync::{Arc, RwLock, Weak};
use std::time::Duration;

use jiff::Timestamp;
use outrigger_api::{Catalog, Resource, Status, custom, meta};
use serde_json::{Value, json};

use crate::admission::all;
use crate::cache::split_key;
use crate::call::Call;
use crate::engine::Engine;
use crate::feed::Listener;
use crate::registry::delete::{DeleteOptions, delete};
use crate::registry::update;

const GROUP: &str = "apiextensions.k8s.io";
const PLURAL: &str = "customresourcedefinitions";
pub const PREFIX: &str = "apiextensions.k8s.io/customresourcedefinitions";
const CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";

pub fn is_definition(resource: &Resource) -> bool {
    resource.is(GROUP, "CustomResourceDefinition")
}

/// Keeps the catalog in step with the stored definitions.
pub struct CatalogListener(pub Arc<RwLock<Arc<Catalog>>>);

impl Listener for CatalogListener {
    fn changed(&self, key: &str, revision: u64, value: Option<&[u8]>) {
        let Some((PREFIX, name)) = split_key(key) else { return };
        let mut catalog = self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut next = Catalog::clone(&catalog);
        if let Some((plural, group)) = name.split_once('.') {
            next.remove_custom(group, plural);
        }
        if let Some(mut definition) = value.and_then(|bytes| serde_json::from_slice::<Value>(bytes).ok())
            && condition(&definition, "Established")
        {
            meta::set_resource_version(&mut definition, &revision.to_string());
            for resource in custom::resources(&definition) {
                next.insert(resource);
            }
        }
        *catalog = Arc::new(next);
    }
}

fn condition(definition: &Value, kind: &str) -> bool {
    meta::items(definition, "status.conditions").iter().any(|c| c["type"] == kind && c["status"] == "True")
}

fn set_condition(definition: &mut Value, kind: &str, status: bool, reason: &str, message: &str) {
    let status = if status { "True" } else { "False" };
    let mut conditions = meta::items(definition, "status.conditions").to_vec();
    let now = outrigger_api::time::format(Timestamp::now());
    let known = conditions.iter_mut().find(|c| c["type"] == kind);
    let since = match &known {
        Some(known) if known["status"] == status => known["lastTransitionTime"].clone(),
        _ => now.into(),
    };
    let condition = json!({"type": kind, "status": status, "lastTransitionTime": since, "reason": reason, "message": message});
    match known {
        Some(known) => *known = condition,
        None => conditions.push(condition),
    }
    meta::set(definition, "status.conditions", conditions);
}

/// Writes what the server decides about a definition into its status.
pub fn settle(engine: &Engine, call: &Call, definition: &mut Value) {
    if !is_definition(&call.resource) || !call.info.subresource.is_empty() {
        return;
    }
    let names = meta::get(definition, "spec.names").clone();
    match conflict(engine, definition, &names) {
        None => {
            meta::set(definition, "status.acceptedNames", names);
            set_condition(definition, "NamesAccepted", true, "NoConflicts", "no conflicts found");
            if !condition(definition, "Established") {
                set_condition(definition, "Established", true, "InitialNamesAccepted", "the initial names have been accepted");
            }
        }
        Some((reason, message)) => {
            set_condition(definition, "NamesAccepted", false, reason, &message);
            if !condition(definition, "Established") {
                meta::set(definition, "status.acceptedNames", json!({"plural": "", "kind": ""}));
                set_condition(definition, "Established", false, "NotAccepted", "not all names are accepted");
            }
        }
    }
    let storage = meta::items(definition, "spec.versions").iter().find(|v| v["storage"] == true).map(|v| v["name"].clone());
    let mut stored = meta::items(definition, "status.storedVersions").to_vec();
    stored.extend(storage.filter(|name| !stored.contains(name)));
    meta::set(definition, "status.storedVersions", stored);
}

/// The first of the wanted names that another definition of the group already has.
fn conflict(engine: &Engine, definition: &Value, names: &Value) -> Option<(&'static str, String)> {
    let others: Vec<Value> = all(engine, GROUP, PLURAL, "")
        .into_iter()
        .filter(|other| {
            meta::name(other) != meta::name(definition) && meta::get(other, "spec.group") == meta::get(definition, "spec.group")
        })
        .map(|other| meta::get(&other, "status.acceptedNames").clone())
        .collect();
    let resource_names: Vec<&str> = others
        .iter()
        .flat_map(|n| {
            [meta::text(n, "plural"), meta::text(n, "singular")]
                .into_iter()
                .chain(meta::items(n, "shortNames").iter().filter_map(Value::as_str))
        })
        .collect();
    let kinds: Vec<&str> = others.iter().flat_map(|n| [meta::text(n, "kind"), meta::text(n, "listKind")]).collect();
    let taken = |list: &[&str], name: &str| !name.is_empty() && list.contains(&name);
    let used = |name: &str| format!("{name:?} is already in use");
    for (field, reason) in [("plural", "PluralConflict"), ("singular", "SingularConflict")] {
        if taken(&resource_names, meta::text(names, field)) {
            return Some((reason, used(meta::text(names, field))));
        }
    }
    if let Some(short) = meta::items(names, "shortNames").iter().filter_map(Value::as_str).find(|name| taken(&resource_names, name)) {
        return Some(("ShortNamesConflict", used(short)));
    }
    for (field, reason) in [("kind", "KindConflict"), ("listKind", "ListKindConflict")] {
        if taken(&kinds, meta::text(names, field)) {
            return Some((reason, used(meta::text(names, field))));
        }
    }
    None
}

/// The state of a definition whose deletion begins: it waits until its objects are gone.
pub fn begin_deletion(definition: &mut Value) {
    let mut finalizers = meta::items(definition, "metadata.finalizers").to_vec();
    if !finalizers.iter().any(|f| f == CLEANUP) {
        finalizers.push(CLEANUP.into());
        meta::set(definition, "metadata.finalizers", finalizers);
    }
    let now = outrigger_api::time::format(Timestamp::now());
    meta::set(definition, "metadata.deletionTimestamp", now);
    meta::set(definition, "metadata.deletionGracePeriodSeconds", 0);
    set_condition(
        definition,
        "Terminating",
        true,
        "InstanceDeletionPending",
        "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon",
    );
}

/// Nothing is created of a kind whose definition is going.
pub fn check_create(engine: &Engine, call: &Call) -> Result<(), Status> {
    let Some(facts) = &call.resource.custom else { return Ok(()) };
    let definition = crate::admission::lookup(engine, GROUP, PLURAL, "", &facts.definition);
    if definition.is_some_and(|definition| condition(&definition, "Terminating")) {
        let mut status = Status::method_not_supported(&call.resource.group, &call.resource.plural, "create");
        status.message = format!("create not allowed while custom resource definition is terminating: {}", status.message);
        return Err(status);
    }
    Ok(())
}

/// Deletes the objects of definitions that are being deleted, and then lets those go.
pub async fn clean_up(engine: Weak<Engine>) {
    let Some(mut changed) = engine.upgrade().map(|engine| engine.hub.cache(PREFIX).subscribe()) else { return };
    loop {
        changed.mark_unchanged();
        let mut waiting = false;
        {
            let Some(engine) = engine.upgrade() else { return };
            for definition in all(&engine, GROUP, PLURAL, "") {
                if meta::is_deleting(&definition) && meta::finalizers(&definition).any(|f| f == CLEANUP) {
                    match finish(&engine, &definition).await {
                        Ok(gone) => waiting |= !gone,
                        Err(status) => {
                            tracing::warn!(definition = meta::name(&definition), %status, "deleting the objects of a definition");
                            waiting = true;
                        }
                    }
                }
            }
        }
        let pause = if waiting { Duration::from_secs(1) } else { Duration::from_secs(600) };
        match tokio::time::timeout(pause, changed.changed()).await {
            Ok(Err(_)) => return,
            _ => continue,
        }
    }
}

/// True when no object is left and the finalizer is off.
async fn finish(engine: &Arc<Engine>, definition: &Value) -> Result<bool, Status> {
    engine.fresh().await?;
    let Some(resource) = custom::resources(definition).into_iter().next() else { return release(engine, definition).await };
    let cache = engine.hub.cache(&resource.storage_prefix);
    for entry in cache.range("", None).entries {
        let call = Call::internal(resource.clone(), "delete", entry.namespace(), entry.name());
        match delete(engine, &call, entry.name(), &DeleteOptions { admitted: true, ..Default::default() }).await {
            Ok(_) => {}
            Err(status) if status.code == 404 => {}
            Err(status) => return Err(status),
        }
    }
    engine.fresh().await?;
    if !cache.is_empty() {
        return Ok(false);
    }
    release(engine, definition).await
}

async fn release(engine: &Arc<Engine>, definition: &Value) -> Result<bool, Status> {
    let name = meta::name(definition);
    let call = Call::internal(engine.builtin(GROUP, "v1", PLURAL), "patch", "", name);
    let outcome = update::change(engine, &call, name, crate::admission::Operation::Update, |current| {
        let mut object = current.clone();
        let kept: Vec<Value> = meta::items(current, "metadata.finalizers").iter().filter(|f| *f != CLEANUP).cloned().collect();
        meta::set(&mut object, "metadata.finalizers", kept);
        Ok(object)
    })
    .await;
    match outcome {
        Ok(_) => Ok(true),
        Err(status) if status.code == 404 => Ok(true),
        Err(status) => Err(status),
    }
}
