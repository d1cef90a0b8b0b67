//! EndpointSlices for Endpoints that people write themselves, of Services without a selector.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{EndpointAddress, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tokio::task::JoinSet;

use crate::Context;
use crate::endpoints::{is_kept, own_labels, repack};
use crate::endpointslice::plan::{Changes, identity};
use crate::endpointslice::{MANAGED_BY, SERVICE_NAME, apply, is_managed_by};
use crate::events::Recorder;
use crate::informers::Informers;
use crate::objects::{Key, Labels, annotation, controller_ref, is_terminating, labels, name, namespace};
use crate::worker::{self, Outcome, Queue};

const CONTROLLER: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Addresses mirrored per subset.
const LIMIT: usize = 1000;
/// Annotations that say something about the Endpoints object alone.
const NOT_COPIED: [&str; 2] = ["endpoints.kubernetes.io/last-change-trigger-time", "kubectl.kubernetes.io/last-applied-configuration"];

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.endpoints.on_change(move |old, new| {
        if let Some(endpoints) = new.or(old).filter(|endpoints| !is_kept(endpoints)) {
            add.add(Key::of(&**endpoints));
        }
    });
    let add = queue.clone();
    context.informers.services.on_change(move |old, new| {
        let selects = |service: Option<&Arc<Service>>| service.is_some_and(|service| has_selector(service));
        if let Some(service) = new.or(old)
            && (selects(old) != selects(new) || !selects(new) && (old.is_none() || new.is_none()))
        {
            add.add(Key::of(&**service));
        }
    });
    let add = queue.clone();
    context.informers.endpoint_slices.on_change(move |old, new| {
        if let Some(slice) = new.or(old).filter(|slice| is_managed_by(slice, CONTROLLER))
            && let Some(service) = labels(&slice.metadata).get(SERVICE_NAME)
        {
            add.add(Key::new(namespace(&slice.metadata), service.clone()));
        }
    });
    let informers = context.informers.clone();
    let recorder = context.recorder.named("endpoint-slice-mirroring-controller");
    tasks.spawn(worker::run("endpointslicemirroring", queue, 5, move |key| sync(informers.clone(), recorder.clone(), key)));
}

fn has_selector(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|spec| spec.selector.is_some())
}

fn is_mirrored(endpoints: &Endpoints) -> bool {
    labels(&endpoints.metadata).get(SKIP).is_none_or(|skip| skip != "true")
        && annotation(&endpoints.metadata, "control-plane.alpha.kubernetes.io/leader").is_none()
}

async fn sync(informers: Arc<Informers>, recorder: Recorder, key: Key) -> Outcome {
    let slices = informers
        .endpoint_slices
        .select(&key.namespace, |slice| is_managed_by(slice, CONTROLLER) && labels(&slice.metadata).get(SERVICE_NAME) == Some(&key.name));
    let service = informers.services.get(&key).filter(|service| !has_selector(service));
    let endpoints = informers.endpoints.get(&key).filter(|endpoints| service.is_some() && is_mirrored(endpoints));
    let changes = match &endpoints {
        None => Changes { delete: slices.iter().map(|slice| (**slice).clone()).collect(), ..Default::default() },
        Some(endpoints) => {
            let plan = plan(endpoints, &slices);
            if plan.invalid > 0 {
                let message = format!("Skipped {} invalid IP addresses when mirroring to EndpointSlices", plan.invalid);
                recorder.warning(&**endpoints, "InvalidIPAddress", message);
            }
            if plan.skipped > 0 {
                let message = format!(
                    "A max of {LIMIT} addresses can be mirrored to EndpointSlices per Endpoints subset. {} addresses were skipped",
                    plan.skipped
                );
                recorder.warning(&**endpoints, "TooManyAddressesToMirror", message);
            }
            plan.changes
        }
    };
    let dying = endpoints.as_ref().is_some_and(|endpoints| is_terminating(&endpoints.metadata));
    match apply(&informers.endpoint_slices, &changes, None, dying).await {
        Err(error) if error.is_namespace_terminating() => Ok(None),
        Err(error) => {
            if let (Some(endpoints), false) = (&endpoints, error.is_conflict()) {
                let message = format!("Error updating EndpointSlices for Endpoints {key}: {}", error.message());
                recorder.warning(&**endpoints, "FailedToUpdateEndpointSlices", message);
            }
            Err(error)
        }
        Ok(()) => Ok(None),
    }
}

struct Plan {
    changes: Changes,
    invalid: usize,
    skipped: usize,
}

struct Group {
    family: &'static str,
    ports: Vec<EndpointPort>,
    endpoints: BTreeMap<String, Endpoint>,
}

fn key_of(family: &str, ports: &[EndpointPort]) -> String {
    let mut parts: Vec<String> = ports.iter().map(|port| format!("{:?}/{:?}/{:?}", port.name, port.port, port.protocol)).collect();
    parts.sort();
    format!("{family}:{}", parts.join(","))
}

fn plan(endpoints: &Endpoints, existing: &[Arc<EndpointSlice>]) -> Plan {
    let mut plan = Plan { changes: Changes::default(), invalid: 0, skipped: 0 };
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for subset in repack(endpoints.subsets.clone().unwrap_or_default()) {
        let ports: Vec<EndpointPort> = subset.ports.iter().flatten().map(to_port).collect();
        let ready = subset.addresses.iter().flatten().map(|address| (address, true));
        let unready = subset.not_ready_addresses.iter().flatten().map(|address| (address, false));
        let mut added = 0;
        for (address, ready) in ready.chain(unready) {
            let Ok(ip) = address.ip.parse::<IpAddr>() else {
                plan.invalid += 1;
                continue;
            };
            if added >= LIMIT {
                plan.skipped += 1;
                continue;
            }
            added += 1;
            let family = if ip.is_ipv6() { "IPv6" } else { "IPv4" };
            let group =
                groups.entry(key_of(family, &ports)).or_insert_with(|| Group { family, ports: ports.clone(), endpoints: BTreeMap::new() });
            let endpoint = to_endpoint(address, ip, ready);
            group.endpoints.insert(identity(&endpoint), endpoint);
        }
    }
    let mut by_key: BTreeMap<String, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
    for slice in existing {
        by_key.entry(key_of(&slice.address_type, slice.ports.as_deref().unwrap_or_default())).or_default().push(slice.clone());
    }
    for (key, group) in groups {
        let mut have = by_key.remove(&key).unwrap_or_default();
        let first = (!have.is_empty()).then(|| have.remove(0));
        plan.changes.delete.extend(have.iter().map(|slice| (**slice).clone()));
        let wanted = slice_of(endpoints, group, first.as_deref());
        match first {
            None => plan.changes.create.push(wanted),
            Some(first) if *first != wanted => plan.changes.update.push(wanted),
            Some(_) => {}
        }
    }
    plan.changes.delete.extend(by_key.into_values().flatten().map(|slice| (*slice).clone()));
    plan
}

fn to_port(port: &k8s_openapi::api::core::v1::EndpointPort) -> EndpointPort {
    EndpointPort {
        name: Some(port.name.clone().unwrap_or_default()),
        port: Some(port.port),
        protocol: port.protocol.clone(),
        app_protocol: port.app_protocol.clone(),
    }
}

fn to_endpoint(address: &EndpointAddress, ip: IpAddr, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![ip.to_string()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..Default::default() }),
        target_ref: address.target_ref.clone(),
        node_name: address.node_name.clone(),
        hostname: address.hostname.clone().filter(|hostname| !hostname.is_empty()),
        ..Default::default()
    }
}

/// The slice for a group, in the place of `current` if there is one. An order that is only different is kept.
fn slice_of(endpoints: &Endpoints, mut group: Group, current: Option<&EndpointSlice>) -> EndpointSlice {
    let mut slice_labels: Labels = own_labels(&endpoints.metadata);
    slice_labels.insert(SERVICE_NAME.into(), name(&endpoints.metadata).to_owned());
    slice_labels.insert(MANAGED_BY.into(), CONTROLLER.into());
    let annotations: Labels = endpoints
        .metadata
        .annotations
        .iter()
        .flatten()
        .filter(|(key, _)| !NOT_COPIED.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let held = current.into_iter().flat_map(|slice| &slice.endpoints);
    let mut list: Vec<Endpoint> = held.filter_map(|endpoint| group.endpoints.remove(&identity(endpoint))).collect();
    list.extend(group.endpoints.into_values());
    list.truncate(LIMIT);
    let metadata = match current {
        Some(current) => current.metadata.clone(),
        None => ObjectMeta {
            generate_name: Some(format!("{}-", name(&endpoints.metadata))),
            namespace: endpoints.metadata.namespace.clone(),
            ..Default::default()
        },
    };
    EndpointSlice {
        metadata: ObjectMeta {
            labels: Some(slice_labels),
            annotations: (!annotations.is_empty()).then_some(annotations),
            owner_references: Some(vec![controller_ref(endpoints)]),
            ..metadata
        },
        address_type: group.family.into(),
        endpoints: list,
        ports: Some(group.ports),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::EndpointSubset;

    use super::*;

    #[test]
    fn custom_endpoints_are_mirrored_once_per_family_and_ports() {
        let mut endpoints = Endpoints::default();
        endpoints.metadata.name = Some("ext".into());
        endpoints.metadata.uid = Some("e".into());
        let address = |ip: &str| EndpointAddress { ip: ip.into(), ..Default::default() };
        endpoints.subsets = Some(vec![EndpointSubset {
            addresses: Some(vec![address("192.0.2.1"), address("2001:db8::1"), address("nonsense")]),
            not_ready_addresses: None,
            ports: Some(vec![k8s_openapi::api::core::v1::EndpointPort { port: 80, ..Default::default() }]),
        }]);
        let first = plan(&endpoints, &[]);
        assert_eq!((first.changes.create.len(), first.invalid), (2, 1));
        let stored: Vec<_> = first
            .changes
            .create
            .into_iter()
            .enumerate()
            .map(|(number, mut slice)| {
                slice.metadata.name = Some(format!("ext-{number}"));
                Arc::new(slice)
            })
            .collect();
        assert_eq!(plan(&endpoints, &stored).changes, Changes::default());
        endpoints.subsets = None;
        assert_eq!(plan(&endpoints, &stored).changes.delete.len(), 2);
    }
}
