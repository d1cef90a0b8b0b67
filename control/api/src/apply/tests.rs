//! Ownership, conflicts and pruning, of a built-in kind and of a custom one.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::Tracker;
use super::managers;
use crate::resource::{Catalog, Resource};
use crate::status::Status;

const NOW: Timestamp = Timestamp::UNIX_EPOCH;

fn deployments() -> &'static Resource {
    crate::builtin::by_kind("apps", "v1", "Deployment").expect("built in")
}

fn tracker<'a>(catalog: &'a Catalog, resource: &'a Resource, manager: &'a str) -> Tracker<'a> {
    Tracker { catalog, resource, subresource: "", manager, now: NOW }
}

fn apply(manager: &str, live: Option<&Value>, config: &Value, force: bool) -> Result<Value, Status> {
    tracker(&Catalog::builtin(), deployments(), manager).apply(live, config, force)
}

fn update(manager: &str, live: Option<&Value>, new: &Value) -> Value {
    let mut new = new.clone();
    tracker(&Catalog::builtin(), deployments(), manager).update(live, &mut new);
    new
}

fn deployment(spec: Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "labels": {"a": "1"}}, "spec": spec})
}

/// manager, operation and fields of each entry.
fn owners(object: &Value) -> Vec<(String, String, Value)> {
    let entries = object["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    entries
        .iter()
        .map(|e| {
            (e["manager"].as_str().unwrap_or_default().into(), e["operation"].as_str().unwrap_or_default().into(), e["fieldsV1"].clone())
        })
        .collect()
}

#[test]
fn applied_fields_are_owned_by_key() {
    let config = deployment(
        json!({"replicas": 1, "template": {"spec": {"containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 80}]}]}}}),
    );
    let object = apply("me", None, &config, false).expect("applies");
    let expected = json!({
        "f:metadata": {"f:labels": {"f:a": {}}},
        "f:spec": {"f:replicas": {}, "f:template": {"f:spec": {"f:containers": {"k:{\"name\":\"c\"}": {
            ".": {}, "f:image": {}, "f:name": {}, "f:ports": {"k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}}}}}},
    });
    assert_eq!(owners(&object), [("me".into(), "Apply".into(), expected)]);
    assert_eq!(object["spec"]["replicas"], 1);
}

#[test]
fn conflicts_name_their_owner() {
    let live = apply("one", None, &deployment(json!({"replicas": 1, "paused": true})), false).expect("applies");
    let config = deployment(json!({"replicas": 2, "paused": false}));
    let refused = apply("two", Some(&live), &config, false).expect_err("conflicts");
    assert_eq!((refused.code, &*refused.reason), (409, "Conflict"));
    assert_eq!(refused.message, "Apply failed with 2 conflicts: conflicts with \"one\":\n- .spec.paused\n- .spec.replicas");
    let cause = &refused.details.as_ref().expect("details")["causes"][1];
    assert_eq!(*cause, json!({"reason": "FieldManagerConflict", "message": "conflict with \"one\"", "field": ".spec.replicas"}));
    let forced = apply("two", Some(&live), &config, true).expect("forced");
    assert_eq!(forced["spec"]["replicas"], 2);
    assert_eq!(owners(&forced)[0].2, json!({"f:metadata": {"f:labels": {"f:a": {}}}}), "one keeps what is shared");
    let updated = update("three", Some(&live), &deployment(json!({"replicas": 5, "paused": true})));
    let refused = apply("one", Some(&updated), &deployment(json!({"replicas": 1})), false).expect_err("conflicts");
    assert_eq!(refused.message, "Apply failed with 1 conflict: conflict with \"three\" using apps/v1: .spec.replicas");
}

#[test]
fn what_is_no_longer_applied_goes_unless_shared() {
    let both = json!({"replicas": 1, "template": {"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "2"}]}}});
    let live = apply("one", None, &deployment(both), false).expect("applies");
    let only_a = json!({"template": {"spec": {"containers": [{"name": "a", "image": "1"}]}}});
    let shared = apply("two", Some(&live), &deployment(json!({"replicas": 1})), false).expect("applies");
    let object = apply("one", Some(&shared), &deployment(only_a.clone()), false).expect("applies");
    assert_eq!((&object["spec"]["replicas"], &object["spec"]["template"]["spec"]), (&json!(1), &only_a["template"]["spec"]));
    let object = apply("one", Some(&live), &deployment(only_a), false).expect("applies");
    assert_eq!(object["spec"].get("replicas"), None);
}

#[test]
fn updates_own_what_they_change() {
    let created = update("creator", None, &deployment(json!({"replicas": 1, "paused": true})));
    assert_eq!(created["metadata"]["managedFields"][0]["time"], "1970-01-01T00:00:00Z");
    let mut new = created.clone();
    new["spec"]["replicas"] = 2.into();
    let updated = update("scaler", Some(&created), &new);
    assert_eq!(
        owners(&updated),
        [
            ("creator".into(), "Update".into(), json!({"f:metadata": {"f:labels": {".": {}, "f:a": {}}}, "f:spec": {"f:paused": {}}})),
            ("scaler".into(), "Update".into(), json!({"f:spec": {"f:replicas": {}}})),
        ]
    );
    assert_eq!(update("other", Some(&updated), &updated)["metadata"], updated["metadata"]);
    let mut untracked = deployment(json!({"replicas": 3}));
    assert_eq!(owners(&update("x", Some(&untracked.clone()), &untracked)), []);
    untracked["spec"]["replicas"] = 3.into();
    let applied = apply("me", Some(&untracked), &deployment(json!({"replicas": 3})), false).expect("applies");
    let names: Vec<String> = owners(&applied).into_iter().map(|(name, ..)| name).collect();
    assert_eq!(names, ["me", "before-first-apply"]);
}

#[test]
fn client_side_apply_is_taken_over() {
    let mut live = deployment(json!({"replicas": 1}));
    live["metadata"]["annotations"] = json!({"kubectl.kubernetes.io/last-applied-configuration": live.to_string()});
    let live = update("kubectl-client-side-apply", None, &live);
    let config = deployment(json!({"replicas": 2}));
    assert!(apply("other", Some(&live), &config, false).is_err());
    let applied = apply("kubectl", Some(&live), &config, false).expect("takes over");
    assert_eq!(applied["spec"]["replicas"], 2);
    let renewed = applied["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"].as_str().expect("kept");
    assert!(renewed.contains("\"replicas\":2"), "{renewed}");
}

#[test]
fn unknown_fields_and_foreign_versions_are_refused() {
    for (config, code, part) in [
        (
            deployment(json!({"foo": 1})),
            500,
            "failed to create typed patch object (/d; apps/v1, Kind=Deployment): .spec.foo: field not declared in schema",
        ),
        (json!({"apiVersion": "apps/v1beta1", "kind": "Deployment"}), 400, "Incorrect version specified in apply patch."),
        (
            deployment(json!({"template": {"spec": {"containers": [{"name": "a"}, {"name": "a"}]}}})),
            500,
            ".spec.template.spec.containers: duplicate entries for key [name=\"a\"]",
        ),
    ] {
        let refused = apply("me", None, &config, false).expect_err("refused");
        assert_eq!(refused.code, code);
        assert!(refused.message.contains(part), "{}", refused.message);
    }
}

#[test]
fn custom_resources_merge_by_their_schema() {
    let definition = json!({"metadata": {"name": "foos.x.io"}, "spec": {"group": "x.io", "scope": "Namespaced",
        "names": {"plural": "foos", "singular": "foo", "kind": "Foo", "listKind": "FooList"},
        "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "set": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
            "all": {"type": "array", "items": {"type": "string"}},
            "one": {"type": "object", "x-kubernetes-map-type": "atomic", "additionalProperties": {"type": "string"}},
            "ports": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["port"],
                "items": {"type": "object", "properties": {"port": {"type": "integer"}, "name": {"type": "string"}}}}}}}}}}]}});
    let resources = crate::custom::resources(&definition);
    let catalog = Catalog::builtin();
    let foo = |spec: Value| json!({"apiVersion": "x.io/v1", "kind": "Foo", "metadata": {"name": "f"}, "spec": spec});
    let apply = |manager: &str, live: Option<&Value>, spec: Value| {
        tracker(&catalog, &resources[0], manager).apply(live, &foo(spec), true).expect("applies")
    };
    let live = apply("one", None, json!({"set": ["a", "b"], "all": ["a"], "one": {"a": "1"}, "ports": [{"port": 1, "name": "x"}]}));
    let merged = apply("two", Some(&live), json!({"set": ["c"], "all": ["b"], "one": {"b": "2"}, "ports": [{"port": 2}]}));
    assert_eq!(
        merged["spec"],
        json!({"set": ["a", "b", "c"], "all": ["b"], "one": {"b": "2"}, "ports": [{"port": 1, "name": "x"}, {"port": 2}]})
    );
    let expected =
        json!({"f:spec": {"f:all": {}, "f:one": {}, "f:ports": {"k:{\"port\":2}": {".": {}, "f:port": {}}}, "f:set": {"v:\"c\"": {}}}});
    assert_eq!(owners(&merged)[1].2, expected);
    let less = apply("one", Some(&merged), json!({"set": ["b"]}));
    assert_eq!(less["spec"], json!({"set": ["b", "c"], "all": ["b"], "one": {"b": "2"}, "ports": [{"port": 2}]}));
}

#[test]
fn old_updaters_are_put_together_and_times_alone_change_nothing() {
    let mut object = update("m0", None, &deployment(json!({})));
    for number in 1..=12 {
        let mut new = object.clone();
        new["metadata"]["labels"][format!("l{number}")] = "x".into();
        object = update(&format!("m{number:02}"), Some(&object), &new);
    }
    let names: Vec<String> = owners(&object).into_iter().map(|(name, ..)| name).collect();
    assert_eq!((names.len(), names[0].as_str()), (10, "ancient-changes"));
    let mut later = object.clone();
    later["metadata"]["managedFields"][3]["time"] = "2030-01-01T00:00:00Z".into();
    managers::keep_times(&mut later, &object);
    assert_eq!(later, object);
}

#[test]
fn an_overlay_merges_by_key_and_refuses_atomics() {
    let deployments = crate::builtin::by_kind("apps", "v1", "Deployment").expect("built in");
    let live = deployment(json!({}));
    let mut config = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"annotations": {"by": "policy"}}});
    let merged = super::overlay(deployments, &live, &config).expect("merges");
    assert_eq!(merged["metadata"]["annotations"], json!({"by": "policy"}));
    assert_eq!(merged["spec"], live["spec"]);
    config["spec"] = json!({"template": {"spec": {"containers": [{"name": "side", "image": "i", "args": ["x"]}]}}});
    let refused = super::overlay(deployments, &live, &config).unwrap_err();
    assert_eq!(
        refused,
        "invalid ApplyConfiguration: may not mutate atomic arrays, maps or structs: .spec.template.spec.containers[0].args"
    );
    config["spec"]["template"]["spec"]["containers"][0]["args"].take();
    let sidecar = super::overlay(deployments, &live, &config).map(|merged| merged["spec"]["template"]["spec"]["containers"].clone());
    assert!(sidecar.is_ok_and(|containers| containers.as_array().is_some_and(|list| list.iter().any(|c| c["name"] == "side"))));
}
