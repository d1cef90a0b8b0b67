//! Which slices a Service should have, given its pods (pure).
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{CONTROLLER, HEADLESS, MANAGED_BY, MAX_ENDPOINTS, SERVICE_NAME, hints, zone};
use crate::objects::{Key, Labels, controller_ref, is_ready, is_terminal, is_terminating, labels, name, pod_node, uid};

/// What to write. Slices to create have a generateName and no name.
#[derive(Debug, Default, PartialEq)]
pub struct Changes {
    pub create: Vec<EndpointSlice>,
    pub update: Vec<EndpointSlice>,
    pub delete: Vec<EndpointSlice>,
}

pub struct Plan {
    pub changes: Changes,
    /// A pod that was left out because its node isn't known (yet).
    pub without_node: Option<String>,
}

/// Whether a pod can be an endpoint at all.
pub fn has_endpoint(pod: &Pod, with_terminating: bool) -> bool {
    let status = pod.status.as_ref();
    let address = status.is_some_and(|status| {
        status.pod_ip.as_ref().is_some_and(|ip| !ip.is_empty()) || status.pod_ips.as_ref().is_some_and(|ips| !ips.is_empty())
    });
    !is_terminal(pod) && address && (with_terminating || !is_terminating(&pod.metadata))
}

/// The number behind a Service port on this pod; None when the pod has no port of the name.
pub fn find_port(pod: &Pod, port: &ServicePort) -> Option<i32> {
    let wanted = match port.target_port.as_ref() {
        Some(IntOrString::Int(number)) => return Some(*number),
        Some(IntOrString::String(name)) => name,
        None => return Some(port.port),
    };
    let spec = pod.spec.as_ref()?;
    let sidecars = spec.init_containers.iter().flatten().filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let protocol = |protocol: Option<&String>| protocol.map_or("TCP", String::as_str).to_owned();
    spec.containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
        .find(|candidate| {
            candidate.name.as_ref() == Some(wanted) && protocol(candidate.protocol.as_ref()) == protocol(port.protocol.as_ref())
        })
        .map(|found| found.container_port)
}

pub fn is_headless(service: &Service) -> bool {
    service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()).is_none_or(|ip| ip.is_empty() || ip == "None")
}

pub fn hostname(pod: &Pod, service: &Service) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let hostname = spec.hostname.clone().filter(|hostname| !hostname.is_empty())?;
    (spec.subdomain.as_deref() == Some(name(&service.metadata)) && pod.metadata.namespace == service.metadata.namespace).then_some(hostname)
}

fn ports(service: &Service, pod: &Pod) -> Vec<EndpointPort> {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    let to_port = |port: &ServicePort| {
        Some(EndpointPort {
            name: Some(port.name.clone().unwrap_or_default()),
            port: Some(find_port(pod, port)?),
            protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".into())),
            app_protocol: port.app_protocol.clone(),
        })
    };
    ports.filter_map(to_port).collect()
}

/// Slices and endpoints of one key share their ports.
fn port_key(ports: &[EndpointPort]) -> String {
    let mut parts: Vec<String> = ports
        .iter()
        .map(|port| {
            let text = |value: Option<&String>| value.cloned().unwrap_or_default();
            format!(
                "{}:{}:{}:{}",
                text(port.name.as_ref()),
                port.port.unwrap_or(0),
                text(port.protocol.as_ref()),
                text(port.app_protocol.as_ref())
            )
        })
        .collect();
    parts.sort();
    parts.join(",")
}

fn addresses(pod: &Pod, family: &str) -> Vec<String> {
    let status = pod.status.as_ref();
    let ips = status.and_then(|status| status.pod_ips.clone()).unwrap_or_default();
    let mut texts: Vec<String> = ips.into_iter().map(|ip| ip.ip).collect();
    if texts.is_empty() {
        texts.extend(status.and_then(|status| status.pod_ip.clone()));
    }
    texts
        .iter()
        .filter_map(|text| text.parse::<IpAddr>().ok())
        .filter(|ip| ip.is_ipv6() == (family == "IPv6"))
        .map(|ip| ip.to_string())
        .collect()
}

fn endpoint(pod: &Pod, node: Option<&Node>, service: &Service, family: &str) -> Endpoint {
    let serving = is_ready(pod);
    let terminating = is_terminating(&pod.metadata);
    let publish = publishes_unready(service);
    Endpoint {
        addresses: addresses(pod, family),
        conditions: Some(EndpointConditions {
            ready: Some(publish || (serving && !terminating)),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..Default::default()
        }),
        node_name: Some(pod_node(pod).to_owned()).filter(|name| !name.is_empty()),
        zone: node.and_then(zone),
        hostname: hostname(pod, service),
        ..Default::default()
    }
}

pub fn publishes_unready(service: &Service) -> bool {
    service.spec.as_ref().and_then(|spec| spec.publish_not_ready_addresses) == Some(true)
}

pub fn families(service: &Service) -> Vec<String> {
    let spec = service.spec.clone().unwrap_or_default();
    match spec.ip_families {
        Some(families) if !families.is_empty() => families,
        _ if is_headless(service) => vec!["IPv4".into(), "IPv6".into()],
        _ if spec.cluster_ip.as_deref().is_some_and(|ip| ip.contains(':')) => vec!["IPv6".into()],
        _ => vec!["IPv4".into()],
    }
}

fn is_reserved(label: &str) -> bool {
    matches!(label, SERVICE_NAME | MANAGED_BY | HEADLESS)
}

/// A slice's labels: the Service's own, and the reserved ones.
fn slice_labels(service: &Service) -> Labels {
    let mut result: Labels =
        labels(&service.metadata).iter().filter(|(key, _)| !is_reserved(key)).map(|(key, value)| (key.clone(), value.clone())).collect();
    if is_headless(service) {
        result.insert(HEADLESS.into(), String::new());
    }
    result.insert(SERVICE_NAME.into(), name(&service.metadata).to_owned());
    result.insert(MANAGED_BY.into(), CONTROLLER.into());
    result
}

/// Reserved labels alone are no reason to write a slice again.
fn labels_differ(slice: &EndpointSlice, wanted: &Labels) -> bool {
    let own = |labels: &Labels| {
        labels.iter().filter(|(key, _)| !is_reserved(key)).map(|(key, value)| (key.clone(), value.clone())).collect::<Labels>()
    };
    own(labels(&slice.metadata)) != own(wanted)
}

fn new_slice(service: &Service, family: &str, ports: Vec<EndpointPort>) -> EndpointSlice {
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", name(&service.metadata))),
            namespace: service.metadata.namespace.clone(),
            labels: Some(slice_labels(service)),
            owner_references: Some(vec![controller_ref(service)]),
            ..Default::default()
        },
        address_type: family.to_owned(),
        endpoints: Vec::new(),
        ports: Some(ports),
    }
}

/// What makes two endpoints the same one, however its state differs.
pub fn identity(endpoint: &Endpoint) -> String {
    let mut addresses = endpoint.addresses.clone();
    addresses.sort();
    let target = endpoint.target_ref.clone().unwrap_or_default();
    format!(
        "{}|{}|{}/{}/{}",
        addresses.join(","),
        endpoint.hostname.as_deref().unwrap_or_default(),
        target.kind.unwrap_or_default(),
        target.namespace.unwrap_or_default(),
        target.name.unwrap_or_default()
    )
}

fn same_state(left: &Endpoint, right: &Endpoint) -> bool {
    let target = |endpoint: &Endpoint| endpoint.target_ref.as_ref().and_then(|target| target.uid.clone());
    left.conditions == right.conditions
        && left.node_name == right.node_name
        && left.zone == right.zone
        && left.deprecated_topology == right.deprecated_topology
        && target(left) == target(right)
}

type Wanted = BTreeMap<String, Endpoint>;

pub fn plan(service: &Service, pods: &[Arc<Pod>], node: impl Fn(&str) -> Option<Arc<Node>>, existing: &[Arc<EndpointSlice>]) -> Plan {
    let families = families(service);
    let mut plan = Plan { changes: Changes::default(), without_node: None };
    for family in &families {
        let mut groups: BTreeMap<String, (Vec<EndpointPort>, Wanted)> = BTreeMap::new();
        for pod in pods.iter().filter(|pod| has_endpoint(pod, true)) {
            let ports = ports(service, pod);
            let group = groups.entry(port_key(&ports)).or_insert_with(|| (ports, Wanted::new()));
            let node = node(pod_node(pod));
            if node.is_none() && !publishes_unready(service) {
                plan.without_node.get_or_insert_with(|| Key::of(&**pod).to_string());
                continue;
            }
            let endpoint = endpoint(pod, node.as_deref(), service, family);
            if !endpoint.addresses.is_empty() {
                group.1.insert(identity(&endpoint), endpoint);
            }
        }
        let own: Vec<_> = existing.iter().filter(|slice| &slice.address_type == family).cloned().collect();
        let changes = plan_family(service, family, groups, &own);
        plan.changes.create.extend(changes.create);
        plan.changes.update.extend(changes.update);
        plan.changes.delete.extend(changes.delete);
    }
    let stray = existing.iter().filter(|slice| !families.contains(&slice.address_type));
    plan.changes.delete.extend(stray.map(|slice| (**slice).clone()));
    plan
}

fn plan_family(
    service: &Service,
    family: &str,
    groups: BTreeMap<String, (Vec<EndpointPort>, Wanted)>,
    existing: &[Arc<EndpointSlice>],
) -> Changes {
    let mut changes = Changes::default();
    let mut by_ports: BTreeMap<String, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
    for slice in existing {
        let owned = slice.metadata.owner_references.iter().flatten().any(|owner| owner.uid == uid(&service.metadata));
        if owned {
            by_ports.entry(port_key(slice.ports.as_deref().unwrap_or_default())).or_default().push(slice.clone());
        } else {
            changes.delete.push((**slice).clone());
        }
    }
    for (key, (ports, wanted)) in groups {
        let have = by_ports.remove(&key).unwrap_or_default();
        fill(service, family, ports, wanted, &have, &mut changes);
    }
    changes.delete.extend(by_ports.into_values().flatten().map(|slice| (*slice).clone()));
    keep_placeholder(service, family, existing, &mut changes);
    hints::reconcile(service, existing, &mut changes);
    recycle(service, &mut changes);
    changes
}

/// Brings the slices of one set of ports to hold `wanted`, touching as few of them as possible.
fn fill(service: &Service, family: &str, ports: Vec<EndpointPort>, mut wanted: Wanted, have: &[Arc<EndpointSlice>], changes: &mut Changes) {
    let labels = slice_labels(service);
    let mut touched: Vec<EndpointSlice> = Vec::new();
    let mut untouched: Vec<Arc<EndpointSlice>> = Vec::new();
    for slice in have {
        let mut differs = false;
        let mut kept = Vec::with_capacity(slice.endpoints.len());
        for held in &slice.endpoints {
            if let Some(mut endpoint) = wanted.remove(&identity(held)) {
                differs |= !same_state(&endpoint, held);
                endpoint.hints = held.hints.clone();
                kept.push(endpoint);
            }
        }
        let fewer = kept.len() != slice.endpoints.len();
        if (differs || fewer) && kept.is_empty() {
            changes.delete.push((**slice).clone());
        } else if differs || fewer || labels_differ(slice, &labels) {
            let mut updated = (**slice).clone();
            updated.endpoints = kept;
            updated.metadata.labels = Some(labels.clone());
            touched.push(updated);
        } else {
            untouched.push(slice.clone());
        }
    }
    touched.sort_by_key(|slice| std::cmp::Reverse(slice.endpoints.len()));
    for slice in &mut touched {
        take(&mut wanted, slice);
    }
    changes.update.extend(touched);
    while !wanted.is_empty() {
        let room = |slice: &Arc<EndpointSlice>| MAX_ENDPOINTS.checked_sub(slice.endpoints.len() + wanted.len());
        let best = untouched.iter().enumerate().filter_map(|(place, slice)| Some((room(slice)?, place))).min();
        match best.filter(|_| wanted.len() < MAX_ENDPOINTS) {
            Some((_, place)) => {
                let mut slice = (*untouched.remove(place)).clone();
                take(&mut wanted, &mut slice);
                changes.update.push(slice);
            }
            None => {
                let mut slice = new_slice(service, family, ports.clone());
                take(&mut wanted, &mut slice);
                changes.create.push(slice);
            }
        }
    }
}

fn take(wanted: &mut Wanted, slice: &mut EndpointSlice) {
    while slice.endpoints.len() < MAX_ENDPOINTS
        && let Some((_, endpoint)) = wanted.pop_first()
    {
        slice.endpoints.push(endpoint);
    }
}

/// A Service without endpoints has one empty slice.
fn keep_placeholder(service: &Service, family: &str, existing: &[Arc<EndpointSlice>], changes: &mut Changes) {
    if existing.len() != changes.delete.len() || !changes.create.is_empty() {
        return;
    }
    let placeholder = new_slice(service, family, Vec::new());
    let there = changes.delete.len() == 1 && {
        let only = &changes.delete[0];
        only.endpoints.is_empty()
            && only.ports.as_ref().is_none_or(Vec::is_empty)
            && only.metadata.labels == placeholder.metadata.labels
            && only.metadata.owner_references == placeholder.metadata.owner_references
    };
    if there {
        changes.delete.clear();
    } else {
        changes.create.push(placeholder);
    }
}

/// A slice to delete and one to create are one slice to update.
fn recycle(service: &Service, changes: &mut Changes) {
    let mut left = Vec::new();
    for old in std::mem::take(&mut changes.delete) {
        let owned = old.metadata.owner_references.iter().flatten().any(|owner| owner.uid == uid(&service.metadata));
        match changes.create.pop_if(|new| owned && new.address_type == old.address_type) {
            Some(mut new) => {
                new.metadata.generate_name = old.metadata.generate_name;
                new.metadata.name = old.metadata.name;
                new.metadata.resource_version = old.metadata.resource_version;
                changes.update.push(new);
            }
            None => left.push(old),
        }
    }
    changes.delete = left;
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodCondition, PodIP, PodSpec, PodStatus, ServiceSpec};

    use super::*;

    fn service() -> Service {
        Service {
            metadata: ObjectMeta {
                name: Some("web".into()),
                namespace: Some("default".into()),
                uid: Some("svc".into()),
                ..Default::default()
            },
            spec: Some(ServiceSpec {
                cluster_ip: Some("10.96.0.7".into()),
                ip_families: Some(vec!["IPv4".into()]),
                ports: Some(vec![ServicePort {
                    name: Some("http".into()),
                    port: 80,
                    target_port: Some(IntOrString::Int(8080)),
                    ..Default::default()
                }]),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn pod(number: usize, ready: bool) -> Arc<Pod> {
        Arc::new(Pod {
            metadata: ObjectMeta {
                name: Some(format!("p{number}")),
                namespace: Some("default".into()),
                uid: Some(format!("u{number}")),
                ..Default::default()
            },
            spec: Some(PodSpec { node_name: Some("n1".into()), ..Default::default() }),
            status: Some(PodStatus {
                phase: Some("Running".into()),
                pod_ips: Some(vec![PodIP { ip: format!("10.244.{}.{}", number / 250, number % 250 + 1) }]),
                conditions: Some(vec![PodCondition {
                    type_: "Ready".into(),
                    status: if ready { "True" } else { "False" }.into(),
                    ..Default::default()
                }]),
                ..Default::default()
            }),
        })
    }

    fn node(name: &str) -> Option<Arc<Node>> {
        let mut node = Node::default();
        node.metadata.name = Some(name.into());
        node.metadata.labels = Some([("topology.kubernetes.io/zone".to_owned(), "a".to_owned())].into());
        Some(Arc::new(node))
    }

    /// As the API server would store them.
    fn stored(changes: &Changes) -> Vec<Arc<EndpointSlice>> {
        let named = |(number, slice): (usize, &EndpointSlice)| {
            let mut slice = slice.clone();
            slice.metadata.name.get_or_insert_with(|| format!("web-{number}"));
            Arc::new(slice)
        };
        changes.create.iter().chain(&changes.update).enumerate().map(named).collect()
    }

    #[test]
    fn endpoints_show_what_their_pods_are() {
        let first = plan(&service(), &[pod(1, true), pod(2, false)], node, &[]).changes;
        let slice = &first.create[0];
        assert_eq!(slice.endpoints.len(), 2);
        let state = |number: usize| slice.endpoints[number].conditions.clone().unwrap();
        assert_eq!((state(0).ready, state(0).serving, state(1).ready), (Some(true), Some(true), Some(false)));
        assert_eq!(slice.endpoints[0].zone.as_deref(), Some("a"));
        assert_eq!(slice.ports.as_ref().unwrap()[0].port, Some(8080));
        let again = plan(&service(), &[pod(1, true), pod(2, false)], node, &stored(&first)).changes;
        assert_eq!(again, Changes::default(), "nothing to do the second time");
        let changed = plan(&service(), &[pod(1, true), pod(2, true)], node, &stored(&first)).changes;
        assert_eq!((changed.create.len(), changed.update.len(), changed.delete.len()), (0, 1, 0));
    }

    #[test]
    fn a_hundred_endpoints_fill_a_slice_and_few_slices_change() {
        let mut pods: Vec<_> = (0..250).map(|number| pod(number, true)).collect();
        let first = plan(&service(), &pods, node, &[]).changes;
        assert_eq!(first.create.iter().map(|slice| slice.endpoints.len()).collect::<Vec<_>>(), [100, 100, 50]);
        pods.push(pod(900, true));
        let second = plan(&service(), &pods, node, &stored(&first)).changes;
        assert_eq!((second.create.len(), second.update.len()), (0, 1));
        assert_eq!(second.update[0].endpoints.len(), 51);
    }

    #[test]
    fn no_endpoints_leave_one_placeholder() {
        let empty = plan(&service(), &[], node, &[]).changes;
        assert_eq!((empty.create.len(), empty.create[0].endpoints.len()), (1, 0));
        assert_eq!(plan(&service(), &[], node, &stored(&empty)).changes, Changes::default());
        let filled = plan(&service(), &[pod(1, true)], node, &stored(&empty)).changes;
        assert_eq!((filled.create.len(), filled.update.len(), filled.delete.len()), (0, 1, 0), "the placeholder is used");
    }

    #[test]
    fn a_pod_on_an_unknown_node_waits() {
        let plan = plan(&service(), &[pod(1, true)], |_| None, &[]);
        assert_eq!(plan.without_node.as_deref(), Some("default/p1"));
        assert!(plan.changes.create[0].endpoints.is_empty());
    }
}
