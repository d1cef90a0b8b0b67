//! networking.k8s.io and discovery.k8s.io.
use std::collections::HashSet;
use std::net::IpAddr;

use super::metadata::label_selector;
use super::place::{Findings, Place};
use super::services::endpoint_address;
use crate::field_error::FieldError;
use crate::names;

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];

pub(super) fn kind(kind: &str, root: &Place<'_>, found: &mut Findings) {
    match kind {
        "NetworkPolicy" => network_policy(&root.at("spec"), found),
        "Ingress" => ingress(&root.at("spec"), found),
        "IngressClass" => ingress_class(&root.at("spec"), found),
        "EndpointSlice" => endpoint_slice(root, found),
        "IPAddress" => {
            let parent = root.at("spec.parentRef");
            if !parent.is_set() {
                found.push(parent.required(""));
            } else {
                parent.at("resource").require_format(found, names::path_segment);
                parent.at("name").require_format(found, names::path_segment);
            }
        }
        "ServiceCIDR" => {
            let cidrs = root.at("spec.cidrs");
            if cidrs.is_empty() {
                found.push(cidrs.required("at least one CIDR required"));
            }
            cidrs.items().for_each(|range| cidr(&range, found));
        }
        _ => {}
    }
}

/// Address and prefix length, or none.
fn parse_cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (address, length) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let length: u8 = length.parse().ok()?;
    (length <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, length))
}

pub(super) fn cidr(place: &Place<'_>, found: &mut Findings) {
    if parse_cidr(place.text()).is_none() {
        found.push(place.invalid("must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"));
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)) << 96,
        IpAddr::V6(address) => u128::from(address),
    }
}

fn is_strict_subset(inner: (IpAddr, u8), outer: (IpAddr, u8)) -> bool {
    let mask = if outer.1 == 0 { 0 } else { u128::MAX << (128 - outer.1) };
    inner.0.is_ipv4() == outer.0.is_ipv4() && inner.1 > outer.1 && bits(inner.0) & mask == bits(outer.0) & mask
}

fn network_policy(spec: &Place<'_>, found: &mut Findings) {
    label_selector(&spec.at("podSelector"), found);
    for (direction, side) in [("ingress", "from"), ("egress", "to")] {
        for rule in spec.at(direction).items() {
            rule.at("ports").items().for_each(|port| policy_port(&port, found));
            rule.at(side).items().for_each(|peer| policy_peer(&peer, found));
        }
    }
    let kinds = spec.at("policyTypes");
    if kinds.len() > 2 {
        found.push(kinds.invalid("may not specify more than two policyTypes"));
        return;
    }
    kinds.items().for_each(|kind| supported(&kind, found, &["Ingress", "Egress"]));
}

/// One of the words; an empty text is none of them.
fn supported(place: &Place<'_>, found: &mut Findings, words: &[&str]) {
    if !words.contains(&place.text()) {
        found.push(place.unsupported(words));
    }
}

fn policy_port(port: &Place<'_>, found: &mut Findings) {
    let (protocol, start, end) = (port.at("protocol"), port.at("port"), port.at("endPort"));
    if protocol.is_set() {
        supported(&protocol, found, &["TCP", "UDP", "SCTP"]);
    }
    let is_number = start.integer().is_some();
    if end.is_set() && !is_number {
        let without = if start.is_set() { "non-numeric" } else { "not specified" };
        found.push(end.invalid(format!("may not be specified when `port` is {without}")));
    }
    if start.is_set() {
        start.port(found);
    }
    if end.is_set() && is_number {
        if end.number() < start.number() {
            // The finding shows the port, as upstream's does.
            found.push(FieldError::invalid(end.path.clone(), start.value.clone(), "must be greater than or equal to `port`"));
        }
        end.in_range(found, 1, 65535);
    }
}

fn policy_peer(peer: &Place<'_>, found: &mut Findings) {
    let (pods, namespaces, block) = (peer.at("podSelector"), peer.at("namespaceSelector"), peer.at("ipBlock"));
    label_selector(&pods, found);
    label_selector(&namespaces, found);
    if block.is_set() {
        ip_block(&block, found);
    }
    let selects = pods.is_set() || namespaces.is_set();
    if !selects && !block.is_set() {
        found.push(peer.required("must specify a peer"));
    }
    if selects && block.is_set() {
        found.push(peer.forbidden("may not specify both ipBlock and another peer"));
    }
}

fn ip_block(block: &Place<'_>, found: &mut Findings) {
    let whole = block.at("cidr");
    if !whole.require(found) {
        return;
    }
    cidr(&whole, found);
    let Some(outer) = parse_cidr(whole.text()) else { return };
    for except in block.at("except").items() {
        cidr(&except, found);
        if parse_cidr(except.text()).is_some_and(|inner| !is_strict_subset(inner, outer)) {
            found.push(except.invalid("must be a strict subset of `cidr`"));
        }
    }
}

fn host(place: &Place<'_>, found: &mut Findings) {
    if place.text().contains('*') {
        place.check(found, names::wildcard_subdomain);
    } else {
        place.check(found, names::dns_subdomain);
    }
}

fn ingress(spec: &Place<'_>, found: &mut Findings) {
    let (rules, default) = (spec.at("rules"), spec.at("defaultBackend"));
    if rules.is_empty() && !default.is_set() {
        found.push(FieldError::invalid(spec.path.clone(), rules.value.clone(), "either `defaultBackend` or `rules` must be specified"));
    }
    if default.is_set() {
        backend(&default, found);
    }
    for rule in rules.items() {
        let name = rule.at("host");
        if !name.is_empty() {
            if name.text().parse::<IpAddr>().is_ok() {
                found.push(name.invalid("must be a DNS name, not an IP address"));
            } else {
                host(&name, found);
            }
        }
        let http = rule.at("http");
        if !http.is_set() {
            continue;
        }
        if http.at("paths").is_empty() {
            found.push(http.at("paths").required(""));
        }
        http.at("paths").items().for_each(|path| ingress_path(&path, found));
    }
    for tls in spec.at("tls").items() {
        tls.at("hosts").items().for_each(|name| host(&name, found));
        tls.at("secretName").check_if_set(found, names::dns_subdomain);
    }
    spec.at("ingressClassName").check_if_set(found, names::dns_subdomain);
}

fn ingress_path(path: &Place<'_>, found: &mut Findings) {
    let (kind, value) = (path.at("pathType"), path.at("path"));
    match kind.text() {
        "" => {
            found.push(kind.required("pathType must be specified"));
            return;
        }
        "Exact" | "Prefix" => {
            if !value.text().starts_with('/') {
                found.push(value.invalid("must be an absolute path"));
            }
            for bad in ["//", "/./", "/../", "%2f", "%2F"] {
                if value.text().contains(bad) {
                    found.push(value.invalid(format!("must not contain '{bad}'")));
                }
            }
            for bad in ["/..", "/."] {
                if value.text().ends_with(bad) {
                    found.push(value.invalid(format!("cannot end with '{bad}'")));
                }
            }
        }
        "ImplementationSpecific" => {
            if !value.is_empty() && !value.text().starts_with('/') {
                found.push(value.invalid("must be an absolute path"));
            }
        }
        _ => found.push(kind.unsupported(&["Exact", "ImplementationSpecific", "Prefix"])),
    }
    backend(&path.at("backend"), found);
}

fn backend(place: &Place<'_>, found: &mut Findings) {
    let (service, resource) = (place.at("service"), place.at("resource"));
    let refuse = |detail: &str| FieldError::invalid(place.path.clone(), "", detail);
    match (service.is_set(), resource.is_set()) {
        (true, true) => found.push(refuse("cannot set both resource and service backends")),
        (false, false) => found.push(refuse("resource or service backend is required")),
        (false, true) => {
            resource.at("kind").require(found);
            resource.at("name").require(found);
        }
        (true, false) => {
            service.at("name").require_format(found, names::dns_1035_label);
            let (name, number) = (service.at("port.name"), service.at("port.number"));
            match (!name.is_empty(), !number.is_empty()) {
                (true, true) => found.push(refuse("cannot set both port name & port number")),
                (true, false) => name.check(found, names::port_name),
                (false, true) => number.in_range(found, 1, 65535),
                (false, false) => found.push(place.required("port name or number is required")),
            }
        }
    }
}

fn ingress_class(spec: &Place<'_>, found: &mut Findings) {
    let controller = spec.at("controller");
    if controller.text().len() > 250 {
        found.push(FieldError::too_long(controller.path.clone(), 250));
    }
    if controller.require(found) {
        match controller.text().split_once('/') {
            Some((host, path)) if !host.is_empty() && !path.is_empty() => {
                found.extend(
                    names::dns_subdomain(host).into_iter().map(|message| FieldError::invalid(controller.path.clone(), host, message)),
                );
            }
            _ => found.push(controller.invalid("must be a domain-prefixed path (such as \"acme.io/foo\")")),
        }
    }
    let parameters = spec.at("parameters");
    if parameters.is_set() {
        parameters.at("kind").require(found);
        parameters.at("name").require(found);
        parameters.at("scope").one_of(found, &["Cluster", "Namespace"]);
        let namespace = parameters.at("namespace");
        match (parameters.at("scope").text(), namespace.is_set()) {
            ("Namespace", false) => found.push(namespace.required("`parameters.scope` is set to 'Namespace'")),
            ("Cluster", true) => found.push(namespace.forbidden("`parameters.scope` is set to 'Cluster'")),
            _ => {}
        }
    }
}

fn endpoint_slice(root: &Place<'_>, found: &mut Findings) {
    let kind = root.at("addressType");
    kind.one_of(found, &["FQDN", "IPv4", "IPv6"]);
    let endpoints = root.at("endpoints");
    if endpoints.len() > 1000 {
        found.push(FieldError::too_many(endpoints.path.clone(), endpoints.len(), 1000));
        return;
    }
    for endpoint in endpoints.items() {
        let addresses = endpoint.at("addresses");
        match addresses.len() {
            0 => found.push(addresses.required("must contain at least 1 address")),
            count if count > 100 => found.push(FieldError::too_many(addresses.path.clone(), count, 100)),
            _ => {}
        }
        for address in addresses.items() {
            slice_address(&address, kind.text(), found);
        }
        endpoint.at("nodeName").check_if_set(found, names::dns_subdomain);
        endpoint.at("hostname").check_if_set(found, names::dns_label);
    }
    let mut seen = HashSet::new();
    let ports = root.at("ports");
    if ports.len() > 20_000 {
        found.push(FieldError::too_many(ports.path.clone(), ports.len(), 20_000));
    }
    for port in ports.items() {
        let name = port.at("name");
        name.check_if_set(found, names::dns_label);
        if !seen.insert(name.text()) {
            found.push(name.duplicate());
        }
        port.at("protocol").one_of(found, PROTOCOLS);
        port.at("appProtocol").check_if_set(found, names::qualified_name);
    }
}

fn slice_address(address: &Place<'_>, kind: &str, found: &mut Findings) {
    match kind {
        "IPv4" | "IPv6" => {
            let parsed = address.text().parse::<IpAddr>();
            match parsed {
                Ok(parsed) if parsed.is_ipv4() == (kind == "IPv4") => endpoint_address(address, found),
                _ => found.push(address.invalid(format!("must be an {kind} address"))),
            }
        }
        "FQDN" => address.check(found, names::dns_subdomain),
        _ => {}
    }
}
