//! APIServices of the groups that this server has itself: they are made and removed as those come and go, and are always available.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use outrigger_api::{Catalog, Status, meta};
use serde_json::{Value, json};

use super::{GROUP, PLURAL};
use crate::admission::all;
use crate::call::Call;
use crate::engine::Engine;
use crate::registry::create::create;
use crate::registry::definition;
use crate::registry::delete::{DeleteOptions, delete};

const MANAGED: &str = "kube-aggregator.kubernetes.io/automanaged";

/// Upstream's priorities of the built-in groups.
const GROUPS: &[(&str, i64)] = &[
    ("", 18_000),
    (GROUP, 17_900),
    ("apps", 17_800),
    ("events.k8s.io", 17_750),
    ("authentication.k8s.io", 17_700),
    ("authorization.k8s.io", 17_600),
    ("autoscaling", 17_500),
    ("batch", 17_400),
    ("certificates.k8s.io", 17_300),
    ("networking.k8s.io", 17_200),
    ("policy", 17_100),
    ("rbac.authorization.k8s.io", 17_000),
    ("storage.k8s.io", 16_800),
    ("admissionregistration.k8s.io", 16_700),
    ("apiextensions.k8s.io", 16_700),
    ("scheduling.k8s.io", 16_600),
    ("coordination.k8s.io", 16_500),
    ("node.k8s.io", 16_300),
    ("discovery.k8s.io", 16_200),
    ("resource.k8s.io", 16_200),
    ("flowcontrol.apiserver.k8s.io", 16_100),
    ("internal.apiserver.k8s.io", 16_000),
    ("storagemigration.k8s.io", 15_800),
];
/// Of groups and versions that definitions make.
const CUSTOM_GROUP: i64 = 1000;
const CUSTOM_VERSION: i64 = 100;

pub fn group_priority(catalog: &Catalog, group: &str) -> i64 {
    let known = GROUPS.iter().find(|(name, _)| *name == group).map(|(_, priority)| *priority);
    known.unwrap_or(if is_custom(catalog, group) { CUSTOM_GROUP } else { 15_000 })
}

/// Preferred versions have the greater numbers; those of definitions are told apart by their names.
pub fn version_priority(catalog: &Catalog, group: &str, version: &str) -> i64 {
    if is_custom(catalog, group) {
        return CUSTOM_VERSION;
    }
    let versions = catalog.versions(group);
    let place = versions.iter().rev().position(|known| *known == version).unwrap_or_default();
    15 * (place as i64 + 1)
}

fn is_custom(catalog: &Catalog, group: &str) -> bool {
    catalog.versions(group).first().is_some_and(|version| catalog.resources(group, version).all(|resource| resource.custom.is_some()))
}

/// Keeps the APIServices in step with the catalog.
pub async fn register(engine: Weak<Engine>) {
    let Some(mut changed) = engine.upgrade().map(|engine| engine.hub.cache(definition::PREFIX).subscribe()) else { return };
    loop {
        changed.mark_unchanged();
        let pause = {
            let Some(engine) = engine.upgrade() else { return };
            match reconcile(&engine).await {
                Ok(()) => Duration::from_secs(600),
                Err(status) => {
                    tracing::warn!(%status, "registering APIServices");
                    Duration::from_secs(1)
                }
            }
        };
        if let Ok(Err(_)) = tokio::time::timeout(pause, changed.changed()).await {
            return;
        }
    }
}

async fn reconcile(engine: &Arc<Engine>) -> Result<(), Status> {
    engine.fresh().await?;
    let catalog = engine.catalog();
    let mut wanted: BTreeMap<String, Value> = BTreeMap::new();
    for group in catalog.groups().filter(|group| *group != GROUP) {
        for version in catalog.versions(group) {
            let object = api_service(&catalog, group, version);
            wanted.insert(meta::name(&object).to_string(), object);
        }
    }
    let resource = engine.builtin(GROUP, "v1", PLURAL);
    for known in all(engine, GROUP, PLURAL, "") {
        let name = meta::name(&known).to_string();
        if wanted.remove(&name).is_none() && meta::label(&known, MANAGED).is_some() && meta::get(&known, "spec.service").is_null() {
            let call = Call::internal(resource.clone(), "delete", "", &name);
            match delete(engine, &call, &name, &DeleteOptions::default()).await {
                Err(status) if status.code != 404 => return Err(status),
                _ => {}
            }
        }
    }
    for (name, object) in wanted {
        let call = Call::internal(resource.clone(), "create", "", &name);
        match create(engine, &call, object).await {
            Err(status) if status.reason != "AlreadyExists" => return Err(status),
            _ => {}
        }
    }
    Ok(())
}

fn api_service(catalog: &Catalog, group: &str, version: &str) -> Value {
    let managed = if is_custom(catalog, group) { "true" } else { "onstart" };
    let mut object = json!({
        "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
        "metadata": {"name": format!("{version}.{group}"), "labels": {MANAGED: managed}},
        "spec": {
            "version": version, "groupPriorityMinimum": group_priority(catalog, group),
            "versionPriority": version_priority(catalog, group, version),
        },
    });
    if !group.is_empty() {
        object["spec"]["group"] = group.into();
    }
    object
}
