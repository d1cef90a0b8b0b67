//! CustomResourceDefinitions made into resources.
use std::sync::Arc;

use serde_json::Value;

use crate::meta;
use crate::resource::{CustomFacts, GroupVersionKind, NameRule, PrinterColumn, Resource, ScalePaths, Strategy, Subresource, Text};

const ALL_VERBS: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
const EDIT_VERBS: [&str; 3] = ["get", "patch", "update"];

/// One resource per served version of a definition (v1, defaulted). The storage version is the one with `storage: true`. Names are the
/// accepted ones where the status has them.
pub fn resources(definition: &Value) -> Vec<Arc<Resource>> {
    let versions = meta::items(definition, "spec.versions");
    let Some(storage) = versions.iter().find(|version| version["storage"] == true) else { return Vec::new() };
    let served = versions.iter().filter(|version| version["served"] == true);
    served.map(|version| Arc::new(resource(definition, version, meta::text(storage, "name")))).collect()
}

fn owned(object: &Value, path: &str) -> Text {
    meta::text(object, path).to_string().into()
}

fn words(object: &Value, path: &str) -> Vec<Text> {
    meta::items(object, path).iter().filter_map(Value::as_str).map(|word| word.to_string().into()).collect()
}

fn resource(definition: &Value, version: &Value, storage_version: &str) -> Resource {
    let names = match meta::get(definition, "status.acceptedNames") {
        accepted if !meta::text(accepted, "plural").is_empty() && !meta::text(accepted, "kind").is_empty() => accepted,
        _ => meta::get(definition, "spec.names"),
    };
    let group = owned(definition, "spec.group");
    let kind = owned(names, "kind");
    let plural = owned(names, "plural");
    let has_status = version["subresources"]["status"].is_object();
    let body = |kind: &Text| GroupVersionKind { group: group.clone(), version: owned(version, "name"), kind: kind.clone() };
    let mut subresources = Vec::new();
    if version["subresources"]["scale"].is_object() {
        let scale = GroupVersionKind { group: "autoscaling".into(), version: "v1".into(), kind: "Scale".into() };
        subresources.push(Subresource { name: "scale".into(), body: scale, verbs: EDIT_VERBS.to_vec() });
    }
    if has_status {
        subresources.push(Subresource { name: "status".into(), body: body(&kind), verbs: EDIT_VERBS.to_vec() });
    }
    let field_labels =
        meta::items(version, "selectableFields").iter().map(|field| owned(field, "jsonPath").trim_start_matches('.').to_string().into());
    Resource {
        version: owned(version, "name"),
        list_kind: owned(names, "listKind"),
        singular: owned(names, "singular"),
        short_names: words(names, "shortNames"),
        categories: words(names, "categories"),
        namespaced: meta::text(definition, "spec.scope") == "Namespaced",
        verbs: ALL_VERBS.to_vec(),
        subresources,
        storage: GroupVersionKind { group: group.clone(), version: storage_version.to_string().into(), kind: kind.clone() },
        storage_prefix: format!("{group}/{plural}").into(),
        warning: warning(definition, version),
        strategy: Strategy {
            has_status,
            has_generation: true,
            create_on_update: false,
            unconditional_update: false,
            graceful_deletion: false,
            orphan_by_default: false,
            create_only: false,
            name_rule: NameRule::Subdomain,
        },
        field_labels: field_labels.collect(),
        custom: Some(facts(definition, version)),
        group,
        kind,
        plural,
    }
}

fn warning(definition: &Value, version: &Value) -> Option<Text> {
    if version["deprecated"] != true {
        return None;
    }
    let given = version["deprecationWarning"].as_str().map(|text| text.to_string().into());
    let api =
        format!("{}/{} {}", meta::text(definition, "spec.group"), meta::text(version, "name"), meta::text(definition, "spec.names.kind"));
    given.or_else(|| Some(format!("{api} is deprecated").into()))
}

fn facts(definition: &Value, version: &Value) -> CustomFacts {
    let text = |value: &Value, key: &str| meta::text(value, key).to_string();
    let column = |column: &Value| PrinterColumn {
        name: text(column, "name"),
        kind: text(column, "type"),
        format: text(column, "format"),
        description: text(column, "description"),
        priority: column["priority"].as_i64().and_then(|number| i32::try_from(number).ok()).unwrap_or_default(),
        json_path: text(column, "jsonPath"),
    };
    let scale = meta::get(version, "subresources.scale");
    CustomFacts {
        definition: meta::name(definition).to_string(),
        since: meta::resource_version(definition).parse().unwrap_or_default(),
        schema: Some(version["schema"]["openAPIV3Schema"].clone()).filter(|schema| !schema.is_null()),
        preserve_unknown_fields: meta::get(definition, "spec.preserveUnknownFields") == true,
        columns: meta::items(version, "additionalPrinterColumns").iter().map(column).collect(),
        selectable_fields: meta::items(version, "selectableFields").iter().map(|field| text(field, "jsonPath")).collect(),
        scale: scale.is_object().then(|| ScalePaths {
            spec_replicas: text(scale, "specReplicasPath"),
            status_replicas: text(scale, "statusReplicasPath"),
            label_selector: scale["labelSelectorPath"].as_str().map(String::from),
        }),
        conversion: Some(meta::get(definition, "spec.conversion").clone()).filter(|conversion| !conversion.is_null()),
        several_versions: meta::items(definition, "spec.versions").len() > 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn definitions_become_resources() {
        let definition = json!({"metadata": {"name": "foos.x.io"}, "spec": {"group": "x.io", "scope": "Namespaced",
            "names": {"plural": "foos", "singular": "foo", "kind": "Foo", "listKind": "FooList", "shortNames": ["f"]},
            "versions": [
                {"name": "v1", "served": true, "storage": true, "subresources": {"status": {}, "scale": {"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas"}},
                    "schema": {"openAPIV3Schema": {"type": "object"}}, "additionalPrinterColumns": [{"name": "N", "type": "integer", "jsonPath": ".spec.n"}]},
                {"name": "v1beta1", "served": true, "storage": false, "deprecated": true},
                {"name": "v1alpha1", "served": false, "storage": false}]}});
        let found = resources(&definition);
        assert_eq!(found.iter().map(|resource| resource.version.to_string()).collect::<Vec<_>>(), ["v1", "v1beta1"]);
        assert_eq!(found[0].key(Some("n"), Some("a")), "x.io/foos/n/a");
        assert!(found[0].subresource("scale").is_some() && found[0].strategy.has_status && !found[1].strategy.has_status);
        assert_eq!(found[1].storage.version, "v1");
        assert_eq!(found[1].warning.as_deref(), Some("x.io/v1beta1 Foo is deprecated"));
        let mut catalog = crate::Catalog::builtin();
        for resource in found {
            catalog.insert(resource);
        }
        assert_eq!(catalog.preferred("x.io", "foos").map(|resource| resource.version.to_string()), Some("v1".into()));
        catalog.remove_custom("x.io", "foos");
        assert!(catalog.preferred("x.io", "foos").is_none());
    }
}
