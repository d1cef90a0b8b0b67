//! Whether a pod that was bound to this node can run here: resources, ports, node selector. A refused pod fails at once.
use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm, Pod};

use super::meta::{containers, host_network, init_containers, is_sidecar, spec};
use super::resources::pod_request_milli;
use super::status::Verdict;
use crate::quantity::{Resources, milli_of};

/// Resources that are counted, with the reason of a refusal and the name that its message uses.
const COUNTED: [(&str, &str); 3] = [("cpu", "OutOfcpu"), ("memory", "OutOfmemory"), ("ephemeral-storage", "OutOfephemeral-storage")];

pub fn admit(pod: &Pod, others: &[std::sync::Arc<Pod>], allocatable: &Resources, node: Option<&Node>) -> Result<(), Verdict> {
    let limit = milli_of(Some(allocatable), "pods").unwrap_or(0) / 1000;
    let count = i64::try_from(others.len()).unwrap_or(i64::MAX);
    if count + 1 > limit {
        return Err(short("pods", "OutOfpods", 1, count, limit));
    }
    for (name, reason) in COUNTED {
        let wanted = pod_request_milli(pod, name);
        let capacity = milli_of(Some(allocatable), name).unwrap_or(0);
        let used: i64 = others.iter().map(|other| pod_request_milli(other, name)).sum();
        if wanted > 0 && used + wanted > capacity {
            // CPUs are told in thousandths, the rest in units.
            let unit = if name == "cpu" { 1 } else { 1000 };
            return Err(short(name, reason, wanted / unit, used / unit, capacity / unit));
        }
    }
    let taken: BTreeSet<_> = others.iter().flat_map(|other| host_ports(other)).collect();
    if host_ports(pod).iter().any(|wanted| taken.iter().any(|port| collide(wanted, port))) {
        return Err(refused("NodePorts", "Predicate NodePorts failed"));
    }
    if let Some(node) = node {
        if !selected(pod, node) {
            return Err(refused("NodeAffinity", "Predicate NodeAffinity failed"));
        }
        if !tolerated(pod, node) {
            return Err(refused("NodeTaints", "Predicate NodeTaints failed"));
        }
    }
    Ok(())
}

fn short(name: &str, reason: &str, wanted: i64, used: i64, capacity: i64) -> Verdict {
    let message =
        format!("Pod was rejected: Node didn't have enough resource: {name}, requested: {wanted}, used: {used}, capacity: {capacity}");
    Verdict { reason: reason.into(), message, ..Verdict::default() }
}

fn refused(reason: &str, message: &str) -> Verdict {
    Verdict { reason: reason.into(), message: format!("Pod was rejected: {message}"), ..Verdict::default() }
}

type HostPort = (String, String, i32);

fn host_ports(pod: &Pod) -> Vec<HostPort> {
    let sidecars = init_containers(pod).iter().filter(|container| is_sidecar(container));
    let ports = containers(pod).iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let number = port.host_port.or(host_network(pod).then_some(port.container_port))?;
            let ip = port.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".into());
            (number > 0).then(|| (port.protocol.clone().unwrap_or_else(|| "TCP".into()), ip, number))
        })
        .collect()
}

fn collide(a: &HostPort, b: &HostPort) -> bool {
    let every = |ip: &str| matches!(ip, "0.0.0.0" | "::");
    a.0 == b.0 && a.2 == b.2 && (a.1 == b.1 || every(&a.1) || every(&b.1))
}

fn selected(pod: &Pod, node: &Node) -> bool {
    let spec = spec(pod);
    let empty = Default::default();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let selector = spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    selector && required.is_none_or(|required| required.node_selector_terms.iter().any(|term| term_matches(term, node)))
}

fn term_matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let label = |key: &str| node.metadata.labels.as_ref().and_then(|labels| labels.get(key)).map(String::as_str);
    let field = |key: &str| if key == "metadata.name" { node.metadata.name.as_deref() } else { None };
    let empty = term.match_expressions.as_ref().is_none_or(Vec::is_empty) && term.match_fields.as_ref().is_none_or(Vec::is_empty);
    !empty
        && term.match_expressions.iter().flatten().all(|requirement| requirement_holds(requirement, label(&requirement.key)))
        && term.match_fields.iter().flatten().all(|requirement| requirement_holds(requirement, field(&requirement.key)))
}

fn requirement_holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|value| values.iter().any(|wanted| wanted == value));
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<i64>().ok());
    let compare = |holds: fn(i64, i64) -> bool| match (number(value), number(values.first().map(String::as_str))) {
        (Some(value), Some(wanted)) => holds(value, wanted),
        _ => false,
    };
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(|value, wanted| value > wanted),
        "Lt" => compare(|value, wanted| value < wanted),
        _ => false,
    }
}

/// Only NoExecute taints turn a bound pod away, as static and daemon pods are bound past the others.
fn tolerated(pod: &Pod, node: &Node) -> bool {
    let spec = spec(pod);
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    taints.iter().filter(|taint| taint.effect == "NoExecute").all(|taint| {
        spec.tolerations.iter().flatten().any(|toleration| {
            let effect = toleration.effect.as_deref().is_none_or(|effect| effect.is_empty() || effect == taint.effect);
            let key = toleration.key.as_deref().is_none_or(|key| key.is_empty() || key == taint.key);
            let exists = toleration.operator.as_deref() == Some("Exists");
            let value = exists || toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default();
            effect && key && value
        })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use k8s_openapi::api::core::v1::{ContainerPort, ResourceRequirements};
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

    use super::*;
    use crate::pod::test_data::pod;

    fn allocatable() -> Resources {
        [("cpu", "2"), ("memory", "1Gi"), ("pods", "2")].map(|(name, amount)| (name.to_owned(), Quantity(amount.into()))).into()
    }

    fn sized(cpu: &str, host_port: Option<i32>) -> Pod {
        let mut pod = pod("Always", &[], &["a"]);
        let container = &mut pod.spec.as_mut().unwrap().containers[0];
        container.resources = Some(ResourceRequirements {
            requests: Some([("cpu".to_owned(), Quantity(cpu.into()))].into()),
            ..ResourceRequirements::default()
        });
        container.ports =
            host_port.map(|port| vec![ContainerPort { host_port: Some(port), container_port: 1, ..ContainerPort::default() }]);
        pod
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let reason = |pod: Pod, others: Vec<Pod>| {
            let others: Vec<Arc<Pod>> = others.into_iter().map(Arc::new).collect();
            admit(&pod, &others, &allocatable(), None).err().map(|verdict| verdict.reason)
        };
        assert_eq!(reason(sized("1", None), vec![sized("1", None)]), None);
        assert_eq!(reason(sized("1", None), vec![sized("1500m", None)]).as_deref(), Some("OutOfcpu"));
        assert_eq!(reason(sized("1", None), vec![sized("1m", None), sized("1m", None)]).as_deref(), Some("OutOfpods"));
        assert_eq!(reason(sized("1", Some(80)), vec![sized("1", Some(80))]).as_deref(), Some("NodePorts"));
    }

    #[test]
    fn node_selectors_are_checked() {
        let mut pod = sized("1", None);
        pod.spec.as_mut().unwrap().node_selector = Some([("disk".to_owned(), "ssd".to_owned())].into());
        let mut node = Node::default();
        assert_eq!(admit(&pod, &[], &allocatable(), Some(&node)).unwrap_err().reason, "NodeAffinity");
        node.metadata.labels = Some([("disk".to_owned(), "ssd".to_owned())].into());
        assert!(admit(&pod, &[], &allocatable(), Some(&node)).is_ok());
    }
}
