//! The bundled policy: that it reads, is whole, and does what its roles are for.

use super::*;
use crate::attributes::{Attributes, Authorizer};
use crate::rbac::RbacIndex;
use crate::user::UserInfo;

fn index() -> RbacIndex {
    let index = RbacIndex::new();
    for object in objects() {
        index.apply(object.resource, object.object.to_string().as_bytes()).unwrap();
    }
    index
}

#[test]
fn policy_is_whole() {
    let objects = objects();
    let count = |resource: &str| objects.iter().filter(|object| object.resource == resource).count();
    let counts = ["clusterroles", "clusterrolebindings", "roles", "rolebindings"].map(count);
    assert_eq!(counts, [68, 49, 7, 7], "as many as in Kubernetes v1.35");
    for binding in objects.iter().filter(|object| object.resource.ends_with("bindings")) {
        let (kind, name) = (&binding.object["roleRef"]["kind"], &binding.object["roleRef"]["name"]);
        let namespace = if kind == "Role" { binding.namespace.as_str() } else { "" };
        let found = objects
            .iter()
            .any(|role| role.object["kind"] == *kind && role.object["metadata"]["name"] == *name && role.namespace == namespace);
        assert!(found, "{} refers to {kind} {name}", binding.name);
    }
}

#[test]
fn well_known_users_may_what_they_need() {
    let index = index();
    let group = |group: &str| UserInfo::new("someone", [group]);
    let account = |name: &str| UserInfo::new(format!("system:serviceaccount:kube-system:{name}"), ["system:serviceaccounts"]);
    let cases = [
        (UserInfo::new("system:kube-scheduler", [""; 0]), "create", "", "pods/binding", true),
        (UserInfo::new("system:kube-scheduler", [""; 0]), "delete", "", "nodes", false),
        (UserInfo::new("system:kube-controller-manager", [""; 0]), "create", "", "serviceaccounts/token", true),
        (account("deployment-controller"), "create", "apps", "replicasets", true),
        (account("namespace-controller"), "delete", "example.com", "widgets", true),
        (account("default"), "list", "", "pods", false),
        (group("system:authenticated"), "create", "authorization.k8s.io", "selfsubjectaccessreviews", true),
        (group("system:unauthenticated"), "create", "authorization.k8s.io", "selfsubjectaccessreviews", false),
    ];
    for (user, verb, api_group, resource, allowed) in cases {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let attributes = Attributes { subresource, namespace: "ns", ..Attributes::resource(&user, verb, api_group, resource) };
        assert_eq!(index.authorize(&attributes).allowed(), allowed, "{user:?} {verb} {resource}");
    }
    for (group_name, path, allowed) in [
        ("system:unauthenticated", "/healthz", true),
        ("system:unauthenticated", "/version", true),
        ("system:unauthenticated", "/openapi/v3", false),
        ("system:authenticated", "/openapi/v3", true),
        ("system:authenticated", "/apis/apps/v1", true),
        ("system:authenticated", "/metrics", false),
        ("system:monitoring", "/metrics", true),
    ] {
        let user = group(group_name);
        assert_eq!(index.authorize(&Attributes::path(&user, "get", path)).allowed(), allowed, "{group_name} {path}");
    }
}

#[test]
fn aggregated_roles_are_filled_from_the_start() {
    let index = index();
    assert_eq!(index.stale_aggregations(), []);
    let objects = objects();
    let rules = |name: &str| rules_of(&objects.iter().find(|object| object.name == name).unwrap().object);
    // admin has all of edit, edit all of view.
    assert_eq!(covers(&rules("admin"), &rules("edit")), Ok(()));
    assert_eq!(covers(&rules("edit"), &rules("view")), Ok(()));
    assert!(covers(&rules("view"), &rules("edit")).is_err());
}

#[test]
fn malformed_policy_is_told_by_line() {
    for text in ["  get core pods", "nonsense x", "clusterrole a\n  get", "clusterbinding a b\n  Robot x"] {
        assert!(parse(text).is_err(), "{text}");
    }
}

fn wanted() -> BootstrapObject {
    objects().into_iter().find(|object| object.name == "system:auth-delegator" && object.resource == "clusterroles").unwrap()
}

#[test]
fn reconciling_adds_what_is_missing_and_keeps_the_rest() {
    let wanted = wanted();
    let mut stored = wanted.object.clone();
    stored["metadata"]["uid"] = "u".into();
    assert_eq!(reconcile(&mut stored, &wanted), Reconciled::Unchanged);

    let own = json!({ "verbs": ["get"], "apiGroups": [""], "resources": ["pods"] });
    stored["rules"] = json!([own]);
    stored["metadata"].as_object_mut().unwrap().shift_remove("labels");
    assert_eq!(reconcile(&mut stored, &wanted), Reconciled::Changed);
    assert_eq!(stored["rules"][0], own);
    assert_eq!(stored["rules"].as_array().unwrap().len(), 3);
    assert_eq!(stored["metadata"]["labels"], wanted.object["metadata"]["labels"]);
    assert_eq!(reconcile(&mut stored, &wanted), Reconciled::Unchanged);

    stored["rules"] = json!([]);
    stored["metadata"]["annotations"][AUTOUPDATE] = "false".into();
    assert_eq!(reconcile(&mut stored, &wanted), Reconciled::Unchanged);
}

#[test]
fn reconciling_bindings() {
    let wanted =
        objects().into_iter().find(|object| object.name == "system:basic-user" && object.resource == "clusterrolebindings").unwrap();
    let mut stored = wanted.object.clone();
    stored["subjects"][0]["apiGroup"] = "".into();
    assert_eq!(reconcile(&mut stored, &wanted), Reconciled::Unchanged);
    stored["subjects"] = json!([{ "kind": "User", "name": "me" }]);
    assert_eq!(reconcile(&mut stored, &wanted), Reconciled::Changed);
    assert_eq!(stored["subjects"].as_array().unwrap().len(), 2);
    stored["roleRef"]["name"] = "other".into();
    assert_eq!(reconcile(&mut stored, &wanted), Reconciled::Recreate);
}
