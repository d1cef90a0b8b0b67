//! What all workload controllers share: pods from templates, slow-start batches, adoption and release.
use std::future::Future;
use std::sync::Arc;

use futures::future::join_all;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource;
use kube::api::DeleteParams;
use serde_json::json;

use crate::error::SyncError;
use crate::events::Recorder;
use crate::objects::{Key, controller_of, is_terminating, name, name_prefix, namespace, uid};
use crate::store::{Object, Store};

/// The pod that `template` describes, named after and controlled by its owner.
pub fn from_template(owner: &ObjectMeta, template: &PodTemplateSpec, controller: OwnerReference) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(name_prefix(name(owner))),
            namespace: owner.namespace.clone(),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![controller]),
            ..Default::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// Creates a pod and tells about it on its owner.
pub async fn create<O: Resource<DynamicType = ()>>(
    pods: &Store<Pod>,
    recorder: &Recorder,
    owner: &O,
    pod: &Pod,
) -> Result<Arc<Pod>, SyncError> {
    match pods.create(pod).await {
        Ok(created) => {
            recorder.normal(owner, "SuccessfulCreate", format!("Created pod: {}", name(&created.metadata)));
            Ok(created)
        }
        Err(error) => {
            if !error.is_namespace_terminating() {
                recorder.warning(owner, "FailedCreate", format!("Error creating: {}", error.message()));
            }
            Err(error)
        }
    }
}

/// Deletes a pod and tells about it on its owner. One that is gone already is a success.
pub async fn delete<O: Resource<DynamicType = ()>>(pods: &Store<Pod>, recorder: &Recorder, owner: &O, pod: &Pod) -> Result<(), SyncError> {
    match pods.delete(pod, DeleteParams::default()).await {
        Ok(()) => {
            recorder.normal(owner, "SuccessfulDelete", format!("Deleted pod: {}", name(&pod.metadata)));
            Ok(())
        }
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => {
            recorder.warning(owner, "FailedDelete", format!("Error deleting: {}", error.message()));
            Err(error)
        }
    }
}

/// Calls `act` with 0..count in batches of 1, 2, 4, …; a batch with a failure is the last one, so that many
/// calls that would all fail for one reason cost few. The number of successes, and the first failure.
pub async fn slow_start<F, Fut>(count: usize, act: F) -> (usize, Result<(), SyncError>)
where
    F: Fn(usize) -> Fut,
    Fut: Future<Output = Result<(), SyncError>>,
{
    let (mut begun, mut successes, mut batch) = (0, 0, 1);
    while begun < count {
        let size = batch.min(count - begun);
        let results = join_all((begun..begun + size).map(&act)).await;
        begun += size;
        batch *= 2;
        let mut failure = Ok(());
        for result in results {
            match result {
                Ok(()) => successes += 1,
                Err(error) if failure.is_ok() => failure = Err(error),
                Err(_) => {}
            }
        }
        if failure.is_err() {
            return (successes, failure);
        }
    }
    (successes, Ok(()))
}

/// What an owner does about an object that it might own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    Mine,
    Adopt,
    Release,
    Ignore,
}

pub fn claim(owner: &ObjectMeta, object: &ObjectMeta, matches: bool) -> Claim {
    match controller_of(object) {
        Some(controller) if controller.uid != uid(owner) => Claim::Ignore,
        Some(_) if matches => Claim::Mine,
        Some(_) if is_terminating(owner) => Claim::Ignore,
        Some(_) => Claim::Release,
        None if is_terminating(owner) || is_terminating(object) || !matches => Claim::Ignore,
        None => Claim::Adopt,
    }
}

/// Sorts out which of `candidates` belong to `owner`, adopting orphans and releasing what no longer matches.
/// Before the first adoption the owner is read live: a deleted one must not collect anything.
pub async fn claim_all<O: Object, K: Object>(
    owners: &Store<O>,
    owner: &O,
    controller: &OwnerReference,
    store: &Store<K>,
    candidates: Vec<Arc<K>>,
    matches: impl Fn(&K) -> bool,
) -> Result<Vec<Arc<K>>, SyncError> {
    let mut mine = Vec::with_capacity(candidates.len());
    let mut checked = false;
    for object in candidates {
        match claim(owner.meta(), object.meta(), matches(&object)) {
            Claim::Mine => mine.push(object),
            Claim::Ignore => {}
            Claim::Adopt => {
                if !checked {
                    check_alive(owners, owner).await?;
                    checked = true;
                }
                let patch = json!({"metadata": {"uid": uid(object.meta()), "ownerReferences": [controller]}});
                match store.strategic(&Key::of(&*object), patch).await {
                    Ok(adopted) => mine.push(adopted),
                    Err(error) if error.is_not_found() => {}
                    Err(error) => return Err(error),
                }
            }
            Claim::Release => {
                let patch =
                    json!({"metadata": {"uid": uid(object.meta()), "ownerReferences": [{"$patch": "delete", "uid": uid(owner.meta())}]}});
                match store.strategic(&Key::of(&*object), patch).await {
                    Ok(_) => {}
                    // Gone, or another object of that name by now: either way no longer ours.
                    Err(error) if error.is_not_found() || error.is_invalid() || error.is_conflict() => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(mine)
}

async fn check_alive<O: Object>(owners: &Store<O>, owner: &O) -> Result<(), SyncError> {
    let key = Key::of(owner);
    let gone = |why: &str| SyncError::Other(format!("{} {key} can't adopt: {why}", O::kind(&())));
    match owners.get_live(&key).await? {
        None => Err(gone("it is gone")),
        Some(live) if uid(live.meta()) != uid(owner.meta()) => Err(gone("another one has its name")),
        Some(live) if is_terminating(live.meta()) => Err(gone("it is being deleted")),
        Some(_) => Ok(()),
    }
}

/// The key of the object of kind `O` that controls an object, if one does.
pub fn owner_key<O: Resource<DynamicType = ()>>(meta: &ObjectMeta) -> Option<Key> {
    let controller = controller_of(meta)?;
    let group = controller.api_version.split_once('/').map_or("", |(group, _)| group);
    (controller.kind == O::kind(&()) && group == O::group(&())).then(|| Key::new(namespace(meta), controller.name.clone()))
}

/// Whom of kind `O` a change concerns: the controller before and after, and for an orphan whoever selects it.
pub fn concerned<O: Object, K: Resource>(
    old: Option<&Arc<K>>,
    new: Option<&Arc<K>>,
    owners: &Store<O>,
    selects: impl Fn(&O, &K) -> bool,
    mut enqueue: impl FnMut(Key),
) {
    let before = old.and_then(|object| owner_key::<O>(object.meta()));
    let after = new.and_then(|object| owner_key::<O>(object.meta()));
    if let Some(key) = before.clone().filter(|_| before != after) {
        enqueue(key);
    }
    if let Some(key) = after {
        return enqueue(key);
    }
    if let Some(orphan) = new.filter(|object| controller_of(object.meta()).is_none() && !is_terminating(object.meta())) {
        for owner in owners.select(namespace(orphan.meta()), |owner| selects(owner, orphan)) {
            enqueue(Key::of(&*owner));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use crate::objects::now;

    use super::*;

    #[tokio::test]
    async fn batches_double_and_stop_at_a_failure() {
        let calls = Mutex::new(Vec::new());
        let (successes, result) = slow_start(20, |number| {
            calls.lock().unwrap().push(number);
            async move { if number == 4 { Err(SyncError::Other("quota".into())) } else { Ok(()) } }
        })
        .await;
        assert_eq!(calls.into_inner().unwrap().len(), 7, "1 + 2 + 4");
        assert_eq!(successes, 6);
        assert!(result.is_err());
        assert_eq!(slow_start(0, |_| async { Ok(()) }).await.0, 0);
    }

    #[test]
    fn claims_follow_reference_labels_and_deletion() {
        let owner = ObjectMeta { uid: Some("1".into()), ..Default::default() };
        let dying = ObjectMeta { deletion_timestamp: Some(now()), ..owner.clone() };
        let owned_by = |uid: &str| ObjectMeta {
            owner_references: Some(vec![OwnerReference { uid: uid.into(), controller: Some(true), ..Default::default() }]),
            ..Default::default()
        };
        let orphan = ObjectMeta::default();
        let dying_orphan = ObjectMeta { deletion_timestamp: Some(now()), ..Default::default() };
        let cases = [
            (&owner, owned_by("1"), true, Claim::Mine),
            (&owner, owned_by("1"), false, Claim::Release),
            (&dying, owned_by("1"), false, Claim::Ignore),
            (&owner, owned_by("2"), true, Claim::Ignore),
            (&owner, orphan.clone(), true, Claim::Adopt),
            (&owner, orphan.clone(), false, Claim::Ignore),
            (&dying, orphan, true, Claim::Ignore),
            (&owner, dying_orphan, true, Claim::Ignore),
        ];
        for (owner, object, matches, expected) in cases {
            assert_eq!(claim(owner, &object, matches), expected, "{object:?} {matches}");
        }
    }
}
