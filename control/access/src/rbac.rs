//! RBAC: an index of roles and bindings, and the decisions made from it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::attributes::{Attributes, Authorizer, Decision, ResourceRules, RulesReview};
use crate::rules::{compact, describe, rule_allows};
pub use crate::rules::{covers, rules_allow};
use crate::user::{GROUP_MASTERS, UserInfo};

#[derive(Debug, thiserror::Error)]
#[error("{resource}: {reason}")]
pub struct RbacError {
    pub resource: String,
    pub reason: String,
}

/// Roles and bindings in memory, kept up to date by the API server's watch of rbac.authorization.k8s.io.
#[derive(Default)]
pub struct RbacIndex {
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    /// (namespace, name)
    roles: HashMap<(String, String), Arc<[PolicyRule]>>,
    cluster_roles: BTreeMap<String, HeldClusterRole>,
    /// Namespace -> name -> binding; the empty namespace holds the ClusterRoleBindings.
    bindings: HashMap<String, BTreeMap<String, Binding>>,
}

struct HeldClusterRole {
    rules: Arc<[PolicyRule]>,
    labels: BTreeMap<String, String>,
    /// Of an aggregated role.
    selectors: Option<Vec<LabelSelector>>,
}

struct Binding {
    role: RoleRef,
    subjects: Vec<Subject>,
}

/// A rule that applies to a user, and where it comes from.
struct Grant<'s> {
    namespace: &'s str,
    name: &'s str,
    role: &'s RoleRef,
    subject: &'s Subject,
    rule: &'s PolicyRule,
}

impl Grant<'_> {
    fn source(&self) -> String {
        let (binding, name) = match self.namespace {
            "" => ("ClusterRoleBinding", self.name.to_owned()),
            namespace => ("RoleBinding", format!("{}/{namespace}", self.name)),
        };
        let subject = match self.subject.kind.as_str() {
            "ServiceAccount" => {
                let own = self.subject.namespace.as_deref().filter(|namespace| !namespace.is_empty());
                format!("{}/{}", self.subject.name, own.unwrap_or(self.namespace))
            }
            _ => self.subject.name.clone(),
        };
        format!("{binding} {name:?} of {} {:?} to {} {subject:?}", self.role.kind, self.role.name, self.subject.kind)
    }
}

fn read<T: DeserializeOwned>(resource: &str, json: &[u8]) -> Result<T, RbacError> {
    serde_json::from_slice(json).map_err(|error| RbacError { resource: resource.to_owned(), reason: error.to_string() })
}

fn key(metadata: ObjectMeta) -> (String, String) {
    (metadata.namespace.unwrap_or_default(), metadata.name.unwrap_or_default())
}

impl RbacIndex {
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Adds or replaces an object of `resource`: `roles`, `rolebindings`, `clusterroles`, `clusterrolebindings`. Others are ignored.
    pub fn apply(&self, resource: &str, json: &[u8]) -> Result<(), RbacError> {
        match resource {
            "roles" => {
                let role: Role = read(resource, json)?;
                let (key, rules) = (key(role.metadata), role.rules.unwrap_or_default().into());
                self.change(|state| drop(state.roles.insert(key, rules)));
            }
            "clusterroles" => {
                let role: ClusterRole = read(resource, json)?;
                let held = HeldClusterRole {
                    rules: role.rules.unwrap_or_default().into(),
                    labels: role.metadata.labels.clone().unwrap_or_default(),
                    selectors: role.aggregation_rule.map(|rule| rule.cluster_role_selectors.unwrap_or_default()),
                };
                let (_, name) = key(role.metadata);
                self.change(|state| drop(state.cluster_roles.insert(name, held)));
            }
            "rolebindings" => {
                let binding: RoleBinding = read(resource, json)?;
                let held = Binding { role: binding.role_ref, subjects: binding.subjects.unwrap_or_default() };
                let (namespace, name) = key(binding.metadata);
                self.change(|state| drop(state.bindings.entry(namespace).or_default().insert(name, held)));
            }
            "clusterrolebindings" => {
                let binding: ClusterRoleBinding = read(resource, json)?;
                let held = Binding { role: binding.role_ref, subjects: binding.subjects.unwrap_or_default() };
                let (_, name) = key(binding.metadata);
                self.change(|state| drop(state.bindings.entry(String::new()).or_default().insert(name, held)));
            }
            _ => {}
        }
        Ok(())
    }

    pub fn delete(&self, resource: &str, namespace: &str, name: &str) {
        self.change(|state| match resource {
            "roles" => drop(state.roles.remove(&(namespace.to_owned(), name.to_owned()))),
            "clusterroles" => drop(state.cluster_roles.remove(name)),
            "rolebindings" => state.unbind(namespace, name),
            "clusterrolebindings" => state.unbind("", name),
            _ => {}
        });
    }

    /// All rules that `user` holds in `namespace` (empty: cluster-wide only).
    pub fn rules_for(&self, user: &UserInfo, namespace: &str) -> Vec<PolicyRule> {
        let mut rules = Vec::new();
        self.state().visit(user, namespace, &mut |granted| {
            rules.extend(granted.ok().map(|grant| grant.rule.clone()));
            true
        });
        rules
    }

    /// Err with upstream's text if `user` doesn't hold all of `rules` in `namespace` (empty: cluster-wide). The caller first asks the
    /// authorizer for verb `escalate` on the role, and lets it pass if allowed.
    pub fn confirm_no_escalation(&self, user: &UserInfo, namespace: &str, rules: &[PolicyRule]) -> Result<(), String> {
        if user.in_group(GROUP_MASTERS) {
            return Ok(());
        }
        let Err(missing) = covers(&self.rules_for(user, namespace), rules) else { return Ok(()) };
        let descriptions: BTreeSet<String> = compact(&missing).iter().map(describe).collect();
        let groups: Vec<String> = user.groups.iter().map(|group| format!("{group:?}")).collect();
        Err(format!(
            "user {:?} (groups=[{}]) is attempting to grant RBAC permissions not currently held:\n{}",
            user.name,
            groups.join(" "),
            descriptions.into_iter().collect::<Vec<_>>().join("\n")
        ))
    }

    /// The rules behind a binding's roleRef; Err if the role doesn't exist.
    pub fn role_rules(&self, role_ref: &RoleRef, binding_namespace: &str) -> Result<Vec<PolicyRule>, String> {
        self.state().rules_of(role_ref, binding_namespace).map(<[PolicyRule]>::to_vec)
    }

    /// For an aggregated ClusterRole (`aggregationRule` set): its rules as they should be, from the labels of the others. `None` if `role`
    /// isn't aggregated.
    pub fn aggregated_rules(&self, role: &Value) -> Option<Vec<PolicyRule>> {
        let selectors = role.pointer("/aggregationRule/clusterRoleSelectors")?;
        let selectors: Vec<LabelSelector> = serde_json::from_value(selectors.clone()).ok()?;
        let name = role.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
        Some(self.state().aggregate(name, &selectors))
    }

    /// Aggregated ClusterRoles whose rules aren't what they should be, with the right ones: the work of upstream's
    /// clusterrole-aggregation controller.
    pub fn stale_aggregations(&self) -> Vec<(String, Vec<PolicyRule>)> {
        let state = self.state();
        let mut stale = Vec::new();
        for (name, role) in &state.cluster_roles {
            let Some(selectors) = &role.selectors else { continue };
            let wanted = state.aggregate(name, selectors);
            if *role.rules != *wanted {
                stale.push((name.clone(), wanted));
            }
        }
        stale
    }
}

impl State {
    fn unbind(&mut self, namespace: &str, name: &str) {
        if let Some(bindings) = self.bindings.get_mut(namespace) {
            bindings.remove(name);
            if bindings.is_empty() {
                self.bindings.remove(namespace);
            }
        }
    }

    fn rules_of(&self, role: &RoleRef, namespace: &str) -> Result<&[PolicyRule], String> {
        let found = match role.kind.as_str() {
            "Role" => self.roles.get(&(namespace.to_owned(), role.name.clone())).map(|rules| &**rules),
            "ClusterRole" => self.cluster_roles.get(&role.name).map(|held| &*held.rules),
            kind => return Err(format!("unsupported role reference kind: {kind:?}")),
        };
        found.ok_or_else(|| format!("{}.rbac.authorization.k8s.io {:?} not found", role.kind.to_lowercase(), role.name))
    }

    /// Shows every rule that applies, and every role that's missing, until `visitor` returns false.
    fn visit<'s>(&'s self, user: &UserInfo, namespace: &str, visitor: &mut dyn FnMut(Result<Grant<'s>, String>) -> bool) {
        let scopes = if namespace.is_empty() { &[""][..] } else { &["", namespace] };
        for (scope, bindings) in scopes.iter().filter_map(|scope| self.bindings.get_key_value(*scope)) {
            for (name, binding) in bindings {
                let Some(subject) = binding.subjects.iter().find(|subject| applies(subject, user, scope)) else { continue };
                let rules = match self.rules_of(&binding.role, scope) {
                    Ok(rules) => rules,
                    Err(missing) => {
                        if !visitor(Err(missing)) {
                            return;
                        }
                        continue;
                    }
                };
                for rule in rules {
                    if !visitor(Ok(Grant { namespace: scope, name, role: &binding.role, subject, rule })) {
                        return;
                    }
                }
            }
        }
    }

    /// Each rule once, in the order of the roles' names.
    fn aggregate(&self, own_name: &str, selectors: &[LabelSelector]) -> Vec<PolicyRule> {
        let mut rules: Vec<PolicyRule> = Vec::new();
        for selector in selectors {
            for (name, role) in &self.cluster_roles {
                if name != own_name && selects(selector, &role.labels) {
                    for rule in role.rules.iter() {
                        if !rules.contains(rule) {
                            rules.push(rule.clone());
                        }
                    }
                }
            }
        }
        rules
    }
}

fn applies(subject: &Subject, user: &UserInfo, namespace: &str) -> bool {
    match subject.kind.as_str() {
        "User" => user.name == subject.name,
        "Group" => user.in_group(&subject.name),
        "ServiceAccount" => {
            let own = subject.namespace.as_deref().filter(|own| !own.is_empty());
            user.service_account() == Some((own.unwrap_or(namespace), subject.name.as_str()))
        }
        _ => false,
    }
}

fn selects(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let labels_match = selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    labels_match
        && selector.match_expressions.iter().flatten().all(|requirement| {
            let value = labels.get(&requirement.key);
            let listed = value.is_some_and(|value| requirement.values.iter().flatten().any(|wanted| wanted == value));
            match requirement.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

impl Authorizer for RbacIndex {
    fn authorize(&self, attributes: &Attributes<'_>) -> Decision {
        // As upstream's superuser authorizer, so that a cluster whose roles were deleted can be repaired.
        if attributes.user.in_group(GROUP_MASTERS) {
            return Decision::Allow(String::new());
        }
        let mut allowed = None;
        let mut missing = Vec::new();
        let namespace = if attributes.is_resource { attributes.namespace } else { "" };
        let state = self.state();
        state.visit(attributes.user, namespace, &mut |granted| match granted {
            Ok(grant) if rule_allows(attributes, grant.rule) => {
                allowed = Some(format!("RBAC: allowed by {}", grant.source()));
                false
            }
            Ok(_) => true,
            Err(role) => {
                missing.push(role);
                true
            }
        });
        match (allowed, missing.as_slice()) {
            (Some(reason), _) => Decision::Allow(reason),
            (None, []) => Decision::NoOpinion(String::new()),
            (None, [one]) => Decision::NoOpinion(format!("RBAC: {one}")),
            (None, several) => Decision::NoOpinion(format!("RBAC: [{}]", several.join(", "))),
        }
    }

    fn rules(&self, user: &UserInfo, namespace: &str, review: &mut RulesReview) {
        if user.in_group(GROUP_MASTERS) {
            let all = || vec!["*".to_owned()];
            review.resources.push(ResourceRules { verbs: all(), api_groups: all(), resources: all(), resource_names: Vec::new() });
            review.paths.push((all(), all()));
        }
        for rule in self.rules_for(user, namespace) {
            if let Some(resources) = rule.resources.filter(|resources| !resources.is_empty()) {
                review.resources.push(ResourceRules {
                    verbs: rule.verbs.clone(),
                    api_groups: rule.api_groups.unwrap_or_default(),
                    resources,
                    resource_names: rule.resource_names.unwrap_or_default(),
                });
            }
            if let Some(paths) = rule.non_resource_urls.filter(|paths| !paths.is_empty()) {
                review.paths.push((rule.verbs, paths));
            }
        }
    }
}

#[cfg(test)]
#[path = "rbac_tests.rs"]
mod tests;
