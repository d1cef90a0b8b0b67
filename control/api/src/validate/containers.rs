//! Containers: ports, environment, mounts, probes, hooks, resources and security.
use std::collections::HashSet;

use serde_json::Value;

use super::place::{Findings, Place};
use crate::field_error::FieldError;
use crate::meta;
use crate::names;
use crate::quantity::Quantity;

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];
const ONLY_SIDECARS: &str = "may not be set for init containers without restartPolicy=Always";

/// All three lists of a pod specification.
pub(super) fn all(spec: &Place<'_>, found: &mut Findings) {
    let volumes: Vec<&Value> = meta::items(spec.value, "volumes").iter().collect();
    regular(spec, &volumes, found);
    init(spec, &volumes, found);
    ephemeral(spec, &volumes, found);
}

fn regular(spec: &Place<'_>, volumes: &[&Value], found: &mut Findings) {
    let list = spec.at("containers");
    if list.is_empty() {
        found.push(list.required(""));
        return;
    }
    let mut seen = HashSet::new();
    for container in list.items() {
        one(&container, volumes, found);
        if !seen.insert(container.at("name").text()) {
            found.push(container.at("name").duplicate());
        }
        lifecycle(&container.at("lifecycle"), found);
        probes(&container, found);
        restart_policy(&container, found);
    }
    host_ports(list.items(), found);
}

/// A container's own restart policy, with or without rules.
fn restart_policy(container: &Place<'_>, found: &mut Findings) {
    let (policy, rules) = (container.at("restartPolicy"), container.at("restartPolicyRules"));
    if !rules.is_empty() && !policy.is_set() {
        found.push(policy.required("must specify restartPolicy when restart rules are used"));
    }
    policy.one_of_if_set(found, &["Always", "Never", "OnFailure"]);
}

fn init(spec: &Place<'_>, volumes: &[&Value], found: &mut Findings) {
    let mut seen: HashSet<&str> = meta::items(spec.value, "containers").iter().map(meta::name_field).collect();
    for container in spec.at("initContainers").items() {
        one(&container, volumes, found);
        restart_policy(&container, found);
        let name = container.at("name");
        if !name.is_empty() && !seen.insert(name.text()) {
            found.push(name.duplicate());
        }
        host_ports(std::iter::once(container.clone()), found);
        if container.at("restartPolicy").text() == "Always" {
            lifecycle(&container.at("lifecycle"), found);
            probes(&container, found);
            continue;
        }
        for field in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
            if container.at(field).is_set() {
                found.push(container.at(field).forbidden(ONLY_SIDECARS));
            }
        }
    }
}

fn ephemeral(spec: &Place<'_>, volumes: &[&Value], found: &mut Findings) {
    let others = ["containers", "initContainers"].iter().flat_map(|list| meta::items(spec.value, list)).map(meta::name_field);
    let targets: HashSet<&str> = others.collect();
    let mut seen = targets.clone();
    for container in spec.at("ephemeralContainers").items() {
        one(&container, volumes, found);
        if !seen.insert(container.at("name").text()) {
            found.push(container.at("name").duplicate());
        }
        let target = container.at("targetContainerName");
        if !target.is_empty() && !targets.contains(target.text()) {
            found.push(target.not_found());
        }
        for field in ["ports", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "resources.limits", "resources.requests"] {
            if !container.at(field).is_empty() {
                let path = container.at(field.split('.').next().unwrap_or(field));
                found.push(path.forbidden("cannot be set for an Ephemeral Container"));
            }
        }
        for mount in container.at("volumeMounts").items() {
            for field in ["subPath", "subPathExpr"] {
                if !mount.at(field).is_empty() {
                    found.push(mount.at(field).forbidden("cannot be set for an Ephemeral Container"));
                }
            }
        }
    }
}

fn one(container: &Place<'_>, volumes: &[&Value], found: &mut Findings) {
    container.at("name").require_format(found, names::dns_label);
    container.at("image").require(found);
    container.at("terminationMessagePolicy").one_of(found, &["File", "FallbackToLogsOnError"]);
    ports(&container.at("ports"), found);
    environment(&container.at("env"), found);
    environment_sources(&container.at("envFrom"), found);
    mounts(container, volumes, found);
    devices(container, volumes, found);
    container.at("imagePullPolicy").one_of(found, &["Always", "IfNotPresent", "Never"]);
    resources(&container.at("resources"), found);
    security_context(&container.at("securityContext"), found);
}

fn ports(list: &Place<'_>, found: &mut Findings) {
    let mut seen = HashSet::new();
    for port in list.items() {
        let name = port.at("name");
        if !name.is_empty() {
            let before = found.len();
            name.check(found, names::port_name);
            if found.len() == before && !seen.insert(name.text()) {
                found.push(name.duplicate());
            }
        }
        let number = port.at("containerPort");
        if number.is_empty() {
            found.push(number.required(""));
        } else {
            number.in_range(found, 1, 65535);
        }
        if !port.at("hostPort").is_empty() {
            port.at("hostPort").in_range(found, 1, 65535);
        }
        port.at("protocol").one_of(found, PROTOCOLS);
    }
}

/// One host port per protocol and host address.
fn host_ports<'a>(containers: impl Iterator<Item = Place<'a>>, found: &mut Findings) {
    let mut seen = HashSet::new();
    for port in containers.flat_map(|container| container.at("ports").items().collect::<Vec<_>>()) {
        let number = port.at("hostPort").number();
        let key = format!("{}/{}/{number}", port.at("protocol").text(), port.at("hostIP").text());
        if number != 0 && !seen.insert(key.clone()) {
            found.push(FieldError::duplicate(port.at("hostPort").path, key));
        }
    }
}

const FIELD_PATHS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

fn environment(list: &Place<'_>, found: &mut Findings) {
    for variable in list.items() {
        variable.at("name").require_format(found, names::env_name);
        let source = variable.at("valueFrom");
        if !source.is_set() {
            continue;
        }
        field_reference(&source.at("fieldRef"), FIELD_PATHS, found);
        resource_reference(&source.at("resourceFieldRef"), false, found);
        for reference in ["configMapKeyRef", "secretKeyRef"] {
            let reference = source.at(reference);
            if reference.is_set() {
                reference.at("name").check(found, names::dns_subdomain);
                reference.at("key").require_format(found, names::config_key);
            }
        }
        let empty = FieldError::invalid(source.path.clone(), "", "");
        let because = |detail: &str| FieldError { detail: detail.to_string(), ..empty.clone() };
        match source.entries().filter(|(_, value)| value.is_set()).count() {
            0 => found
                .push(because("must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`")),
            _ if !variable.at("value").is_empty() => found.push(because("may not be specified when `value` is not empty")),
            1 => {}
            _ => found.push(because("may not have more than one field specified at a time")),
        }
    }
}

/// `fieldRef`: a downward API path, or a label or annotation by key.
pub(super) fn field_reference(reference: &Place<'_>, supported: &[&str], found: &mut Findings) {
    if !reference.is_set() {
        return;
    }
    let path = reference.at("fieldPath");
    if !reference.at("apiVersion").require(found) || !path.require(found) {
        return;
    }
    if let Some((base, rest)) = path.text().split_once("['")
        && let Some(key) = rest.strip_suffix("']")
    {
        let key = match base {
            "metadata.annotations" => key.to_lowercase(),
            "metadata.labels" => key.to_string(),
            _ => {
                found.push(FieldError::invalid(
                    path.path.clone(),
                    path.text(),
                    format!("error converting fieldPath: field label does not support subscript: {}", path.text()),
                ));
                return;
            }
        };
        found.extend(
            names::qualified_name(&key).into_iter().map(|message| FieldError::invalid(reference.path.clone(), key.clone(), message)),
        );
        return;
    }
    let known = FIELD_PATHS.contains(&path.text())
        || matches!(path.text(), "metadata.labels" | "metadata.annotations" | "spec.restartPolicy" | "spec.schedulerName" | "status.phase");
    if !known {
        found.push(path.invalid(format!("error converting fieldPath: field label not supported: {}", path.text())));
    } else if !supported.contains(&path.text()) {
        found.push(path.unsupported(supported));
    }
}

/// `resourceFieldRef`: a container's limit or request.
pub(super) fn resource_reference(reference: &Place<'_>, needs_container: bool, found: &mut Findings) {
    if !reference.is_set() {
        return;
    }
    if needs_container && !reference.at("containerName").require(found) {
        return;
    }
    let resource = reference.at("resource");
    let supported =
        ["limits.cpu", "limits.ephemeral-storage", "limits.memory", "requests.cpu", "requests.ephemeral-storage", "requests.memory"];
    if !resource.require(found) {
        return;
    }
    let huge_pages = ["limits.hugepages-", "requests.hugepages-"].iter().any(|prefix| resource.text().starts_with(prefix));
    if !supported.contains(&resource.text()) && !huge_pages {
        found.push(resource.unsupported(&supported));
        return;
    }
    let divisor = reference.at("divisor");
    let is_cpu = resource.text().ends_with(".cpu");
    let allowed: &[&str] =
        if is_cpu { &["0", "1m", "1"] } else { &["0", "1", "1k", "1M", "1G", "1T", "1P", "1E", "1Ki", "1Mi", "1Gi", "1Ti", "1Pi", "1Ei"] };
    if divisor.is_set() && !allowed.contains(&divisor.text()) {
        let detail = if is_cpu {
            "only divisor's values 1m and 1 are supported with the cpu resource".to_string()
        } else {
            let name = if resource.text().ends_with("memory") { "memory" } else { "local ephemeral storage" };
            format!("only divisor's values 1, 1k, 1M, 1G, 1T, 1P, 1E, 1Ki, 1Mi, 1Gi, 1Ti, 1Pi, 1Ei are supported with the {name} resource")
        };
        found.push(FieldError::invalid(divisor.path, resource.text(), detail));
    }
}

fn environment_sources(list: &Place<'_>, found: &mut Findings) {
    for source in list.items() {
        source.at("prefix").check_if_set(found, names::env_name);
        let kinds = ["configMapRef", "secretRef"].map(|kind| source.at(kind));
        for reference in kinds.iter().filter(|reference| reference.is_set()) {
            reference.at("name").require_format(found, names::dns_subdomain);
        }
        match kinds.iter().filter(|reference| reference.is_set()).count() {
            0 => found.push(FieldError::invalid(list.path.clone(), "", "must specify one of: `configMapRef` or `secretRef`")),
            1 => {}
            _ => found.push(FieldError::invalid(list.path.clone(), "", "may not have more than one field specified at a time")),
        }
    }
}

fn mounts(container: &Place<'_>, volumes: &[&Value], found: &mut Findings) {
    let mut points = HashSet::new();
    let devices: Vec<Place<'_>> = container.at("volumeDevices").items().collect();
    let privileged = container.at("securityContext.privileged").flag();
    for mount in container.at("volumeMounts").items() {
        let (name, path) = (mount.at("name"), mount.at("mountPath"));
        name.require(found);
        if !volumes.iter().any(|volume| meta::name_field(volume) == name.text()) {
            found.push(name.not_found());
        }
        path.require(found);
        if !points.insert(path.text()) {
            found.push(path.invalid("must be unique"));
        }
        if devices.iter().any(|device| device.at("name").text() == name.text()) {
            found.push(name.invalid("must not already exist in volumeDevices"));
        }
        for field in ["subPath", "subPathExpr"] {
            super::volumes::relative_path(&mount.at(field).named(&format!("{}.{field}", container.at("volumeMounts").path)), found);
        }
        if !mount.at("subPath").is_empty() && !mount.at("subPathExpr").is_empty() {
            found.push(mount.at("subPathExpr").invalid("subPathExpr and subPath are mutually exclusive"));
        }
        let propagation = mount.at("mountPropagation");
        propagation.one_of_if_set(found, &["Bidirectional", "HostToContainer", "None"]);
        if propagation.text() == "Bidirectional" && !privileged {
            found.push(propagation.forbidden("Bidirectional mount propagation is available only to privileged containers"));
        }
        let recursive = mount.at("recursiveReadOnly");
        recursive.one_of_if_set(found, &["Disabled", "Enabled", "IfPossible"]);
        if matches!(recursive.text(), "Enabled" | "IfPossible") && !mount.at("readOnly").flag() {
            found.push(recursive.forbidden("may only be specified when readOnly is true"));
        }
    }
}

fn devices(container: &Place<'_>, volumes: &[&Value], found: &mut Findings) {
    let mut seen = HashSet::new();
    for device in container.at("volumeDevices").items() {
        let (name, path) = (device.at("name"), device.at("devicePath"));
        if name.is_empty() {
            found.push(name.required(""));
        }
        match volumes.iter().find(|volume| meta::name_field(volume) == name.text()) {
            None => found.push(name.not_found()),
            Some(volume) if volume.get("persistentVolumeClaim").is_none() && volume.get("ephemeral").is_none() => {
                found.push(name.invalid("can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode"));
            }
            Some(_) => {}
        }
        if path.require(found) && !seen.insert(path.text()) {
            found.push(path.invalid("must be unique"));
        }
        if path.text().split('/').any(|part| part == "..") {
            found.push(path.invalid("can not contain backsteps ('..')"));
        }
    }
}

fn probes(container: &Place<'_>, found: &mut Findings) {
    for kind in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let probe = container.at(kind);
        if !probe.is_set() {
            continue;
        }
        handler(&probe, &["exec", "grpc", "httpGet", "tcpSocket"], found);
        for field in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
            probe.at(field).non_negative(found);
        }
        let grace = probe.at("terminationGracePeriodSeconds");
        if kind == "readinessProbe" {
            if grace.is_set() {
                found.push(grace.invalid("must not be set for readinessProbes"));
            }
        } else {
            if grace.integer().is_some_and(|seconds| seconds <= 0) {
                found.push(grace.invalid("must be greater than 0"));
            }
            if probe.at("successThreshold").number() != 1 {
                found.push(probe.at("successThreshold").invalid("must be 1"));
            }
        }
    }
}

fn lifecycle(hooks: &Place<'_>, found: &mut Findings) {
    for hook in ["postStart", "preStop"] {
        let hook = hooks.at(hook);
        if hook.is_set() {
            handler(&hook, &["exec", "httpGet", "sleep", "tcpSocket"], found);
        }
    }
}

/// Exactly one of the kinds of action.
fn handler(place: &Place<'_>, kinds: &[&str], found: &mut Findings) {
    let mut count = 0;
    for kind in kinds {
        let action = place.at(kind);
        if !action.is_set() {
            continue;
        }
        count += 1;
        if count > 1 {
            found.push(action.forbidden("may not specify more than 1 handler type"));
            continue;
        }
        match *kind {
            "exec" => drop(action.at("command").require(found)),
            "httpGet" => http_get(&action, found),
            "tcpSocket" => action.at("port").port(found),
            "grpc" => action.at("port").in_range(found, 1, 65535),
            _ => {}
        }
    }
    if count == 0 {
        found.push(place.required("must specify a handler type"));
    }
}

fn http_get(action: &Place<'_>, found: &mut Findings) {
    action.at("path").require(found);
    action.at("port").port(found);
    action.at("scheme").one_of_if_set(found, &["HTTP", "HTTPS"]);
    for header in action.at("httpHeaders").items() {
        header.at("name").named(&action.at("httpHeaders").path).check(found, names::http_header);
    }
}

/// Requests and limits: well-formed names, no negative amounts, requests within limits.
pub(super) fn resources(place: &Place<'_>, found: &mut Findings) {
    let (requests, limits) = (place.at("requests"), place.at("limits"));
    resource_list(&limits, found);
    for (name, request) in requests.entries() {
        resource_name(name, &requests.path, found);
        amount(&request, name, found);
        let overcommit = matches!(name, "cpu" | "memory" | "ephemeral-storage");
        let limit = limits.key(name);
        match (limit.is_set(), Quantity::of(request.value), Quantity::of(limit.value)) {
            (true, asked, most) if !overcommit && asked != most => {
                found.push(FieldError::invalid(requests.path.clone(), request.text(), format!("must be equal to {name} limit of {most}")));
            }
            (true, asked, most) if asked > most => {
                found.push(FieldError::invalid(
                    requests.path.clone(),
                    request.text(),
                    format!("must be less than or equal to {name} limit of {most}"),
                ));
            }
            (false, _, _) if !overcommit => found.push(limits.required("Limit must be set for non overcommitable resources")),
            _ => {}
        }
    }
    let names = |list: &Place<'_>, word: &str| list.entries().any(|(name, _)| name.starts_with(word));
    let has = |word: &str| names(&requests, word) || names(&limits, word);
    if has("hugepages-") && !has("cpu") && !has("memory") {
        found.push(place.forbidden("HugePages require cpu or memory"));
    }
}

/// One list of amounts by name.
pub(super) fn resource_list(list: &Place<'_>, found: &mut Findings) {
    for (name, entry) in list.entries() {
        resource_name(name, &list.path, found);
        amount(&entry, name, found);
    }
}

fn resource_name(name: &str, path: &str, found: &mut Findings) {
    let before = found.len();
    found.extend(names::qualified_name(name).into_iter().map(|message| FieldError::invalid(path, name, message)));
    let standard = matches!(name, "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-");
    if found.len() == before && !name.contains('/') && !standard {
        found.push(FieldError::invalid(path, name, "must be a standard resource type or fully qualified"));
        found.push(FieldError::invalid(path, name, "must be a standard resource for containers"));
    }
}

fn amount(entry: &Place<'_>, name: &str, found: &mut Findings) {
    super::metadata::non_negative_quantity(entry, found);
    if name.contains('/') && !name.contains("kubernetes.io/") && !Quantity::of(entry.value).is_integer() {
        found.push(entry.invalid("must be an integer"));
    }
}

fn security_context(context: &Place<'_>, found: &mut Findings) {
    for field in ["runAsUser", "runAsGroup"] {
        context.at(field).in_range(found, 0, i64::from(i32::MAX));
    }
    context.at("procMount").one_of_if_set(found, &["Default", "Unmasked"]);
    seccomp_profile(&context.at("seccompProfile"), found);
    app_armor_profile(&context.at("appArmorProfile"), found);
    let escalation = context.at("allowPrivilegeEscalation");
    if escalation.is_set() && !escalation.flag() {
        if context.at("privileged").flag() {
            found.push(context.invalid("cannot set `allowPrivilegeEscalation` to false and `privileged` to true"));
        }
        if context.at("capabilities.add").items().any(|capability| capability.text() == "CAP_SYS_ADMIN") {
            found.push(context.invalid("cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN"));
        }
    }
}

pub(super) fn seccomp_profile(profile: &Place<'_>, found: &mut Findings) {
    if !profile.is_set() {
        return;
    }
    let (kind, local) = (profile.at("type"), profile.at("localhostProfile"));
    match kind.text() {
        "" => found.push(kind.required("type is required when seccompProfile is set")),
        "Localhost" if local.is_empty() => found.push(local.required("must be set when seccomp type is Localhost")),
        "Localhost" => super::volumes::relative_path(&local, found),
        "RuntimeDefault" | "Unconfined" => {}
        _ => found.push(kind.unsupported(&["Localhost", "RuntimeDefault", "Unconfined"])),
    }
    if kind.text() != "Localhost" && local.is_set() {
        found.push(local.invalid("can only be set when seccomp type is Localhost"));
    }
}

pub(super) fn app_armor_profile(profile: &Place<'_>, found: &mut Findings) {
    if !profile.is_set() {
        return;
    }
    let (kind, local) = (profile.at("type"), profile.at("localhostProfile"));
    match kind.text() {
        "" => found.push(kind.required("type is required when appArmorProfile is set")),
        "Localhost" if local.text().trim().is_empty() => found.push(local.required("must be set when AppArmor type is Localhost")),
        "Localhost" | "RuntimeDefault" | "Unconfined" => {}
        _ => found.push(kind.unsupported(&["Localhost", "RuntimeDefault", "Unconfined"])),
    }
    if kind.text() != "Localhost" && local.is_set() {
        found.push(local.invalid("can only be set when AppArmor type is Localhost"));
    }
}
