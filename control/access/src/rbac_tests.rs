//! RBAC by tables: policy in, verdict out.

use serde_json::json;

use super::*;
use crate::attributes::Union;

fn rule(verbs: &str, groups: &str, resources: &str, names: &str) -> Value {
    let list = |text: &str| text.split(',').map(|value| if value == "core" { "" } else { value }).map(str::to_owned).collect::<Vec<_>>();
    let mut rule = json!({ "verbs": list(verbs), "apiGroups": list(groups), "resources": list(resources) });
    if !names.is_empty() {
        rule["resourceNames"] = json!(list(names));
    }
    rule
}

fn typed(rule: Value) -> PolicyRule {
    serde_json::from_value(rule).unwrap()
}

fn paths(verb: &str, paths: &[&str]) -> Value {
    json!({ "verbs": [verb], "nonResourceURLs": paths })
}

fn add(index: &RbacIndex, resource: &str, object: Value) {
    index.apply(resource, object.to_string().as_bytes()).unwrap();
}

fn bind(index: &RbacIndex, namespace: &str, name: &str, role: (&str, &str), subject: Value) {
    let resource = if namespace.is_empty() { "clusterrolebindings" } else { "rolebindings" };
    let object = json!({
        "metadata": { "name": name, "namespace": namespace },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": role.0, "name": role.1 },
        "subjects": [subject],
    });
    add(index, resource, object);
}

fn user(name: &str) -> UserInfo {
    UserInfo::new(name, ["system:authenticated"])
}

fn ask<'a>(user: &'a UserInfo, verb: &'a str, group: &'a str, resource: &'a str, namespace: &'a str, name: &'a str) -> Attributes<'a> {
    let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    Attributes { namespace, name, subresource, ..Attributes::resource(user, verb, group, resource) }
}

#[test]
fn rules_match_as_upstream() {
    let anyone = user("u");
    // rule; verb, group, resource, name; allowed
    let cases = [
        (rule("get", "core", "pods", ""), ("get", "", "pods", "x"), true),
        (rule("get", "core", "pods", ""), ("list", "", "pods", ""), false),
        (rule("get", "apps", "pods", ""), ("get", "", "pods", "x"), false),
        (rule("*", "*", "*", ""), ("delete", "apps", "deployments/scale", "x"), true),
        (rule("get", "core", "pods", ""), ("get", "", "pods/log", "x"), false),
        (rule("get", "core", "pods/log", ""), ("get", "", "pods/log", "x"), true),
        (rule("get", "core", "pods/log", ""), ("get", "", "pods", "x"), false),
        (rule("get", "*", "*/scale", ""), ("get", "apps", "deployments/scale", "x"), true),
        (rule("get", "*", "*/scale", ""), ("get", "apps", "deployments", "x"), false),
        (rule("get", "*", "pods/*", ""), ("get", "", "pods/log", "x"), false),
        (rule("get", "core", "secrets", "a,b"), ("get", "", "secrets", "b"), true),
        (rule("get", "core", "secrets", "a,b"), ("get", "", "secrets", "c"), false),
        (rule("list", "core", "secrets", "a"), ("list", "", "secrets", ""), false),
    ];
    for (rule, (verb, group, resource, name), allowed) in cases {
        let attributes = ask(&anyone, verb, group, resource, "ns", name);
        assert_eq!(rule_allows(&attributes, &typed(rule.clone())), allowed, "{rule} {verb} {resource} {name}");
    }
    for (pattern, path, allowed) in [
        ("/healthz", "/healthz", true),
        ("/healthz", "/healthz/etcd", false),
        ("/healthz/*", "/healthz/etcd", true),
        ("/healthz/*", "/healthz", false),
        ("/api*", "/apis/apps", true),
        ("*", "/anything", true),
    ] {
        let attributes = Attributes::path(&anyone, "get", path);
        assert_eq!(rule_allows(&attributes, &typed(paths("get", &[pattern]))), allowed, "{pattern} {path}");
    }
}

fn example() -> RbacIndex {
    let index = RbacIndex::new();
    add(&index, "clusterroles", json!({ "metadata": { "name": "reader" }, "rules": [rule("get,list", "core", "pods", "")] }));
    add(&index, "clusterroles", json!({ "metadata": { "name": "empty" }, "rules": null }));
    add(&index, "roles", json!({ "metadata": { "name": "editor", "namespace": "a" }, "rules": [rule("update", "core", "pods", "")] }));
    bind(&index, "", "everywhere", ("ClusterRole", "reader"), json!({ "kind": "User", "name": "anna" }));
    bind(&index, "", "none", ("ClusterRole", "empty"), json!({ "kind": "User", "name": "anna" }));
    bind(&index, "a", "here", ("ClusterRole", "reader"), json!({ "kind": "Group", "name": "team" }));
    bind(&index, "a", "edit", ("Role", "editor"), json!({ "kind": "ServiceAccount", "name": "bot" }));
    bind(&index, "a", "broken", ("Role", "gone"), json!({ "kind": "User", "name": "carl" }));
    index
}

#[test]
fn bindings_decide_with_a_reason() {
    let index = example();
    let team = UserInfo::new("bert", ["team"]);
    let bot = user("system:serviceaccount:a:bot");
    let (anna, carl) = (user("anna"), user("carl"));
    let cases = [
        (
            &anna,
            "list",
            "b",
            Decision::Allow(r#"RBAC: allowed by ClusterRoleBinding "everywhere" of ClusterRole "reader" to User "anna""#.into()),
        ),
        (
            &anna,
            "list",
            "",
            Decision::Allow(r#"RBAC: allowed by ClusterRoleBinding "everywhere" of ClusterRole "reader" to User "anna""#.into()),
        ),
        (&anna, "delete", "b", Decision::NoOpinion(String::new())),
        (&team, "get", "a", Decision::Allow(r#"RBAC: allowed by RoleBinding "here/a" of ClusterRole "reader" to Group "team""#.into())),
        (&team, "get", "b", Decision::NoOpinion(String::new())),
        (&team, "get", "", Decision::NoOpinion(String::new())),
        (
            &bot,
            "update",
            "a",
            Decision::Allow(r#"RBAC: allowed by RoleBinding "edit/a" of Role "editor" to ServiceAccount "bot/a""#.into()),
        ),
        (&carl, "get", "a", Decision::NoOpinion(r#"RBAC: role.rbac.authorization.k8s.io "gone" not found"#.into())),
    ];
    for (user, verb, namespace, expected) in cases {
        assert_eq!(index.authorize(&ask(user, verb, "", "pods", namespace, "x")), expected, "{} {verb} {namespace}", user.name);
    }
    let root = UserInfo::new("root", ["system:masters"]);
    assert!(index.authorize(&ask(&root, "escalate", "x", "y", "z", "")).allowed());
}

#[test]
fn index_follows_changes() {
    let index = example();
    let anna = user("anna");
    let may = |index: &RbacIndex| index.authorize(&ask(&anna, "get", "", "pods", "b", "x")).allowed();
    assert!(may(&index));
    add(&index, "clusterroles", json!({ "metadata": { "name": "reader" }, "rules": [rule("get", "core", "secrets", "")] }));
    assert!(!may(&index));
    add(&index, "clusterroles", json!({ "metadata": { "name": "reader" }, "rules": [rule("get", "core", "pods", "")] }));
    assert!(may(&index));
    index.delete("clusterrolebindings", "", "everywhere");
    assert!(!may(&index));
}

#[test]
fn covering_breaks_rules_down() {
    // owner; wanted; what is missing
    let cases = [
        (vec![rule("get,list", "core", "pods,secrets", "")], rule("get", "core", "pods", ""), vec![]),
        (vec![rule("get", "core", "pods", ""), rule("list", "core", "pods", "")], rule("get,list", "core", "pods", ""), vec![]),
        (vec![rule("get", "core", "pods", "")], rule("get,list", "core", "pods", ""), vec![rule("list", "core", "pods", "")]),
        (vec![rule("*", "*", "*", "")], rule("get", "apps", "deployments/scale", "x"), vec![]),
        (vec![rule("get", "*", "*/scale", "")], rule("get", "apps", "deployments/scale", ""), vec![]),
        (vec![rule("get", "core", "pods", "a")], rule("get", "core", "pods", ""), vec![rule("get", "core", "pods", "")]),
        (vec![rule("get", "core", "pods", "a")], rule("get", "core", "pods", "a,b"), vec![rule("get", "core", "pods", "b")]),
        (vec![rule("get", "core", "pods", "")], rule("*", "core", "pods", ""), vec![rule("*", "core", "pods", "")]),
        (vec![paths("get", &["/healthz/*"])], paths("get", &["/healthz/a", "/other"]), vec![paths("get", &["/other"])]),
        (vec![rule("*", "*", "*", "")], paths("get", &["/healthz"]), vec![paths("get", &["/healthz"])]),
    ];
    for (owner, wanted, missing) in cases {
        let owner: Vec<PolicyRule> = owner.into_iter().map(typed).collect();
        let missing: Vec<PolicyRule> = missing.into_iter().map(typed).collect();
        assert_eq!(covers(&owner, &[typed(wanted.clone())]).err().unwrap_or_default(), missing, "{wanted}");
    }
}

#[test]
fn escalation_is_told_like_upstream() {
    let index = example();
    let wanted = [typed(rule("get,delete,patch", "core", "pods", "")), typed(paths("get", &["/metrics"]))];
    let refused = index.confirm_no_escalation(&user("anna"), "b", &wanted).unwrap_err();
    let expected = "user \"anna\" (groups=[\"system:authenticated\"]) is attempting to grant RBAC permissions not currently held:\n\
        {APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"delete\" \"patch\"]}\n\
        {NonResourceURLs:[\"/metrics\"], Verbs:[\"get\"]}";
    assert_eq!(refused, expected);
    assert_eq!(index.confirm_no_escalation(&user("anna"), "b", &[typed(rule("get", "core", "pods", ""))]), Ok(()));
    assert_eq!(index.confirm_no_escalation(&UserInfo::new("root", ["system:masters"]), "", &wanted), Ok(()));
}

#[test]
fn aggregation_collects_by_label_once() {
    let index = example();
    let labelled = |name: &str, rules: Value| json!({ "metadata": { "name": name, "labels": { "to": "all" } }, "rules": rules });
    add(&index, "clusterroles", labelled("one", json!([rule("get", "core", "pods", ""), rule("get", "core", "secrets", "")])));
    add(&index, "clusterroles", labelled("two", json!([rule("get", "core", "pods", "")])));
    let mut all = labelled("all", json!([]));
    all["aggregationRule"] = json!({ "clusterRoleSelectors": [{ "matchLabels": { "to": "all" } }] });
    add(&index, "clusterroles", all.clone());
    let expected = vec![typed(rule("get", "core", "pods", "")), typed(rule("get", "core", "secrets", ""))];
    assert_eq!(index.aggregated_rules(&all), Some(expected.clone()));
    assert_eq!(index.stale_aggregations(), [("all".to_owned(), expected.clone())]);
    all["rules"] = json!(expected);
    add(&index, "clusterroles", all);
    assert_eq!(index.stale_aggregations(), []);
}

#[test]
fn review_lists_a_users_rules() {
    let index = Arc::new(example());
    let mut review = RulesReview::default();
    Union(vec![index]).rules(&user("system:serviceaccount:a:bot"), "a", &mut review);
    let expected = ResourceRules {
        verbs: vec!["update".into()],
        api_groups: vec![String::new()],
        resources: vec!["pods".into()],
        resource_names: vec![],
    };
    assert_eq!(review, RulesReview { resources: vec![expected], ..RulesReview::default() });
}
