//! Services and Endpoints.
use std::collections::HashSet;
use std::net::IpAddr;

use serde_json::Value;

use super::place::{Findings, Place};
use crate::field_error::FieldError;
use crate::meta::{self, same};
use crate::names;

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];
const MAX_AFFINITY_SECONDS: i64 = 86400;

pub(super) fn service(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    let kind = spec.at("type");
    let headless = spec.at("clusterIP").text() == "None";
    if spec.at("ports").is_empty() && !headless && kind.text() != "ExternalName" {
        found.push(spec.at("ports").required(""));
    }
    let first = Place { value: spec.at("clusterIP").value, path: format!("{}.clusterIPs[0]", spec.path) };
    match kind.text() {
        "LoadBalancer" | "NodePort" if headless => {
            found.push(first.invalid(format!("may not be set to 'None' for {} services", kind.text())))
        }
        "ExternalName" => external_name(&spec, found),
        _ => {}
    }
    ports(&spec, headless, found);
    super::metadata::labels(&spec.at("selector"), found);
    session_affinity(&spec, found);
    addresses(&spec, found);
    kind.one_of(found, &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
    node_ports(&spec, found);
    load_balancer(&spec, found);
    traffic(&spec, found);
}

fn external_name(spec: &Place<'_>, found: &mut Findings) {
    for field in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        if !spec.at(field).is_empty() || (field == "clusterIPs" && !spec.at("clusterIP").is_empty()) {
            found.push(spec.at(field).forbidden("may not be set for ExternalName services"));
        }
    }
    let name = spec.at("externalName");
    let plain = name.text().strip_suffix('.').unwrap_or(name.text());
    if name.is_empty() {
        found.push(name.required(""));
    } else {
        found.extend(names::dns_subdomain(plain).into_iter().map(|message| name.invalid(message)));
    }
}

fn ports(spec: &Place<'_>, headless: bool, found: &mut Findings) {
    let list = spec.at("ports");
    let needs_names = list.len() > 1;
    let mut seen_names = HashSet::new();
    let mut seen_ports = HashSet::new();
    for port in list.items() {
        let name = port.at("name");
        if name.is_empty() {
            if needs_names {
                found.push(name.required(""));
            }
        } else {
            name.check(found, names::dns_label);
            if !seen_names.insert(name.text()) {
                found.push(name.duplicate());
            }
        }
        found.extend(
            names::port_number(port.at("port").number())
                .into_iter()
                .map(|message| FieldError::invalid(port.at("port").path, port.at("port").number(), message)),
        );
        port.at("protocol").one_of(found, PROTOCOLS);
        if port.at("targetPort").is_set() && !(headless && port.at("targetPort").is_empty()) {
            port.at("targetPort").port(found);
        }
        port.at("appProtocol").check_if_set(found, names::qualified_name);
        if port.at("port").number() != 0 && !seen_ports.insert((port.at("protocol").text(), port.at("port").number())) {
            let key = serde_json::json!({"protocol": port.at("protocol").text(), "port": port.at("port").number()});
            found.push(FieldError::duplicate(port.path.clone(), key));
        }
    }
}

fn session_affinity(spec: &Place<'_>, found: &mut Findings) {
    let affinity = spec.at("sessionAffinity");
    affinity.one_of(found, &["ClientIP", "None"]);
    let config = spec.at("sessionAffinityConfig");
    if affinity.text() == "None" && config.is_set() {
        found.push(config.forbidden("must not be set when session affinity is None"));
    }
    if affinity.text() == "ClientIP" {
        let timeout = config.at("clientIP.timeoutSeconds");
        if !timeout.is_set() {
            found.push(timeout.required("when session affinity type is ClientIP"));
        } else if timeout.number() <= 0 || timeout.number() > MAX_AFFINITY_SECONDS {
            found.push(timeout.invalid(format!("must be greater than 0 and less than {MAX_AFFINITY_SECONDS}")));
        }
    }
}

fn addresses(spec: &Place<'_>, found: &mut Findings) {
    let (single, list) = (spec.at("clusterIP"), spec.at("clusterIPs"));
    let first = meta::items(spec.value, "clusterIPs").first().and_then(Value::as_str).unwrap_or_default();
    if spec.at("type").text() != "ExternalName" {
        if single.is_empty() && !list.is_empty() {
            found.push(list.invalid("must be empty when `clusterIP` is not specified"));
        } else if !single.is_empty() && list.is_empty() {
            found.push(list.required(""));
        } else if single.text() != first {
            found.push(list.invalid("first value must match `clusterIP`"));
        }
    }
    if list.len() > 2 {
        found.push(list.invalid("may only hold up to 2 values"));
    }
    if first == "None" && list.len() > 1 {
        found.push(list.invalid("'None' must be the first and only value"));
    }
    let mut families = Vec::new();
    for (index, address) in list.items().enumerate().filter(|(_, address)| address.text() != "None") {
        let Ok(parsed) = address.text().parse::<IpAddr>() else {
            found.push(address.invalid("must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"));
            continue;
        };
        families.push(parsed.is_ipv4());
        let wanted = meta::items(spec.value, "ipFamilies").get(index).and_then(Value::as_str);
        for (name, is_v4) in [("IPv4", true), ("IPv6", false)] {
            if wanted == Some(name) && parsed.is_ipv4() != is_v4 {
                found.push(address.invalid(format!("expected an {name} value as indicated by `ipFamilies[{index}]`")));
            }
        }
    }
    if families.len() == 2 && families[0] == families[1] {
        found.push(list.invalid("may specify no more than one IP for each IP family"));
    }
    let mut seen = HashSet::new();
    for family in spec.at("ipFamilies").items() {
        family.one_of_if_set(found, &["IPv4", "IPv6"]);
        if !seen.insert(family.text()) {
            found.push(family.duplicate());
        }
    }
    spec.at("ipFamilyPolicy").one_of_if_set(found, &["PreferDualStack", "RequireDualStack", "SingleStack"]);
    for address in spec.at("externalIPs").items() {
        endpoint_address(&address, found);
    }
}

fn node_ports(spec: &Place<'_>, found: &mut Findings) {
    let mut seen = HashSet::new();
    for port in spec.at("ports").items() {
        let number = port.at("nodePort");
        if number.is_empty() {
            continue;
        }
        if spec.at("type").text() == "ClusterIP" {
            found.push(number.forbidden("may not be used when `type` is 'ClusterIP'"));
        } else if !seen.insert((port.at("protocol").text(), number.number())) {
            found.push(number.duplicate());
        }
    }
}

fn load_balancer(spec: &Place<'_>, found: &mut Findings) {
    let is_balancer = spec.at("type").text() == "LoadBalancer";
    for field in ["loadBalancerSourceRanges", "allocateLoadBalancerNodePorts", "loadBalancerClass"] {
        let place = spec.at(field);
        let set = if field == "loadBalancerSourceRanges" { !place.is_empty() } else { place.is_set() };
        if set && !is_balancer {
            found.push(place.forbidden("may only be used when `type` is 'LoadBalancer'"));
        }
    }
    if is_balancer {
        for range in spec.at("loadBalancerSourceRanges").items() {
            super::network::cidr(&range, found);
        }
        spec.at("loadBalancerClass").check_if_set(found, names::qualified_name);
    }
}

fn is_external(spec: &Place<'_>) -> bool {
    match spec.at("type").text() {
        "NodePort" | "LoadBalancer" => true,
        "ClusterIP" => !spec.at("externalIPs").is_empty(),
        _ => false,
    }
}

fn traffic(spec: &Place<'_>, found: &mut Findings) {
    let external = spec.at("externalTrafficPolicy");
    if !is_external(spec) {
        if !external.is_empty() {
            found.push(external.invalid("may only be set for externally-accessible services"));
        }
    } else {
        external.one_of(found, &["Cluster", "Local"]);
    }
    let health = spec.at("healthCheckNodePort");
    let needs_health = spec.at("type").text() == "LoadBalancer" && external.text() == "Local";
    if !health.is_empty() && !needs_health {
        found.push(health.invalid("may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"));
    }
    if spec.at("type").text() != "ExternalName" {
        spec.at("internalTrafficPolicy").one_of(found, &["Cluster", "Local"]);
    }
    spec.at("trafficDistribution").one_of_if_set(found, &["PreferClose", "PreferSameNode", "PreferSameZone"]);
}

pub(super) fn update(root: &Place<'_>, old: &Value, found: &mut Findings) {
    let spec = root.at("spec");
    let before = &old["spec"];
    let external = |kind: &str| kind == "ExternalName";
    if !external(spec.at("type").text()) && !external(meta::text(before, "type")) {
        let (new, old) = (meta::items(spec.value, "clusterIPs"), meta::items(before, "clusterIPs"));
        if let (Some(first), Some(known)) = (new.first(), old.first())
            && first != known
        {
            found.push(Place { value: spec.at("clusterIPs").value, path: "spec.clusterIPs[0]".into() }.invalid("may not change once set"));
        }
        if new.is_empty() && !old.is_empty() {
            found.push(
                Place { value: spec.at("clusterIPs").value, path: "spec.clusterIPs[0]".into() }
                    .invalid("primary clusterIP can not be unset"),
            );
        }
    }
    let class = spec.at("loadBalancerClass");
    if spec.at("type").text() == "LoadBalancer"
        && meta::text(before, "type") == "LoadBalancer"
        && !same(class.value, &before["loadBalancerClass"])
    {
        found.push(class.invalid("may not change once set"));
    }
    let health = spec.at("healthCheckNodePort");
    let stays = |value: &Value| meta::text(value, "type") == "LoadBalancer" && meta::text(value, "externalTrafficPolicy") == "Local";
    if stays(spec.value) && stays(before) && !same(health.value, &before["healthCheckNodePort"]) {
        found.push(health.forbidden("field is immutable"));
    }
}

pub(super) fn endpoints(root: &Place<'_>, found: &mut Findings) {
    for subset in root.at("subsets").items() {
        let lists = ["addresses", "notReadyAddresses"].map(|list| subset.at(list));
        if lists.iter().all(|list| list.is_empty()) {
            found.push(subset.required("must specify `addresses` or `notReadyAddresses`"));
        }
        for address in lists.iter().flat_map(|list| list.items()) {
            endpoint_address(&address.at("ip"), found);
            address.at("nodeName").check_if_set(found, names::dns_subdomain);
        }
        let ports = subset.at("ports");
        for port in ports.items() {
            if port.at("name").is_empty() {
                if ports.len() > 1 {
                    found.push(port.at("name").required(""));
                }
            } else {
                port.at("name").check(found, names::dns_label);
            }
            port.at("port").port(found);
            port.at("protocol").one_of(found, PROTOCOLS);
        }
    }
}

/// An address that traffic may be sent to: none of the machine's own.
pub(super) fn endpoint_address(place: &Place<'_>, found: &mut Findings) {
    let Ok(address) = place.text().parse::<IpAddr>() else {
        found.push(place.invalid("must be a valid IP address"));
        return;
    };
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.segments()[0] & 0xffc0 == 0xfe80,
    };
    if address.is_unspecified() {
        found.push(place.invalid(format!("may not be unspecified ({})", place.text())));
    }
    if address.is_loopback() {
        found.push(place.invalid("may not be in the loopback range (127.0.0.0/8, ::1/128)"));
    }
    if link_local {
        found.push(place.invalid("may not be in the link-local range (169.254.0.0/16, fe80::/10)"));
    }
    let multicast = match address {
        IpAddr::V4(address) => address.octets()[..3] == [224, 0, 0],
        IpAddr::V6(address) => address.segments()[0] == 0xff02,
    };
    if multicast {
        found.push(place.invalid("may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)"));
    }
}
