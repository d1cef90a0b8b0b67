//! API objects read into the compact model. What the Service path must leave alone reads as nothing.
use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{LoadBalancerIngress, Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{Hints, HostPort, Interner, ServicePort, ServiceSpec, Slice, SliceEndpoint, SlicePort};
use crate::names::{Family, Protocol, ServiceName};
use crate::table::Balancing;

/// Somebody else serves objects that carry this label.
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// What the API server defaults `sessionAffinityConfig.clientIP.timeoutSeconds` to.
const AFFINITY_SECONDS: i32 = 10800;

pub(super) fn service(service: &Service, interner: &mut Interner) -> Option<ServiceSpec> {
    let spec = service.spec.as_ref()?;
    if has_label(&service.metadata.labels, PROXY_NAME_LABEL) || spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let cluster_ips = match &spec.cluster_ips {
        Some(all) if !all.is_empty() => ips(all),
        _ => ips(spec.cluster_ip.as_slice()),
    };
    if cluster_ips.is_empty() {
        return None; // headless ("None"), or not allocated yet
    }
    let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
    let external_ips = ips(spec.external_ips.as_deref().unwrap_or_default());
    // Only these Services are reachable from outside, so only for them the external policy means something.
    let external = matches!(kind, "NodePort" | "LoadBalancer") || !external_ips.is_empty();
    let external_local = external && spec.external_traffic_policy.as_deref() == Some("Local");
    let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let client_ip = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        client_ip.and_then(|config| config.timeout_seconds).unwrap_or(AFFINITY_SECONDS).max(1).unsigned_abs()
    });
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        Some(ServicePort {
            name: interner.intern(port.name.as_deref().unwrap_or_default()),
            protocol: Protocol::parse(port.protocol.as_deref())?,
            port: port_number(port.port)?,
            node_port: port.node_port.and_then(port_number).unwrap_or(0),
        })
    });
    let ingress = service.status.iter().filter_map(|status| status.load_balancer.as_ref()).flat_map(|lb| lb.ingress.iter().flatten());
    Some(ServiceSpec {
        ports: ports.collect(),
        cluster_ips,
        external_ips,
        load_balancer_ips: ingress.filter_map(ingress_ip).collect(),
        affinity,
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        external_local,
        source_ranges: source_ranges(spec.load_balancer_source_ranges.as_deref().unwrap_or_default()),
        balancing: balancing(&service.metadata).and_then(Balancing::parse).unwrap_or_default(),
        health_check_port: if kind == "LoadBalancer" && external_local {
            spec.health_check_node_port.and_then(port_number).unwrap_or(0)
        } else {
            0
        },
    })
}

fn balancing(meta: &ObjectMeta) -> Option<&str> {
    meta.annotations.as_ref()?.get(Balancing::ANNOTATION).map(String::as_str)
}

/// What of the Service's annotations means nothing.
pub(super) fn warning(meta: &ObjectMeta) -> Option<String> {
    let unknown = balancing(meta).filter(|text| Balancing::parse(text).is_none())?;
    let (namespace, name) = (meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default());
    let annotation = Balancing::ANNOTATION;
    Some(format!(
        "Service {namespace}/{name}: {annotation} is one of random and least-connections, not {unknown:?}: backends are chosen at random"
    ))
}

/// The address, unless the load balancer delivers to the nodes itself (`ipMode: Proxy`).
fn ingress_ip(ingress: &LoadBalancerIngress) -> Option<IpAddr> {
    if ingress.ip_mode.as_deref().is_some_and(|mode| mode != "VIP") {
        return None;
    }
    ingress.ip.as_deref().and_then(|ip| ip.parse().ok())
}

/// Validation lets padded ranges through, so they are trimmed here; a range of everything means none, per family.
fn source_ranges(texts: &[String]) -> Box<[IpNet]> {
    let ranges: Vec<IpNet> = texts.iter().filter_map(|text| text.trim().parse().ok()).map(|net: IpNet| net.trunc()).collect();
    let open = |v4: bool| ranges.iter().any(|net| net.addr().is_ipv4() == v4 && net.prefix_len() == 0);
    let (open4, open6) = (open(true), open(false));
    ranges.into_iter().filter(|net| !(if net.addr().is_ipv4() { open4 } else { open6 })).collect()
}

/// The slice, and the name of its Service, which is in the same namespace.
pub(super) fn slice<'a>(object: &'a EndpointSlice, name: &ServiceName, node: &str, interner: &mut Interner) -> Option<(&'a str, Slice)> {
    let labels = &object.metadata.labels;
    if has_label(labels, PROXY_NAME_LABEL) || has_label(labels, HEADLESS_LABEL) {
        return None;
    }
    let family = match object.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        _ => return None,
    };
    let service = labels.as_ref()?.get(SERVICE_NAME_LABEL).filter(|name| !name.is_empty())?;
    let ports = object.ports.iter().flatten().filter_map(|port| {
        Some(SlicePort {
            name: interner.intern(port.name.as_deref().unwrap_or_default()),
            protocol: Protocol::parse(port.protocol.as_deref())?,
            port: port_number(port.port?)?,
        })
    });
    let ports = ports.collect();
    let endpoints = object.endpoints.iter().filter_map(|endpoint| slice_endpoint(endpoint, family, node, interner)).collect();
    Some((service, Slice { name: name.clone(), family, ports, endpoints }))
}

fn slice_endpoint(endpoint: &Endpoint, family: Family, node: &str, interner: &mut Interner) -> Option<SliceEndpoint> {
    // The first address is the one to use; the others are of no defined meaning.
    let ip: IpAddr = endpoint.addresses.first()?.parse().ok()?;
    if Family::of(ip) != family {
        return None;
    }
    let conditions = endpoint.conditions.as_ref();
    let hints = endpoint.hints.as_ref().map(|hints| Hints {
        zones: hints.for_zones.iter().flatten().map(|zone| interner.intern(&zone.name)).collect(),
        this_node: hints.for_nodes.as_ref().filter(|nodes| !nodes.is_empty()).map(|nodes| nodes.iter().any(|hint| hint.name == node)),
    });
    Some(SliceEndpoint {
        ip,
        local: endpoint.node_name.as_deref() == Some(node),
        ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
        serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(true),
        terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
        hints: hints.filter(|hints| *hints != Hints::default()).map(Box::new),
    })
}

/// The hostPorts of a pod that runs here and has addresses of its own.
pub(super) fn host_ports(pod: &Pod, node: &str) -> Box<[HostPort]> {
    let (Some(spec), Some(status)) = (&pod.spec, &pod.status) else { return Box::default() };
    let over = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    if spec.node_name.as_deref() != Some(node) || spec.host_network == Some(true) || over {
        return Box::default();
    }
    let mut pod_ips: Vec<IpAddr> = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect();
    if pod_ips.is_empty() {
        pod_ips.extend(status.pod_ip.as_deref().and_then(|ip| ip.parse::<IpAddr>().ok()));
    }
    if pod_ips.is_empty() {
        return Box::default();
    }
    let sidecars = spec.init_containers.iter().flatten().filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            Some(HostPort {
                host_ip: port.host_ip.as_deref().and_then(|ip| ip.parse().ok()).filter(|ip: &IpAddr| !ip.is_unspecified()),
                port: port_number(port.host_port?)?,
                protocol: Protocol::parse(port.protocol.as_deref())?,
                container_port: port_number(port.container_port)?,
                pod_ips: pod_ips.clone().into(),
            })
        })
        .collect()
}

fn has_label(labels: &Option<BTreeMap<String, String>>, label: &str) -> bool {
    labels.as_ref().is_some_and(|labels| labels.contains_key(label))
}

fn ips<S: AsRef<str>>(texts: &[S]) -> Box<[IpAddr]> {
    texts.iter().filter_map(|text| text.as_ref().parse().ok()).collect()
}

fn port_number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}
