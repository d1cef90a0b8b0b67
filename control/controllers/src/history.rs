//! ControllerRevisions: the templates that a DaemonSet or StatefulSet has had.
use std::collections::HashSet;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use kube::Resource;
use kube::api::DeleteParams;
use serde_json::{Value, json};

use crate::error::{SyncError, unless_gone};
use crate::objects::{Key, by_creation, controller_of, controller_ref, labels, name, safe_encode, selects, stable_hash, uid};
use crate::pods;
use crate::store::{Object, Store};

/// The label by which a pod, and a revision itself, names a revision.
pub const HASH_LABEL: &str = "controller-revision-hash";
const OWN_HASH_LABEL: &str = "controller.kubernetes.io/hash";

/// A template in the form in which revisions keep it: a patch that replaces it. Its keys are in order, as Go writes a map's: clients
/// compare it with their own by bytes, and equal data has equal hashes wherever it comes from.
pub fn data(template: &PodTemplateSpec) -> Value {
    let mut template = serde_json::to_value(template).unwrap_or_default();
    if let Some(fields) = template.as_object_mut() {
        fields.insert("$patch".into(), "replace".into());
    }
    let mut data = json!({"spec": {"template": template}});
    data.sort_all_objects();
    data
}

/// The template that a revision keeps.
pub fn template(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    let mut template = revision.data.as_ref()?.0.pointer("/spec/template")?.clone();
    template.as_object_mut()?.remove("$patch");
    serde_json::from_value(template).ok()
}

fn hash(data: &Value, collisions: i32) -> String {
    safe_encode(&stable_hash(data, Some(collisions)).to_string())
}

/// Equal templates; defaults that were filled in since are no difference.
fn same(revision: &ControllerRevision, wanted: &PodTemplateSpec) -> bool {
    revision.data.as_ref().is_some_and(|data| data.0 == self::data(wanted)) || template(revision).as_ref() == Some(wanted)
}

/// An owner's revisions, oldest first.
pub async fn list<O: Object>(
    owners: &Store<O>,
    owner: &O,
    revisions: &Store<ControllerRevision>,
    selector: Option<&k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector>,
) -> Result<Vec<Arc<ControllerRevision>>, SyncError> {
    let space = owner.meta().namespace.clone().unwrap_or_default();
    let candidate =
        |revision: &ControllerRevision| controller_of(&revision.metadata).is_none_or(|controller| controller.uid == uid(owner.meta()));
    let candidates = revisions.select(&space, candidate);
    let matches = |revision: &ControllerRevision| selects(selector, labels(&revision.metadata));
    let mut mine = pods::claim_all(owners, owner, &controller_ref(owner), revisions, candidates, matches).await?;
    mine.sort_by(|left, right| left.revision.cmp(&right.revision).then_with(|| by_creation(&left.metadata, &right.metadata)));
    Ok(mine)
}

/// What `current` came to.
pub struct Current {
    pub revision: Arc<ControllerRevision>,
    /// The owner's collision count after this; higher than before if a name was taken.
    pub collisions: i32,
}

/// The revision of the owner's template: an existing one, made the newest, or a new one.
pub async fn current<O: Object>(
    revisions: &Store<ControllerRevision>,
    owner: &O,
    wanted: &PodTemplateSpec,
    known: &[Arc<ControllerRevision>],
    mut collisions: i32,
) -> Result<Current, SyncError> {
    let next = known.iter().filter(|revision| !same(revision, wanted)).map(|revision| revision.revision).max().unwrap_or(0) + 1;
    if let Some(found) = known.iter().rev().find(|revision| same(revision, wanted)) {
        if found.revision >= next {
            return Ok(Current { revision: found.clone(), collisions });
        }
        let newest = known.iter().map(|revision| revision.revision).max().unwrap_or(0) + 1;
        let mut updated = (**found).clone();
        updated.revision = newest;
        return Ok(Current { revision: revisions.update(&updated).await?, collisions });
    }
    let next = known.iter().map(|revision| revision.revision).max().unwrap_or(0) + 1;
    loop {
        let fresh = new(owner, wanted, next, collisions);
        match revisions.create(&fresh).await {
            Ok(revision) => return Ok(Current { revision, collisions }),
            Err(error) if error.is_already_exists() => match revisions.get_live(&Key::of(&fresh)).await? {
                Some(there) if same(&there, wanted) && controller_of(&there.metadata).is_some_and(|by| by.uid == uid(owner.meta())) => {
                    return Ok(Current { revision: Arc::new(there), collisions });
                }
                _ => collisions += 1,
            },
            Err(error) => return Err(error),
        }
    }
}

fn new<O: Resource<DynamicType = ()>>(owner: &O, wanted: &PodTemplateSpec, number: i64, collisions: i32) -> ControllerRevision {
    let data = data(wanted);
    let hash = hash(&data, collisions);
    let mut labels = wanted.metadata.as_ref().and_then(|meta| meta.labels.clone()).unwrap_or_default();
    labels.insert(OWN_HASH_LABEL.into(), hash.clone());
    // Without this one a DaemonSet's pods could not be told apart; a StatefulSet's are told by name.
    labels.insert(HASH_LABEL.into(), hash.clone());
    let prefix: String = name(owner.meta()).chars().take(223).collect();
    ControllerRevision {
        metadata: ObjectMeta {
            name: Some(format!("{prefix}-{hash}")),
            namespace: owner.meta().namespace.clone(),
            labels: Some(labels),
            annotations: owner.meta().annotations.clone(),
            owner_references: Some(vec![controller_ref(owner)]),
            ..Default::default()
        },
        data: Some(RawExtension(data)),
        revision: number,
    }
}

/// Deletes the oldest revisions beyond `limit`, but none in `live` (by name or hash).
pub async fn truncate(
    revisions: &Store<ControllerRevision>,
    known: &[Arc<ControllerRevision>],
    live: &HashSet<String>,
    limit: i32,
) -> Result<(), SyncError> {
    let is_live = |revision: &ControllerRevision| {
        live.contains(name(&revision.metadata)) || labels(&revision.metadata).get(HASH_LABEL).is_some_and(|hash| live.contains(hash))
    };
    let old: Vec<_> = known.iter().filter(|revision| !is_live(revision)).collect();
    let excess = old.len().saturating_sub(usize::try_from(limit).unwrap_or(usize::MAX));
    for revision in old.into_iter().take(excess) {
        unless_gone(revisions.delete(revision, DeleteParams::default()).await)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::DaemonSet;

    use super::*;

    #[test]
    fn a_revision_keeps_its_template() {
        let mut owner = DaemonSet::default();
        owner.metadata.name = Some("agent".into());
        let mut wanted = PodTemplateSpec::default();
        wanted.metadata.get_or_insert_default().labels = Some([("app".to_owned(), "agent".to_owned())].into());
        let revision = new(&owner, &wanted, 3, 0);
        assert_eq!(template(&revision).as_ref(), Some(&wanted));
        assert!(same(&revision, &wanted));
        let hash = labels(&revision.metadata)[HASH_LABEL].clone();
        assert_eq!(name(&revision.metadata), format!("agent-{hash}"));
        assert_ne!(labels(&new(&owner, &wanted, 3, 1).metadata)[HASH_LABEL], hash);
        wanted.spec.get_or_insert_default().host_network = Some(true);
        assert!(!same(&revision, &wanted));
    }

    #[test]
    fn data_is_written_as_go_does() {
        let template = json!({
            "metadata": {"labels": {"b": "1", "a": "2"}},
            "spec": {"containers": [{"resources": {}, "name": "app", "image": "i", "env": [{"value": "1", "name": "X"}]}]},
        });
        let wanted: PodTemplateSpec = serde_json::from_value(template).unwrap();
        assert_eq!(
            data(&wanted).to_string(),
            r#"{"spec":{"template":{"$patch":"replace","metadata":{"labels":{"a":"2","b":"1"}},"spec":{"containers":[{"env":[{"name":"X","value":"1"}],"image":"i","name":"app","resources":{}}]}}}}"#
        );
    }
}
