//! Rules of webhooks and admission policies: which requests they are about.
use serde_json::Value;

use crate::meta;

/// A request as rules see it, in one of the versions its resource has.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    pub group: &'a str,
    pub version: &'a str,
    /// Plural name.
    pub resource: &'a str,
    pub subresource: &'a str,
    /// CREATE, UPDATE, DELETE, CONNECT.
    pub operation: &'a str,
    pub name: &'a str,
    /// Whether it is about something within a namespace; a Namespace itself isn't.
    pub namespaced: bool,
}

/// Whether a `RuleWithOperations` (or one with `resourceNames`) covers the target.
pub fn covers(rule: &Value, target: &Target<'_>) -> bool {
    let lists = |field: &str, wanted: &str| meta::items(rule, field).iter().any(|item| item == "*" || item == wanted);
    let scope = match meta::text(rule, "scope") {
        "Namespaced" => target.namespaced,
        "Cluster" => !target.namespaced,
        _ => true,
    };
    let names = meta::items(rule, "resourceNames");
    scope
        && lists("operations", target.operation)
        && lists("apiGroups", target.group)
        && lists("apiVersions", target.version)
        && meta::items(rule, "resources").iter().filter_map(Value::as_str).any(|resource| covers_resource(resource, target))
        && (names.is_empty() || names.iter().any(|name| name == target.name))
}

/// `pods`, `pods/exec`, `pods/*`, `*`, `*/scale`, `*/*`; without a slash no subresource is meant.
fn covers_resource(pattern: &str, target: &Target<'_>) -> bool {
    let (resource, subresource) = pattern.split_once('/').unwrap_or((pattern, ""));
    (resource == "*" || resource == target.resource) && (subresource == "*" || subresource == target.subresource)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rules_cover_what_they_name() {
        let pod = Target { group: "", version: "v1", resource: "pods", subresource: "", operation: "CREATE", name: "a", namespaced: true };
        let exec = Target { subresource: "exec", operation: "CONNECT", ..pod };
        let rule = |resources: &[&str], scope: &str| json!({"operations": ["CREATE", "CONNECT"], "apiGroups": [""], "apiVersions": ["*"], "resources": resources, "scope": scope});
        for (resources, scope, main, sub) in [
            (&["pods"][..], "*", true, false),
            (&["pods/exec"], "*", false, true),
            (&["pods/*"], "*", true, true),
            (&["*"], "Namespaced", true, false),
            (&["*/*"], "Namespaced", true, true),
            (&["*/*"], "Cluster", false, false),
            (&["services", "*/exec"], "*", false, true),
        ] {
            let rule = rule(resources, scope);
            assert_eq!((covers(&rule, &pod), covers(&rule, &exec)), (main, sub), "{rule}");
        }
        let mut named = rule(&["pods"], "*");
        named["resourceNames"] = json!(["b"]);
        assert!(!covers(&named, &pod) && covers(&named, &Target { name: "b", ..pod }));
        assert!(!covers(&rule(&["pods"], "*"), &Target { operation: "DELETE", ..pod }));
    }
}
