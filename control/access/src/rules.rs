//! One policy rule: what it allows, what it covers, how it reads.

use k8s_openapi::api::rbac::v1::PolicyRule;

use crate::attributes::Attributes;

fn list(values: &Option<Vec<String>>) -> &[String] {
    values.as_deref().unwrap_or_default()
}

fn has(set: &[String], wanted: &str) -> bool {
    set.iter().any(|value| value == wanted)
}

/// Whether any of the rules allows the request.
pub fn rules_allow(attributes: &Attributes<'_>, rules: &[PolicyRule]) -> bool {
    rules.iter().any(|rule| rule_allows(attributes, rule))
}

pub(crate) fn rule_allows(attributes: &Attributes<'_>, rule: &PolicyRule) -> bool {
    if !has(&rule.verbs, "*") && !has(&rule.verbs, attributes.verb) {
        return false;
    }
    if !attributes.is_resource {
        return list(&rule.non_resource_urls).iter().any(|url| path_covers(url, attributes.path));
    }
    let groups = list(&rule.api_groups);
    let names = list(&rule.resource_names);
    (has(groups, "*") || has(groups, attributes.api_group))
        && list(&rule.resources).iter().any(|resource| resource_covers(resource, attributes.resource, attributes.subresource))
        && (names.is_empty() || has(names, attributes.name))
}

/// `*`, `resource`, `resource/subresource`, or `*/subresource`.
fn resource_covers(pattern: &str, resource: &str, subresource: &str) -> bool {
    if pattern == "*" {
        return true;
    }
    match pattern.split_once('/') {
        None => pattern == resource && subresource.is_empty(),
        Some((own, sub)) => !subresource.is_empty() && sub == subresource && (own == resource || own == "*"),
    }
}

/// A trailing `*` stands for anything.
fn path_covers(pattern: &str, path: &str) -> bool {
    pattern == path || (pattern.ends_with('*') && path.starts_with(pattern.trim_end_matches('*')))
}

/// Whether `owner`'s rules allow everything that `wanted` does; what is left over otherwise, one verb on one thing per rule.
pub fn covers(owner: &[PolicyRule], wanted: &[PolicyRule]) -> Result<(), Vec<PolicyRule>> {
    let missing: Vec<PolicyRule> =
        wanted.iter().flat_map(break_down).filter(|atom| !owner.iter().any(|rule| rule_covers(rule, atom))).collect();
    if missing.is_empty() { Ok(()) } else { Err(missing) }
}

/// The rule as rules of one verb on one thing, each of which another rule covers wholly or not at all.
fn break_down(rule: &PolicyRule) -> Vec<PolicyRule> {
    let one = |value: &String| Some(vec![value.clone()]);
    let mut atoms = Vec::new();
    for group in list(&rule.api_groups) {
        for resource in list(&rule.resources) {
            for verb in &rule.verbs {
                let atom = |resource_names| PolicyRule {
                    api_groups: one(group),
                    resources: one(resource),
                    verbs: vec![verb.clone()],
                    resource_names,
                    non_resource_urls: None,
                };
                match list(&rule.resource_names) {
                    [] => atoms.push(atom(None)),
                    names => atoms.extend(names.iter().map(|name| atom(one(name)))),
                }
            }
        }
    }
    for url in list(&rule.non_resource_urls) {
        atoms.extend(rule.verbs.iter().map(|verb| PolicyRule {
            non_resource_urls: one(url),
            verbs: vec![verb.clone()],
            ..PolicyRule::default()
        }));
    }
    atoms
}

/// `atom` has at most one of everything.
fn rule_covers(owner: &PolicyRule, atom: &PolicyRule) -> bool {
    let has_all = |set: &[String], wanted: &[String]| wanted.iter().all(|value| has(set, value));
    let (owner_names, names) = (list(&owner.resource_names), list(&atom.resource_names));
    let names_covered = owner_names.is_empty() || (!names.is_empty() && has_all(owner_names, names));
    let resources = list(&owner.resources);
    let resource_covered = |wanted: &String| {
        has(resources, "*")
            || has(resources, wanted)
            || wanted.split_once('/').is_some_and(|(_, subresource)| has(resources, &format!("*/{subresource}")))
    };
    let url_covered = |wanted: &String| list(&owner.non_resource_urls).iter().any(|url| path_covers(url, wanted));
    (has(&owner.verbs, "*") || has_all(&owner.verbs, &atom.verbs))
        && (has(list(&owner.api_groups), "*") || has_all(list(&owner.api_groups), list(&atom.api_groups)))
        && list(&atom.resources).iter().all(resource_covered)
        && list(&atom.non_resource_urls).iter().all(url_covered)
        && names_covered
}

/// Joins rules that differ only by their verb.
pub(crate) fn compact(rules: &[PolicyRule]) -> Vec<PolicyRule> {
    let mut joined: Vec<PolicyRule> = Vec::new();
    for rule in rules {
        let is_resource = rule.non_resource_urls.is_none();
        let same = joined.iter_mut().find(|other| {
            is_resource
                && other.api_groups == rule.api_groups
                && other.resources == rule.resources
                && other.resource_names == rule.resource_names
                && other.non_resource_urls.is_none()
        });
        match same {
            Some(other) => {
                for verb in &rule.verbs {
                    if !has(&other.verbs, verb) {
                        other.verbs.push(verb.clone());
                    }
                }
            }
            None => joined.push(rule.clone()),
        }
    }
    joined
}

/// As upstream's messages show a rule: `{APIGroups:[""], Resources:["pods"], Verbs:["get"]}`.
pub(crate) fn describe(rule: &PolicyRule) -> String {
    let parts = [
        ("APIGroups", list(&rule.api_groups)),
        ("Resources", list(&rule.resources)),
        ("NonResourceURLs", list(&rule.non_resource_urls)),
        ("ResourceNames", list(&rule.resource_names)),
        ("Verbs", rule.verbs.as_slice()),
    ];
    let shown = parts.iter().filter(|(_, values)| !values.is_empty()).map(|(name, values)| {
        let values: Vec<String> = values.iter().map(|value| format!("{value:?}")).collect();
        format!("{name}:[{}]", values.join(" "))
    });
    format!("{{{}}}", shown.collect::<Vec<_>>().join(", "))
}
