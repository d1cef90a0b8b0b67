//! ResourceQuota status: counts what a namespace really uses, since admission only ever adds.
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ResourceQuota, ResourceQuotaStatus};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as Text;
use kube::api::{ListParams, ObjectList};
use kube::core::{DynamicObject, PartialObjectMeta, Request};
use outrigger_api::quantity::Quantity;
use outrigger_api::quota::{Amounts, in_scope, usage};
use serde_json::Value;
use tokio::task::JoinSet;

use crate::Context;
use crate::error::SyncError;
use crate::informers::Informers;
use crate::objects::{Key, is_terminal, namespace};
use crate::store::{Object, Store};
use crate::worker::{self, Outcome, Queue};

/// Deletions that come together are counted together.
const BATCH: Duration = Duration::from_millis(50);
/// What no event told of is found after this time.
const RESYNC: Duration = Duration::from_secs(300);

/// To be told of the namespace of every object that is gone.
pub type Recount = Arc<dyn Fn(&str) + Send + Sync>;

pub fn start(context: &Context, tasks: &mut JoinSet<()>) -> Recount {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.quotas.on_change(move |old, new| {
        if let Some(quota) = new
            && calls_for_a_count(old.map(|old| &**old), quota)
        {
            add.add(Key::of(&**quota));
        }
    });
    let (add, quotas) = (queue.clone(), context.informers.quotas.clone());
    let recount: Recount = Arc::new(move |space: &str| {
        for quota in quotas.in_namespace(space) {
            add.add_after(Key::of(&*quota), BATCH);
        }
    });
    let again = recount.clone();
    context.informers.pods.on_change(move |old, new| {
        if let (Some(old), Some(new)) = (old, new)
            && !is_terminal(old)
            && is_terminal(new)
        {
            again(namespace(&new.metadata));
        }
    });
    let again = recount.clone();
    context.informers.services.on_change(move |old, new| {
        if let (Some(_), Some(new)) = (old, new) {
            again(namespace(&new.metadata));
        }
    });
    let informers = context.informers.clone();
    tasks.spawn(worker::run("resourcequota", queue, 5, move |key| sync(informers.clone(), key)));
    recount
}

/// Not when only the use in the status changed: admission has just charged an object there that no store shows yet. Admission never
/// touches the limits there, so others than the spec's are somebody's mistake, and wouldn't hold.
fn calls_for_a_count(old: Option<&ResourceQuota>, new: &ResourceQuota) -> bool {
    let limits = |quota: &ResourceQuota| quota.status.as_ref().and_then(|status| status.hard.clone());
    let wanted = new.spec.as_ref().and_then(|spec| spec.hard.clone());
    old.is_none_or(|old| old.spec != new.spec || (limits(old) != limits(new) && limits(new) != wanted))
}

async fn sync(informers: Arc<Informers>, key: Key) -> Outcome {
    let Some(quota) = informers.quotas.get(&key) else { return Ok(None) };
    let hard = quota.spec.as_ref().and_then(|spec| spec.hard.clone()).unwrap_or_default();
    let mut used = Amounts::new();
    let as_value = serde_json::to_value(&*quota).map_err(|error| SyncError::Api(kube::Error::SerdeError(error)))?;
    let counted: BTreeSet<(String, String)> = hard.keys().filter_map(|name| counted_kind(name)).collect();
    for (group, plural) in &counted {
        for object in objects(&informers, group, plural, &key.namespace).await? {
            if !in_scope(&as_value, group, plural, &object) {
                continue;
            }
            for (name, amount) in usage(group, plural, &object) {
                let sum = used.get(&name).copied().unwrap_or_default() + amount;
                used.insert(name, sum);
            }
        }
    }
    let before = quota.status.as_ref().and_then(|status| status.used.clone()).unwrap_or_default();
    let used = hard
        .keys()
        .map(|name| {
            // What nobody here can count stays as it was.
            let kept = || before.get(name).cloned().unwrap_or_else(|| Text("0".into()));
            let value = if counted_kind(name).is_some() { Text(used.get(name).copied().unwrap_or_default().to_string()) } else { kept() };
            (name.clone(), value)
        })
        .collect();
    let status = ResourceQuotaStatus { hard: Some(hard), used: Some(used) };
    if !same(quota.status.as_ref(), &status) {
        let mut updated = (*quota).clone();
        updated.status = Some(status);
        informers.quotas.update_status(&updated).await?;
    }
    Ok(Some(RESYNC))
}

fn same(left: Option<&ResourceQuotaStatus>, right: &ResourceQuotaStatus) -> bool {
    let read = |list: &Option<std::collections::BTreeMap<String, Text>>| -> Option<Vec<(String, Quantity)>> {
        Some(list.as_ref()?.iter().map(|(name, text)| (name.clone(), Quantity::parse(&text.0).unwrap_or_default())).collect())
    };
    left.is_some_and(|left| {
        left.hard.is_some() && left.used.is_some() && read(&left.hard) == read(&right.hard) && read(&left.used) == read(&right.used)
    })
}

/// The (group, plural) whose objects use a quota resource.
fn counted_kind(resource: &str) -> Option<(String, String)> {
    let core = |plural: &str| Some((String::new(), plural.to_owned()));
    if let Some(counted) = resource.strip_prefix("count/") {
        let (plural, group) = counted.split_once('.').unwrap_or((counted, ""));
        return Some((group.to_owned(), plural.to_owned()));
    }
    match resource {
        "services" | "services.nodeports" | "services.loadbalancers" => core("services"),
        "persistentvolumeclaims" | "requests.storage" => core("persistentvolumeclaims"),
        "configmaps" | "secrets" | "replicationcontrollers" | "resourcequotas" => core(resource),
        "pods" | "cpu" | "memory" | "ephemeral-storage" => core("pods"),
        name if name.contains(".storageclass.storage.k8s.io/") => core("persistentvolumeclaims"),
        name if name.starts_with("requests.") || name.starts_with("limits.") || name.starts_with("hugepages-") => core("pods"),
        _ => None,
    }
}

fn stored<K: Object>(store: &Store<K>, space: &str) -> Result<Vec<Value>, SyncError> {
    let values: Result<_, _> = store.in_namespace(space).iter().map(|object| serde_json::to_value(&**object)).collect();
    values.map_err(|error| SyncError::Api(kube::Error::SerdeError(error)))
}

/// A namespace's objects of a kind: from the shared stores, or the bare metadata of others.
async fn objects(informers: &Informers, group: &str, plural: &str, space: &str) -> Result<Vec<Value>, SyncError> {
    match (group, plural) {
        ("", "pods") => stored(&informers.pods, space),
        ("", "services") => stored(&informers.services, space),
        ("", "persistentvolumeclaims") => stored(&informers.volume_claims, space),
        ("", "replicationcontrollers") => stored(&informers.replication_controllers, space),
        ("", "resourcequotas") => stored(&informers.quotas, space),
        _ => listed(informers, group, plural, space).await,
    }
}

async fn listed(informers: &Informers, group: &str, plural: &str, space: &str) -> Result<Vec<Value>, SyncError> {
    let prefix = if group.is_empty() {
        "/api/v1".to_owned()
    } else {
        let groups = informers.client.list_api_groups().await?.groups;
        let Some(found) = groups.into_iter().find(|known| known.name == group) else { return Ok(Vec::new()) };
        let Some(version) = found.preferred_version.or_else(|| found.versions.first().cloned()) else { return Ok(Vec::new()) };
        format!("/apis/{}", version.group_version)
    };
    let requests = Request::new(format!("{prefix}/namespaces/{space}/{plural}"));
    let mut params = ListParams::default().limit(500);
    let mut all = Vec::new();
    loop {
        let request = requests.list_metadata(&params).map_err(kube::Error::BuildRequest)?;
        let page = match informers.client.request::<ObjectList<PartialObjectMeta<DynamicObject>>>(request).await.map_err(SyncError::Api) {
            Ok(page) => page,
            // A kind that isn't there has no objects.
            Err(error) if error.is_not_found() => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        all.extend(page.items.iter().map(|_| Value::Null));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok(all),
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ResourceQuotaSpec;

    use super::*;

    #[test]
    fn every_quota_resource_knows_whose_objects_use_it() {
        let cases = [
            ("pods", Some(("", "pods"))),
            ("requests.cpu", Some(("", "pods"))),
            ("requests.nvidia.com/gpu", Some(("", "pods"))),
            ("requests.storage", Some(("", "persistentvolumeclaims"))),
            ("gold.storageclass.storage.k8s.io/requests.storage", Some(("", "persistentvolumeclaims"))),
            ("services.nodeports", Some(("", "services"))),
            ("count/deployments.apps", Some(("apps", "deployments"))),
            ("count/secrets", Some(("", "secrets"))),
            ("nonsense", None),
        ];
        for (resource, expected) in cases {
            let expected = expected.map(|(group, plural)| (group.to_owned(), plural.to_owned()));
            assert_eq!(counted_kind(resource), expected, "{resource}");
        }
    }

    #[test]
    fn limits_that_arent_the_specs_call_for_a_count_and_use_doesnt() {
        let list = |cpu: &str| Some([("cpu".to_owned(), Text(cpu.into()))].into());
        let quota = |spec: &str, hard: &str, used: &str| ResourceQuota {
            spec: Some(ResourceQuotaSpec { hard: list(spec), ..Default::default() }),
            status: Some(ResourceQuotaStatus { hard: list(hard), used: list(used) }),
            ..Default::default()
        };
        let before = quota("1", "1", "0");
        let cases = [("1", "1", "500m", false), ("2", "1", "0", true), ("1", "2", "0", true), ("1", "1", "0", false)];
        for (spec, hard, used, expected) in cases {
            assert_eq!(calls_for_a_count(Some(&before), &quota(spec, hard, used)), expected, "{spec} {hard} {used}");
        }
        assert!(calls_for_a_count(None, &before));
        assert!(!calls_for_a_count(Some(&quota("1", "2", "0")), &before), "it is right again");
    }

    #[test]
    fn amounts_compare_by_value() {
        let status = |cpu: &str| {
            let list = Some([("cpu".to_owned(), Text(cpu.into()))].into());
            ResourceQuotaStatus { hard: list.clone(), used: list }
        };
        assert!(same(Some(&status("1")), &status("1000m")));
        assert!(!same(Some(&status("1")), &status("2")));
        assert!(!same(None, &status("1")));
    }
}
