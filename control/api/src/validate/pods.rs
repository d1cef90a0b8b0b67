//! Pods and pod templates.
use std::collections::HashSet;

use super::place::{Findings, Place};
use super::{containers, metadata, scheduling, volumes};
use crate::field_error::FieldError;
use crate::names;

const MAX_INT32: i64 = i32::MAX as i64;

pub(super) fn pod(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    let mirror = root.at("metadata.annotations").key("kubernetes.io/config.mirror");
    if mirror.is_set() && spec.at("nodeName").is_empty() {
        found.push(mirror.invalid("must set spec.nodeName if mirror pod annotation is set"));
    }
    pod_spec(&spec, true, found);
    if spec.at("serviceAccountName").is_empty() {
        for volume in spec.at("volumes").items() {
            for source in volume.at("projected.sources").items() {
                let token = source.at("serviceAccountToken");
                if token.is_set() {
                    found.push(token.forbidden("must not be specified when serviceAccountName is not set"));
                }
            }
        }
    }
    for list in ["containers", "initContainers"] {
        for image in spec.at(list).items().map(|container| container.at("image")) {
            if image.text().trim() != image.text() {
                found.push(image.invalid("must not have leading or trailing whitespace"));
            }
        }
    }
}

/// Rules for new pods alone.
pub(super) fn create(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    if !spec.at("ephemeralContainers").is_empty() {
        found.push(spec.at("ephemeralContainers").forbidden("cannot be set on create"));
    }
    if !spec.at("nodeName").is_empty() && !spec.at("schedulingGates").is_empty() {
        found.push(spec.at("nodeName").forbidden("cannot be set until all schedulingGates have been cleared"));
    }
}

/// A pod template: labels, annotations and specification.
pub(super) fn template(template: &Place<'_>, found: &mut Findings) {
    metadata::labels(&template.at("metadata").at("labels").named(&format!("{}.labels", template.path)), found);
    metadata::annotations(&template.at("metadata").at("annotations").named(&format!("{}.annotations", template.path)), found);
    let spec = template.at("spec");
    pod_spec(&spec, false, found);
    if !spec.at("ephemeralContainers").is_empty() {
        found.push(spec.at("ephemeralContainers").forbidden("ephemeral containers not allowed in pod template"));
    }
}

/// `is_pod` tells pods from templates.
fn pod_spec(spec: &Place<'_>, is_pod: bool, found: &mut Findings) {
    if !spec.at("terminationGracePeriodSeconds").is_set() {
        found.push(spec.at("terminationGracePeriodSeconds").required(""));
    }
    volumes::volumes(&spec.at("volumes"), found);
    containers::all(spec, found);
    host_network(spec, is_pod, found);
    spec.at("restartPolicy").one_of(found, &["Always", "OnFailure", "Never"]);
    spec.at("dnsPolicy").one_of(found, &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"]);
    metadata::labels(&spec.at("nodeSelector"), found);
    security_context(spec, found);
    for secret in spec.at("imagePullSecrets").items() {
        if secret.at("name").is_empty() {
            found.push(secret.at("name").required(""));
        }
    }
    scheduling::affinity(&spec.at("affinity"), found);
    dns_config(spec, found);
    for gate in spec.at("readinessGates").items() {
        gate.at("conditionType").check(found, names::qualified_name);
    }
    scheduling_gates(&spec.at("schedulingGates"), found);
    scheduling::topology_spread(&spec.at("topologySpreadConstraints"), found);
    simple_fields(spec, found);
    scheduling::tolerations(&spec.at("tolerations"), found);
    for alias in spec.at("hostAliases").items() {
        ip(&alias.at("ip"), found);
        for host in alias.at("hostnames").items() {
            host.named(&alias.at("hostnames").path).check(found, names::dns_subdomain);
        }
    }
    containers::resource_list(&spec.at("overhead"), found);
    operating_system(spec, found);
}

fn simple_fields(spec: &Place<'_>, found: &mut Findings) {
    for (field, check) in [
        ("serviceAccountName", names::dns_subdomain as fn(&str) -> Vec<String>),
        ("nodeName", names::dns_subdomain),
        ("hostname", names::dns_label),
        ("subdomain", names::dns_label),
        ("priorityClassName", names::dns_subdomain),
        ("runtimeClassName", names::dns_subdomain),
    ] {
        spec.at(field).check_if_set(found, check);
    }
    spec.at("activeDeadlineSeconds").in_range(found, 1, MAX_INT32);
    spec.at("preemptionPolicy").one_of_if_set(found, &["Never", "PreemptLowerPriority"]);
    let user_namespace = spec.at("hostUsers").is_set() && !spec.at("hostUsers").flag();
    for (field, shown) in [("hostNetwork", "hostNetwork"), ("hostPID", "HostPID"), ("hostIPC", "HostIPC")] {
        if user_namespace && spec.at(field).flag() {
            found.push(FieldError::forbidden(format!("{}.{shown}", spec.path), "when `hostUsers` is false"));
        }
    }
    if spec.at("shareProcessNamespace").flag() && spec.at("hostPID").flag() {
        let place = spec.at("shareProcessNamespace");
        found.push(
            place
                .named(&format!("{}.securityContext.shareProcessNamespace", spec.path))
                .invalid("ShareProcessNamespace and HostPID cannot both be enabled"),
        );
    }
}

/// On the host's network a container port is a host port. A template may leave it open, since its pods get it by default.
fn host_network(spec: &Place<'_>, is_pod: bool, found: &mut Findings) {
    if !spec.at("hostNetwork").flag() {
        return;
    }
    for port in spec.at("containers").items().flat_map(|container| container.at("ports").items().collect::<Vec<_>>()) {
        let host_port = port.at("hostPort").number();
        if (is_pod || host_port != 0) && host_port != port.at("containerPort").number() {
            let detail = "must match `containerPort` when `hostNetwork` is true";
            found.push(FieldError::invalid(port.at("hostPort").path, host_port, detail));
        }
    }
}

fn security_context(spec: &Place<'_>, found: &mut Findings) {
    let context = spec.at("securityContext");
    for field in ["fsGroup", "runAsUser", "runAsGroup"] {
        context.at(field).in_range(found, 0, MAX_INT32);
    }
    for group in context.at("supplementalGroups").items() {
        group.in_range(found, 0, MAX_INT32);
    }
    let mut sysctls = HashSet::new();
    for sysctl in context.at("sysctls").items() {
        let name = sysctl.at("name");
        if name.is_empty() {
            found.push(name.required(""));
        } else if !sysctls.insert(name.text()) {
            found.push(name.duplicate());
        } else if !is_sysctl(name.text()) {
            let form = r"^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";
            found.push(name.invalid(format!("must have at most 253 characters and match regex {form}")));
        }
    }
    context.at("fsGroupChangePolicy").one_of_if_set(found, &["Always", "OnRootMismatch"]);
    context.at("supplementalGroupsPolicy").one_of_if_set(found, &["Merge", "Strict"]);
    containers::seccomp_profile(&context.at("seccompProfile"), found);
    containers::app_armor_profile(&context.at("appArmorProfile"), found);
}

fn is_sysctl(name: &str) -> bool {
    let part = |part: &str| {
        let ends = |letter: Option<char>| letter.is_some_and(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit());
        ends(part.chars().next())
            && ends(part.chars().last())
            && part.chars().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || matches!(letter, '-' | '_'))
    };
    name.len() <= 253 && name.split(['.', '/']).all(part)
}

fn dns_config(spec: &Place<'_>, found: &mut Findings) {
    let config = spec.at("dnsConfig");
    if spec.at("dnsPolicy").text() == "None" {
        if !config.is_set() {
            found.push(config.required("must provide `dnsConfig` when `dnsPolicy` is None"));
            return;
        }
        if config.at("nameservers").is_empty() {
            found.push(config.at("nameservers").required("must provide at least one DNS nameserver when `dnsPolicy` is None"));
            return;
        }
    }
    let servers = config.at("nameservers");
    if servers.len() > 3 {
        found.push(servers.invalid("must not have more than 3 nameservers"));
    }
    for server in servers.items() {
        ip(&server, found);
    }
    let searches = config.at("searches");
    if searches.len() > 32 {
        found.push(searches.invalid("must not have more than 32 search paths"));
    }
    let length: usize = searches.items().map(|search| search.text().len() + 1).sum::<usize>().saturating_sub(1);
    if length > 2048 {
        found.push(searches.invalid("must not have more than 2048 characters (including spaces) in the search list"));
    }
    for search in searches.items() {
        let plain = search.text().strip_suffix('.').unwrap_or(search.text()).replace('_', "-");
        if search.text() != "." {
            found.extend(names::dns_subdomain(plain.trim_matches('-')).into_iter().map(|message| search.invalid(message)));
        }
    }
    for option in config.at("options").items() {
        if option.at("name").is_empty() {
            found.push(option.required("must not be empty"));
        }
    }
}

fn scheduling_gates(gates: &Place<'_>, found: &mut Findings) {
    let mut seen = HashSet::new();
    for gate in gates.items() {
        let name = gate.at("name").named(&gate.path);
        name.check(found, names::qualified_name);
        if !seen.insert(name.text()) {
            found.push(name.duplicate());
        }
    }
}

fn operating_system(spec: &Place<'_>, found: &mut Findings) {
    if !spec.at("os").is_set() {
        return;
    }
    spec.at("os.name").one_of(found, &["linux", "windows"]);
    let windows = spec.at("securityContext.windowsOptions");
    if spec.at("os.name").text() == "linux" && windows.is_set() {
        found.push(windows.forbidden("windows options cannot be set for a linux pod"));
    }
}

/// A `v1.Binding`.
pub(super) fn binding(root: &Place<'_>, found: &mut Findings) {
    let kind = root.at("target.kind");
    if !kind.is_empty() && kind.text() != "Node" {
        found.push(kind.unsupported(&["Node", "<empty>"]));
    }
    root.at("target.name").require(found);
}

/// An IP address in any spelling.
pub(super) fn ip(place: &Place<'_>, found: &mut Findings) {
    if place.text().parse::<std::net::IpAddr>().is_err() {
        found.push(place.invalid("must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"));
    }
}
