//! Objects in another version than the stored one: built-in kinds by code, custom resources by renaming or by their definition's webhook.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use outrigger_api::resource::{CustomFacts, api_version, split_api_version};
use outrigger_api::{Resource, Status, convert, default, meta};
use serde_json::{Value, json};

use crate::cache::{Entry, encode};
use crate::engine::Engine;
use crate::webhook;

/// How long a conversion may take: upstream sets no limit of its own and is cut by the request's.
const LIMIT: Duration = Duration::from_secs(30);

/// Whether an entry's bytes are what the resource's version shows. Of a definition with several versions, older objects may be stored in
/// another than today's storage version.
pub fn is_stored_so(resource: &Resource, entry: &Entry) -> bool {
    match &resource.custom {
        Some(facts) if entry.revision <= facts.since => false,
        Some(facts) if facts.several_versions => meta::api_version(&entry.object()) == resource.api_version(),
        _ => convert::is_identity(resource),
    }
}

/// An entry's object in the version of `resource`.
pub async fn object(engine: &Engine, resource: &Resource, entry: &Entry) -> Result<Value, Status> {
    // One in, one out.
    Ok(objects(engine, resource, [entry]).await?.pop().unwrap_or_default())
}

/// The objects of several entries, converted at once. Custom ones that were stored under an older schema are fitted to the present one.
pub async fn objects<'a>(engine: &Engine, resource: &Resource, entries: impl IntoIterator<Item = &'a Entry>) -> Result<Vec<Value>, Status> {
    let (old, stored): (Vec<bool>, Vec<Value>) = entries
        .into_iter()
        .map(|entry| (resource.custom.as_ref().is_some_and(|facts| entry.revision <= facts.since), entry.object()))
        .unzip();
    let mut found = from_storage(engine, resource, stored).await?;
    found.iter_mut().zip(old).filter(|(_, old)| *old).for_each(|(object, _)| fit(resource, object));
    Ok(found)
}

/// Stored objects in the version of `resource`, in the same order.
async fn from_storage(engine: &Engine, resource: &Resource, mut objects: Vec<Value>) -> Result<Vec<Value>, Status> {
    match &resource.custom {
        Some(facts) if facts.several_versions => custom(engine, resource, facts, &resource.api_version(), objects).await,
        _ => {
            if !convert::is_identity(resource) {
                objects.iter_mut().for_each(|object| convert::to_version(resource, object));
            }
            Ok(objects)
        }
    }
}

/// The bytes to store: storage version, no resourceVersion.
pub async fn stored_bytes(engine: &Engine, resource: &Resource, object: &Value) -> Result<Bytes, Status> {
    Ok(bytes(to_storage(engine, resource, object.clone()).await?))
}

/// The same for the built-in kinds.
pub fn builtin_bytes(resource: &Resource, object: &Value) -> Bytes {
    let mut stored = object.clone();
    if !convert::is_identity(resource) {
        convert::to_storage(resource, &mut stored);
    }
    bytes(stored)
}

fn bytes(mut stored: Value) -> Bytes {
    meta::remove(&mut stored, "metadata.resourceVersion");
    encode(&stored)
}

async fn to_storage(engine: &Engine, resource: &Resource, mut object: Value) -> Result<Value, Status> {
    match &resource.custom {
        Some(facts) if facts.several_versions => {
            let version = api_version(&resource.storage.group, &resource.storage.version);
            let mut converted = custom(engine, resource, facts, &version, vec![object]).await?;
            Ok(converted.pop().unwrap_or_default())
        }
        _ => {
            if !convert::is_identity(resource) {
                convert::to_storage(resource, &mut object);
            }
            Ok(object)
        }
    }
}

/// An object of one version of a kind in another.
pub async fn between(engine: &Engine, from: &Resource, to: &Resource, object: Value) -> Result<Value, Status> {
    if from.gvr() == to.gvr() {
        return Ok(object);
    }
    let stored = if to.custom.is_some() { object } else { to_storage(engine, from, object).await? };
    Ok(from_storage(engine, to, vec![stored]).await?.pop().unwrap_or_default())
}

/// Custom resources in version `wanted`: those that are in it already stay as they are.
async fn custom(
    engine: &Engine,
    resource: &Resource,
    facts: &CustomFacts,
    wanted: &str,
    mut objects: Vec<Value>,
) -> Result<Vec<Value>, Status> {
    let foreign: Vec<usize> = (0..objects.len()).filter(|index| meta::api_version(&objects[*index]) != wanted).collect();
    if foreign.is_empty() {
        return Ok(objects);
    }
    let target = in_version(engine, resource, wanted);
    let conversion = facts.conversion.as_ref().filter(|conversion| conversion["strategy"] == "Webhook");
    let Some(conversion) = conversion else {
        for index in foreign {
            objects[index]["apiVersion"] = wanted.into();
            if let Some(target) = &target {
                fit(target, &mut objects[index]);
            }
        }
        return Ok(objects);
    };
    let sent: Vec<Value> = foreign.iter().map(|index| objects[*index].clone()).collect();
    let (group, version) = split_api_version(meta::api_version(&sent[0]));
    let kind = format!("{group}/{version}, Kind={}", resource.kind);
    let failed = |why: String| Status::new(500, "", format!("conversion webhook for {kind} {why}"));
    let converted = ask(engine, &conversion["webhook"], wanted, &sent).await.map_err(|why| failed(format!("failed: {why}")))?;
    if converted.len() != sent.len() {
        return Err(failed(format!("returned {} objects, expected {}", converted.len(), sent.len())));
    }
    for (at, (index, mut object)) in foreign.into_iter().zip(converted).enumerate() {
        check(wanted, &sent[at], &object).map_err(|why| failed(format!("returned invalid converted object at index {at}: {why}")))?;
        restore_metadata(&sent[at], &mut object)
            .map_err(|why| failed(format!("returned invalid metadata in object at index {at}: {why}")))?;
        if let Some(target) = &target {
            fit(target, &mut object);
        }
        objects[index] = object;
    }
    Ok(objects)
}

/// Drops what the schema doesn't know, and fills in its defaults. What doesn't fit any more is shown as it is: only writes are refused for it.
fn fit(resource: &Resource, object: &mut Value) {
    let _ = crate::registry::fitted(resource, object);
    default::apply(resource, object);
}

/// The resource's entry for a version, where it is served.
fn in_version(engine: &Engine, resource: &Resource, version: &str) -> Option<Arc<Resource>> {
    let (group, version) = split_api_version(version);
    engine.catalog().by_path(group, version, &resource.plural).cloned()
}

/// One ConversionReview, and the converted objects of its answer.
async fn ask(engine: &Engine, config: &Value, wanted: &str, objects: &[Value]) -> Result<Vec<Value>, String> {
    let known = meta::items(config, "conversionReviewVersions").iter().filter_map(Value::as_str).find(|v| matches!(*v, "v1" | "v1beta1"));
    let version = known.ok_or("no supported conversion review versions")?;
    let uid = uuid::Uuid::new_v4().to_string();
    let review = json!({
        "kind": "ConversionReview",
        "apiVersion": format!("apiextensions.k8s.io/{version}"),
        "request": {"uid": uid, "desiredAPIVersion": wanted, "objects": objects},
    });
    let answer = webhook::post(engine, &config["clientConfig"], &review, LIMIT).await.map_err(|error| error.reason)?;
    answered(version, &uid, &answer)
}

fn answered(version: &str, uid: &str, answer: &Value) -> Result<Vec<Value>, String> {
    let response = &answer["response"];
    if version == "v1" && (meta::api_version(answer), meta::kind(answer)) != ("apiextensions.k8s.io/v1", "ConversionReview") {
        let (group, got) = split_api_version(meta::api_version(answer));
        let wanted = "apiextensions.k8s.io/v1, Kind=ConversionReview";
        return Err(format!("expected webhook response of {wanted}, got {group}/{got}, Kind={}", meta::kind(answer)));
    }
    if !response.is_object() {
        return Err("no response provided".into());
    }
    if version == "v1" && meta::text(response, "uid") != uid {
        return Err(format!("expected response.uid={uid:?}, got {:?}", meta::text(response, "uid")));
    }
    let (status, message) = (meta::text(response, "result.status"), meta::text(response, "result.message"));
    if status != "Success" {
        let unexplained = || format!("response.result.status was '{status}', not 'Success'");
        return Err(if message.is_empty() { unexplained() } else { message.into() });
    }
    Ok(meta::items(response, "convertedObjects").to_vec())
}

/// What a conversion must leave as it was.
fn check(wanted: &str, before: &Value, after: &Value) -> Result<(), String> {
    if meta::api_version(after) != wanted {
        return Err(format!("invalid groupVersion (expected {wanted}, received {})", meta::api_version(after)));
    }
    if meta::kind(after) != meta::kind(before) {
        return Err(format!("invalid kind (expected {}, received {})", meta::kind(before), meta::kind(after)));
    }
    for (what, path) in [("name", "metadata.name"), ("namespace", "metadata.namespace"), ("UID", "metadata.uid")] {
        let (had, has) = (meta::text(before, path), meta::text(after, path));
        if had != has {
            return Err(format!("must have the same {what}: {had} != {has}"));
        }
    }
    Ok(())
}

/// Of metadata only labels and annotations are the webhook's to change.
fn restore_metadata(before: &Value, after: &mut Value) -> Result<(), String> {
    let answered = after.get("metadata").cloned().ok_or("missing metadata in converted object")?;
    if !answered.is_object() {
        return Err("invalid metadata in converted object".into());
    }
    after["metadata"] = before["metadata"].clone();
    for field in ["labels", "annotations"] {
        let Some(values) = answered.get(field).filter(|values| !values.is_null()) else {
            meta::remove(&mut after["metadata"], field);
            continue;
        };
        let entries = values.as_object().ok_or_else(|| format!("invalid metadata.{field} in converted object"))?;
        if let Some((key, _)) = entries.iter().find(|(_, value)| !value.is_string()) {
            return Err(format!("metadata.{field}[{key}] must be a string in converted object"));
        }
        after["metadata"][field] = values.clone();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_checked() {
        let answer = |response: Value| json!({"kind": "ConversionReview", "apiVersion": "apiextensions.k8s.io/v1", "response": response});
        let good = answer(json!({"uid": "u", "result": {"status": "Success"}, "convertedObjects": [{"a": 1}]}));
        assert_eq!(answered("v1", "u", &good), Ok(vec![json!({"a": 1})]));
        assert_eq!(answered("v1", "w", &good), Err("expected response.uid=\"w\", got \"u\"".into()));
        let refused = answer(json!({"uid": "u", "result": {"status": "Failed", "message": "cannot"}}));
        assert_eq!(answered("v1", "u", &refused), Err("cannot".into()));
        assert!(answered("v1", "u", &json!({"response": {}})).unwrap_err().starts_with("expected webhook response"));
    }

    #[test]
    fn only_labels_and_annotations_come_from_the_webhook() {
        let before =
            json!({"kind": "A", "apiVersion": "x/v1", "metadata": {"name": "a", "uid": "1", "labels": {"k": "v"}, "generation": 2}});
        let mut after =
            json!({"kind": "A", "apiVersion": "x/v2", "metadata": {"name": "a", "uid": "1", "annotations": {"n": "m"}, "generation": 9}});
        assert_eq!(check("x/v2", &before, &after), Ok(()));
        restore_metadata(&before, &mut after).unwrap();
        assert_eq!(after["metadata"], json!({"name": "a", "uid": "1", "generation": 2, "annotations": {"n": "m"}}));
        after["metadata"]["name"] = "b".into();
        assert_eq!(check("x/v2", &before, &after), Err("must have the same name: a != b".into()));
        assert_eq!(check("x/v3", &before, &after), Err("invalid groupVersion (expected x/v3, received x/v2)".into()));
    }
}
