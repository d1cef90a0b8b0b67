//! ClusterRoles with an aggregation rule have the rules of all roles that it selects.
use std::sync::Arc;

use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use serde_json::json;
use tokio::task::JoinSet;

use crate::Context;
use crate::informers::Informers;
use crate::objects::{Key, labels, name, selects};
use crate::worker::{self, Outcome, Queue};

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let (add, roles) = (queue.clone(), context.informers.cluster_roles.clone());
    context.informers.cluster_roles.on_change(move |_, _| {
        // Any role may be selected, before a change or after it, by any aggregated one.
        for role in roles.select("", |role| role.aggregation_rule.is_some()) {
            add.add(Key::of(&*role));
        }
    });
    let informers = context.informers.clone();
    tasks.spawn(worker::run("clusterrole-aggregation", queue, 1, move |key| sync(informers.clone(), key)));
}

async fn sync(informers: Arc<Informers>, key: Key) -> Outcome {
    let Some(role) = informers.cluster_roles.get(&key).filter(|role| role.aggregation_rule.is_some()) else { return Ok(None) };
    let wanted = rules(&role, &informers.cluster_roles.list());
    if role.rules.as_deref().unwrap_or_default() != wanted {
        let patch = json!({"metadata": {"resourceVersion": role.metadata.resource_version}, "rules": wanted});
        informers.cluster_roles.merge(&key, patch).await?;
    }
    Ok(None)
}

/// The selected roles' rules, role by role in the order of names, each once.
fn rules(role: &ClusterRole, all: &[Arc<ClusterRole>]) -> Vec<PolicyRule> {
    let mut rules: Vec<PolicyRule> = Vec::new();
    for selector in role.aggregation_rule.iter().flat_map(|rule| rule.cluster_role_selectors.iter().flatten()) {
        for other in
            all.iter().filter(|other| name(&other.metadata) != name(&role.metadata) && selects(Some(selector), labels(&other.metadata)))
        {
            for rule in other.rules.iter().flatten() {
                if !rules.contains(rule) {
                    rules.push(rule.clone());
                }
            }
        }
    }
    rules
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::rbac::v1::AggregationRule;

    use super::*;
    use crate::objects::label_selector;

    #[test]
    fn selected_rules_come_once_and_in_order() {
        let rule = |verb: &str| PolicyRule { verbs: vec![verb.into()], ..Default::default() };
        let role = |title: &str, label: Option<&str>, rules: Vec<PolicyRule>| {
            let mut role = ClusterRole { rules: Some(rules), ..Default::default() };
            role.metadata.name = Some(title.into());
            role.metadata.labels = label.map(|label| [(label.to_owned(), "true".to_owned())].into());
            Arc::new(role)
        };
        let selector = label_selector([("to-view".to_owned(), "true".to_owned())].into());
        let mut view = (*role("view", Some("to-view"), vec![rule("old")])).clone();
        view.aggregation_rule = Some(AggregationRule { cluster_role_selectors: Some(vec![selector]) });
        let all = [
            role("a", Some("to-view"), vec![rule("get")]),
            role("b", Some("to-view"), vec![rule("list"), rule("get")]),
            role("c", None, vec![rule("delete")]),
            Arc::new(view.clone()),
        ];
        assert_eq!(rules(&view, &all), [rule("get"), rule("list")]);
    }
}
