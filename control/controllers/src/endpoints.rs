//! Endpoints: the older, single-object form of a Service's addresses.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints, ObjectReference, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::DeleteParams;
use tokio::task::JoinSet;

use crate::Context;
use crate::endpointslice::plan::{find_port, has_endpoint, hostname, is_headless, publishes_unready};
use crate::endpointslice::{HEADLESS, trigger::TriggerTimes, watch_services_and_pods};
use crate::error::unless_gone;
use crate::events::Recorder;
use crate::informers::Informers;
use crate::objects::{Key, Labels, annotation, is_ready, labels, name, pod_node, selects_all_of};
use crate::worker::{self, Outcome, Queue};

pub const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
pub const CONTROLLER: &str = "endpoint-controller";
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Addresses per object; what is beyond is cut off.
const CAPACITY: usize = 1000;

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    watch_services_and_pods(&context.informers, &queue);
    let add = queue.clone();
    context.informers.endpoints.on_change(move |old, new| {
        if let (Some(gone), None) = (old, new) {
            add.add(Key::of(&**gone));
        }
    });
    let informers = context.informers.clone();
    let recorder = context.recorder.named(CONTROLLER);
    let triggers = Arc::<Mutex<TriggerTimes>>::default();
    tasks.spawn(worker::run("endpoint", queue, 5, move |key| sync(informers.clone(), recorder.clone(), triggers.clone(), key)));
}

async fn sync(informers: Arc<Informers>, recorder: Recorder, triggers: Arc<Mutex<TriggerTimes>>, key: Key) -> Outcome {
    let current = informers.endpoints.get(&key);
    let Some(service) = informers.services.get(&key) else {
        triggers.lock().unwrap_or_else(PoisonError::into_inner).forget(&key);
        if let Some(left) = current {
            unless_gone(informers.endpoints.delete(&left, DeleteParams::default()).await)?;
        }
        return Ok(None);
    };
    let Some(spec) = service.spec.as_ref().filter(|spec| spec.type_.as_deref() != Some("ExternalName") && spec.selector.is_some()) else {
        return Ok(None);
    };
    let pods = informers.pods.select(&key.namespace, |pod| selects_all_of(spec.selector.as_ref(), labels(&pod.metadata)));
    let trigger = triggers.lock().unwrap_or_else(PoisonError::into_inner).observe(&key, &service, &pods);
    let Some(wanted) = plan(&service, &pods, current.as_deref(), trigger) else { return Ok(None) };
    let result = if current.is_some() { informers.endpoints.update(&wanted).await } else { informers.endpoints.create(&wanted).await };
    match result {
        Ok(_) => Ok(None),
        Err(error) if error.is_namespace_terminating() => Ok(None),
        Err(error) if error.is_conflict() => Err(error),
        Err(error) => {
            let (reason, verb, what) = match current {
                Some(_) => ("FailedToUpdateEndpoint", "update", "endpoint"),
                None => ("FailedToCreateEndpoint", "create", "endpoint for service"),
            };
            recorder.warning(&wanted, reason, format!("Failed to {verb} {what} {key}: {}", error.message()));
            Err(error)
        }
    }
}

/// The address by which a pod answers for a Service: of the family of its cluster IP, or of its only family.
fn address(service: &Service, pod: &Pod) -> Option<EndpointAddress> {
    let spec = service.spec.as_ref()?;
    let six = match spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty() && *ip != "None") {
        Some(ip) => ip.contains(':'),
        None => spec.ip_families.as_ref().and_then(|families| families.first()).is_some_and(|family| family == "IPv6"),
    };
    let status = pod.status.as_ref()?;
    let ips = status.pod_ips.iter().flatten().map(|ip| &ip.ip).chain(&status.pod_ip);
    let ip = ips.filter_map(|text| text.parse::<IpAddr>().ok()).find(|ip| ip.is_ipv6() == six)?;
    Some(EndpointAddress {
        ip: ip.to_string(),
        hostname: hostname(pod, service),
        node_name: Some(pod_node(pod).to_owned()).filter(|name| !name.is_empty()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..Default::default()
        }),
    })
}

/// The object to write; None when the current one says the same.
fn plan(service: &Service, pods: &[Arc<Pod>], current: Option<&Endpoints>, trigger: Option<String>) -> Option<Endpoints> {
    let mut subsets = repack(one_by_one(service, pods));
    let truncated = truncate(&mut subsets);
    let mut wanted_labels = labels(&service.metadata).clone();
    wanted_labels.remove(HEADLESS);
    if is_headless(service) {
        wanted_labels.insert(HEADLESS.into(), String::new());
    }
    wanted_labels.insert(MANAGED_BY.into(), CONTROLLER.into());
    if let Some(current) = current
        && current.subsets.clone().unwrap_or_default() == subsets
        && labels(&current.metadata) == &wanted_labels
        && (annotation(&current.metadata, OVER_CAPACITY) == Some("truncated")) == truncated
    {
        return None;
    }
    let mut wanted = current.cloned().unwrap_or_else(|| Endpoints {
        metadata: ObjectMeta { name: service.metadata.name.clone(), namespace: service.metadata.namespace.clone(), ..Default::default() },
        subsets: None,
    });
    wanted.subsets = Some(subsets);
    wanted.metadata.labels = Some(wanted_labels);
    let annotations = wanted.metadata.annotations.get_or_insert_default();
    let mut annotate = |key: &str, value: Option<String>| match value {
        Some(value) => drop(annotations.insert(key.to_owned(), value)),
        None => drop(annotations.remove(key)),
    };
    annotate(TRIGGER_TIME, trigger);
    annotate(OVER_CAPACITY, truncated.then(|| "truncated".to_owned()));
    Some(wanted)
}

/// A subset per pod and port.
fn one_by_one(service: &Service, pods: &[Arc<Pod>]) -> Vec<EndpointSubset> {
    let ports: Vec<_> = service.spec.iter().flat_map(|spec| spec.ports.clone().unwrap_or_default()).collect();
    let mut subsets = Vec::new();
    for pod in pods.iter().filter(|pod| has_endpoint(pod, publishes_unready(service))) {
        let Some(address) = address(service, pod) else { continue };
        let ready = publishes_unready(service) || is_ready(pod);
        let mut add = |port: Option<EndpointPort>| {
            let (addresses, not_ready) = if ready { (Some(vec![address.clone()]), None) } else { (None, Some(vec![address.clone()])) };
            subsets.push(EndpointSubset { addresses, not_ready_addresses: not_ready, ports: port.map(|port| vec![port]) });
        };
        if ports.is_empty() && is_headless(service) {
            add(None);
        }
        for port in &ports {
            let Some(number) = find_port(pod, port) else { continue };
            add(Some(EndpointPort {
                name: port.name.clone().filter(|name| !name.is_empty()),
                port: number,
                protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".into())),
                app_protocol: port.app_protocol.clone(),
            }));
        }
    }
    subsets
}

fn port_order(port: &EndpointPort) -> (String, i32, String) {
    (port.name.clone().unwrap_or_default(), port.port, port.protocol.clone().unwrap_or_default())
}

fn address_key(address: &EndpointAddress) -> (String, String) {
    (address.ip.clone(), address.target_ref.as_ref().and_then(|target| target.uid.clone()).unwrap_or_default())
}

/// Brings subsets to their one canonical form: addresses with all the same ports share a subset, all is sorted.
pub fn repack(subsets: Vec<EndpointSubset>) -> Vec<EndpointSubset> {
    // Per address: whether it's ready, itself, and its ports.
    type Entry = (bool, EndpointAddress, BTreeMap<(String, i32, String), EndpointPort>);
    let mut by_address: BTreeMap<(bool, String, String), Entry> = BTreeMap::new();
    for subset in subsets {
        let ready = subset.addresses.into_iter().flatten().map(|address| (true, address));
        let unready = subset.not_ready_addresses.into_iter().flatten().map(|address| (false, address));
        for (ready, address) in ready.chain(unready) {
            let (ip, target) = address_key(&address);
            let entry = by_address.entry((!ready, ip, target)).or_insert_with(|| (ready, address, BTreeMap::new()));
            for port in subset.ports.iter().flatten() {
                entry.2.insert(port_order(port), port.clone());
            }
        }
    }
    let mut by_ports: BTreeMap<Vec<(String, i32, String)>, EndpointSubset> = BTreeMap::new();
    for (ready, address, ports) in by_address.into_values() {
        let subset = by_ports
            .entry(ports.keys().cloned().collect())
            .or_insert_with(|| EndpointSubset { ports: (!ports.is_empty()).then(|| ports.into_values().collect()), ..Default::default() });
        let list = if ready { &mut subset.addresses } else { &mut subset.not_ready_addresses };
        list.get_or_insert_default().push(address);
    }
    by_ports.into_values().collect()
}

/// Cuts to the capacity, ready addresses last; whether anything was cut.
fn truncate(subsets: &mut [EndpointSubset]) -> bool {
    let count = |list: &Option<Vec<EndpointAddress>>| list.as_ref().map_or(0, Vec::len);
    let ready: usize = subsets.iter().map(|subset| count(&subset.addresses)).sum();
    let unready: usize = subsets.iter().map(|subset| count(&subset.not_ready_addresses)).sum();
    if ready + unready <= CAPACITY {
        return false;
    }
    let cut_ready = ready > CAPACITY;
    let (room, total) = if cut_ready { (CAPACITY, ready) } else { (CAPACITY - ready, unready) };
    let mut left = room;
    for subset in subsets {
        let list = if cut_ready { &mut subset.addresses } else { &mut subset.not_ready_addresses };
        let share = (count(list) * room).div_ceil(total).min(left);
        if let Some(addresses) = list {
            addresses.truncate(share);
            left -= addresses.len();
        }
        if cut_ready {
            subset.not_ready_addresses = None;
        }
    }
    true
}

/// The name of the Service that an Endpoints object belongs to, when this controller keeps it.
pub fn is_kept(endpoints: &Endpoints) -> bool {
    labels(&endpoints.metadata).get(MANAGED_BY).is_some_and(|by| by == CONTROLLER) && !name(&endpoints.metadata).is_empty()
}

/// Labels that say who keeps an object and aren't mirrored.
pub fn own_labels(meta: &ObjectMeta) -> Labels {
    labels(meta).iter().filter(|(key, _)| *key != MANAGED_BY).map(|(key, value)| (key.clone(), value.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subset(ips: &[&str], unready: &[&str], ports: &[i32]) -> EndpointSubset {
        let list = |ips: &[&str]| {
            (!ips.is_empty()).then(|| ips.iter().map(|ip| EndpointAddress { ip: (*ip).into(), ..Default::default() }).collect())
        };
        EndpointSubset {
            addresses: list(ips),
            not_ready_addresses: list(unready),
            ports: Some(ports.iter().map(|port| EndpointPort { port: *port, ..Default::default() }).collect()),
        }
    }

    #[test]
    fn addresses_with_equal_ports_share_a_subset() {
        let scattered = vec![
            subset(&["10.0.0.2"], &[], &[80]),
            subset(&["10.0.0.1"], &[], &[80]),
            subset(&["10.0.0.1"], &[], &[443]),
            subset(&["10.0.0.2"], &[], &[443]),
            subset(&[], &["10.0.0.3"], &[80]),
        ];
        assert_eq!(repack(scattered), [subset(&[], &["10.0.0.3"], &[80]), subset(&["10.0.0.1", "10.0.0.2"], &[], &[80, 443])]);
    }

    #[test]
    fn what_is_over_capacity_is_cut_unready_first() {
        let ips: Vec<String> = (0..900).map(|number| format!("10.0.{}.{}", number / 250, number % 250)).collect();
        let unready: Vec<String> = (0..200).map(|number| format!("10.9.0.{number}")).collect();
        let refs = |list: &[String]| list.iter().map(String::clone).collect::<Vec<_>>();
        let (ready, waiting) = (refs(&ips), refs(&unready));
        let mut subsets = vec![subset(
            &ready.iter().map(String::as_str).collect::<Vec<_>>(),
            &waiting.iter().map(String::as_str).collect::<Vec<_>>(),
            &[80],
        )];
        assert!(truncate(&mut subsets));
        assert_eq!(subsets[0].addresses.as_ref().unwrap().len(), 900);
        assert_eq!(subsets[0].not_ready_addresses.as_ref().unwrap().len(), 100);
    }
}
