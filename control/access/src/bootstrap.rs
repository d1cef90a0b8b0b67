//! The roles and bindings that every cluster has from the start.
//!
//! They are data, in `bootstrap.txt`; this file reads it, and brings stored objects back in line.

use k8s_openapi::api::rbac::v1::PolicyRule;
use serde_json::{Map, Value, json};

use crate::rules::covers;

const POLICY: &str = include_str!("bootstrap.txt");
const GROUP: &str = "rbac.authorization.k8s.io";
const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";

/// One object to create at start, and to bring back in line at later starts.
#[derive(Debug, Clone, PartialEq)]
pub struct BootstrapObject {
    /// `clusterroles`, `clusterrolebindings`, `roles` or `rolebindings`.
    pub resource: &'static str,
    /// Empty for cluster-scoped ones.
    pub namespace: String,
    pub name: String,
    /// The whole object, apiVersion and kind included.
    pub object: Value,
}

/// All of them, in an order in which they can be created: roles before bindings, and the aggregated roles with their rules filled in.
pub fn objects() -> Vec<BootstrapObject> {
    let mut objects = parse(POLICY).expect("the bundled policy is well-formed, which a test checks");
    fill_aggregated(&mut objects);
    objects
}

/// The rules of one of the ClusterRoles.
pub(crate) fn cluster_role_rules(name: &str) -> Vec<PolicyRule> {
    let objects = parse(POLICY).expect("the bundled policy is well-formed, which a test checks");
    let role = objects.into_iter().find(|object| object.resource == "clusterroles" && object.name == name);
    role.map(|role| rules_of(&role.object)).unwrap_or_default()
}

fn rules_of(role: &Value) -> Vec<PolicyRule> {
    role.get("rules").and_then(|rules| serde_json::from_value(rules.clone()).ok()).unwrap_or_default()
}

fn parse(text: &'static str) -> Result<Vec<BootstrapObject>, String> {
    let mut objects: Vec<BootstrapObject> = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let understood = match (line.starts_with(' '), objects.last_mut()) {
            (false, _) => header(&words).map(|object| objects.push(object)),
            (true, Some(object)) => detail(object, &words),
            (true, None) => None,
        };
        understood.ok_or_else(|| format!("line {}: {line:?}", number + 1))?;
    }
    Ok(objects)
}

fn header(words: &[&'static str]) -> Option<BootstrapObject> {
    match *words {
        ["clusterrole", name, ref labels @ ..] => {
            let mut role = object("clusterroles", "ClusterRole", "", name, json!({ "rules": [] }));
            for label in labels {
                let (key, value) = label.split_once('=')?;
                role.object["metadata"]["labels"][key] = value.into();
            }
            Some(role)
        }
        ["role", namespace, name] => Some(object("roles", "Role", namespace, name, json!({ "rules": [] }))),
        ["clusterbinding", name, role] => {
            Some(object("clusterrolebindings", "ClusterRoleBinding", "", name, role_reference("ClusterRole", role)))
        }
        ["binding", namespace, name, kind, role] => {
            Some(object("rolebindings", "RoleBinding", namespace, name, role_reference(kind, role)))
        }
        _ => None,
    }
}

fn role_reference(kind: &str, name: &str) -> Value {
    json!({ "roleRef": { "apiGroup": GROUP, "kind": kind, "name": name } })
}

fn object(resource: &'static str, kind: &str, namespace: &str, name: &str, rest: Value) -> BootstrapObject {
    let mut object = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": {
            "name": name,
            "labels": { "kubernetes.io/bootstrapping": "rbac-defaults" },
            "annotations": { AUTOUPDATE: "true" },
        },
    });
    if !namespace.is_empty() {
        object["metadata"]["namespace"] = namespace.into();
    }
    if let (Value::Object(object), Value::Object(rest)) = (&mut object, rest) {
        object.extend(rest);
    }
    BootstrapObject { resource, namespace: namespace.to_owned(), name: name.to_owned(), object }
}

fn detail(object: &mut BootstrapObject, words: &[&str]) -> Option<()> {
    let is_binding = object.resource.ends_with("bindings");
    let (list, entry) = match *words {
        [kind, name] if is_binding => ("subjects", subject(kind, name)?),
        ["aggregate", label] => {
            let (key, value) = label.split_once('=')?;
            object.object["aggregationRule"] = json!({ "clusterRoleSelectors": [{ "matchLabels": { key: value } }] });
            return Some(());
        }
        [verbs, path, ..] if path.starts_with('/') || words.len() == 2 => {
            ("rules", json!({ "verbs": values(verbs), "nonResourceURLs": words[1..] }))
        }
        [verbs, groups, resources, ref names @ ..] => {
            let mut rule = json!({ "verbs": values(verbs), "apiGroups": values(groups), "resources": values(resources) });
            if let [names] = names {
                rule["resourceNames"] = values(names);
            }
            ("rules", rule)
        }
        _ => return None,
    };
    match &mut object.object[list] {
        Value::Array(entries) => entries.push(entry),
        missing => *missing = Value::Array(vec![entry]),
    }
    Some(())
}

fn values(text: &str) -> Value {
    text.split(',').map(|value| if value == "core" { "" } else { value }).collect()
}

fn subject(kind: &str, name: &str) -> Option<Value> {
    match kind {
        "ServiceAccount" => {
            let (namespace, name) = name.split_once('/')?;
            Some(json!({ "kind": kind, "name": name, "namespace": namespace }))
        }
        "User" | "Group" => Some(json!({ "apiGroup": GROUP, "kind": kind, "name": name })),
        _ => None,
    }
}

/// What the aggregation controller would do in two rounds, so that nobody meets an empty `edit` right after the start.
fn fill_aggregated(objects: &mut [BootstrapObject]) {
    let index = crate::rbac::RbacIndex::new();
    for object in objects.iter().filter(|object| object.resource == "clusterroles") {
        apply(&index, &object.object);
    }
    loop {
        let stale = index.stale_aggregations();
        if stale.is_empty() {
            return;
        }
        for (name, rules) in stale {
            if let Some(role) = objects.iter_mut().find(|object| object.resource == "clusterroles" && object.name == name) {
                role.object["rules"] = json!(rules);
                apply(&index, &role.object);
            }
        }
    }
}

fn apply(index: &crate::rbac::RbacIndex, role: &Value) {
    index.apply("clusterroles", role.to_string().as_bytes()).expect("the bundled roles are of the schema, which a test checks");
}

/// What to do with a stored object, to have at least what the bootstrap one has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reconciled {
    Unchanged,
    /// `stored` was completed: write it.
    Changed,
    /// A binding refers to another role, which can't be changed in place: delete the stored one and create the bootstrap one.
    Recreate,
}

/// Adds to a stored object what it lacks of the bootstrap one (labels, rules, selectors, subjects), unless its annotation
/// `rbac.authorization.kubernetes.io/autoupdate` is `false`.
pub fn reconcile(stored: &mut Value, wanted: &BootstrapObject) -> Reconciled {
    if stored.pointer("/metadata/annotations").and_then(|annotations| annotations.get(AUTOUPDATE)) == Some(&Value::from("false")) {
        return Reconciled::Unchanged;
    }
    let before = stored.clone();
    for field in ["labels", "annotations"] {
        add_missing_keys(&mut stored["metadata"][field], &wanted.object["metadata"][field]);
    }
    if wanted.resource.ends_with("bindings") {
        if stored["roleRef"] != wanted.object["roleRef"] {
            return Reconciled::Recreate;
        }
        // Not by the API group, which defaulting may have filled in.
        let identity = |subject: &Value| ["kind", "namespace", "name"].map(|field| subject[field].as_str().unwrap_or_default().to_owned());
        add_missing(&mut stored["subjects"], &wanted.object["subjects"], |one, other| identity(one) == identity(other));
    } else {
        reconcile_role(stored, &wanted.object);
    }
    // Indexing made empty fields where there were none.
    drop_nulls(stored);
    let mut comparable = before;
    drop_nulls(&mut comparable);
    if *stored == comparable { Reconciled::Unchanged } else { Reconciled::Changed }
}

fn reconcile_role(stored: &mut Value, wanted: &Value) {
    match wanted.get("aggregationRule") {
        Some(rule) => add_missing_entries(&mut stored["aggregationRule"]["clusterRoleSelectors"], &rule["clusterRoleSelectors"]),
        None => {
            if let Value::Object(fields) = &mut *stored {
                fields.shift_remove("aggregationRule");
            }
            if let Err(missing) = covers(&rules_of(stored), &rules_of(wanted)) {
                add_missing_entries(&mut stored["rules"], &json!(missing));
            }
        }
    }
}

fn add_missing_keys(stored: &mut Value, wanted: &Value) {
    let Some(wanted) = wanted.as_object() else { return };
    if stored.is_null() {
        *stored = Value::Object(Map::new());
    }
    if let Value::Object(stored) = stored {
        for (key, value) in wanted {
            stored.entry(key.as_str()).or_insert_with(|| value.clone());
        }
    }
}

fn add_missing_entries(stored: &mut Value, wanted: &Value) {
    add_missing(stored, wanted, |one, other| one == other);
}

fn add_missing(stored: &mut Value, wanted: &Value, same: impl Fn(&Value, &Value) -> bool) {
    let Some(wanted) = wanted.as_array() else { return };
    if stored.is_null() {
        *stored = Value::Array(Vec::new());
    }
    if let Value::Array(stored) = stored {
        for entry in wanted {
            if !stored.iter().any(|one| same(one, entry)) {
                stored.push(entry.clone());
            }
        }
    }
}

fn drop_nulls(object: &mut Value) {
    if let Value::Object(fields) = object {
        fields.retain(|_, value| !value.is_null());
        if let Some(Value::Object(metadata)) = fields.get_mut("metadata") {
            metadata.retain(|_, value| !value.is_null());
        }
    }
}

#[cfg(test)]
#[path = "bootstrap_tests.rs"]
mod tests;
