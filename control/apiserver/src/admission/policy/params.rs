//! The parameters that a binding names.

use outrigger_api::meta;
use outrigger_api::resource::split_api_version;
use outrigger_api::selector::LabelSelector;
use serde_json::Value;

use crate::admission::Attributes;
use crate::engine::Engine;
use crate::registry::versions;

/// The objects to evaluate a policy with: one without parameters if it has none, none if they may be missing.
pub async fn collect(
    engine: &Engine,
    attributes: &Attributes<'_>,
    kind: Option<&(String, String)>,
    reference: &Value,
) -> Result<Vec<Option<Value>>, String> {
    let (Some((api_version, kind)), true) = (kind, reference.is_object()) else { return Ok(vec![None]) };
    let (group, version) = split_api_version(api_version);
    let known = engine.catalog().by_kind(group, version, kind).cloned();
    let resource = known.ok_or_else(|| format!("paramKind kind `{api_version}, Kind={kind}` not known"))?;
    let said = meta::text(reference, "namespace");
    let namespace = match (resource.namespaced, said) {
        (false, "") => None,
        (false, _) => return Err("paramRef.namespace must not be provided for a cluster-scoped `paramKind`".into()),
        (true, "") if attributes.namespace.is_empty() => {
            return Err("cannot use namespaced paramRef in policy binding that matches cluster-scoped resources".into());
        }
        (true, "") => Some(attributes.namespace),
        (true, said) => Some(said),
    };
    let name = meta::text(reference, "name");
    let key = resource.key(namespace, (!name.is_empty()).then_some(name));
    let Some((prefix, within)) = crate::cache::split_key(&key) else { return Ok(Vec::new()) };
    let cache = engine.hub.cache(prefix);
    let entries = if name.is_empty() {
        let selector = LabelSelector::from_object(&reference["selector"])?;
        let mut entries = cache.range(within, None).entries;
        entries.retain(|entry| selector.matches(&entry.labels));
        entries
    } else {
        cache.get(within).into_iter().collect()
    };
    if entries.is_empty() && meta::text(reference, "parameterNotFoundAction") == "Deny" {
        return Err("no params found for policy binding with `Deny` parameterNotFoundAction".into());
    }
    let objects = versions::objects(engine, &resource, entries.iter().map(|entry| &**entry)).await.map_err(|status| status.message)?;
    Ok(objects.into_iter().map(Some).collect())
}
