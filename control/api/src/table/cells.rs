//! Cells that are more than one field.
use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use crate::meta;
use crate::quantity::Quantity;
use crate::selector::LabelSelector;
use crate::time::{age, human_duration};

fn or(text: String, absent: &str) -> Value {
    if text.is_empty() { absent.into() } else { text.into() }
}

fn strings(object: &Value, path: &str) -> Vec<String> {
    meta::items(object, path).iter().filter_map(Value::as_str).map(String::from).collect()
}

fn number(object: &Value, path: &str) -> i64 {
    meta::get(object, path).as_i64().unwrap_or_default()
}

fn condition<'a>(object: &'a Value, path: &str, kind: &str) -> Option<&'a Value> {
    meta::items(object, path).iter().find(|condition| condition["type"] == kind)
}

fn is_true(object: &Value, kind: &str) -> bool {
    condition(object, "status.conditions", kind).is_some_and(|found| found["status"] == "True")
}

/// `a,b,c + 2 more...`
fn limited(list: &[String], limit: usize, empty: &str) -> Value {
    if list.is_empty() {
        return empty.into();
    }
    let shown = list.iter().take(limit).cloned().collect::<Vec<_>>().join(",");
    if list.len() > limit { format!("{shown} + {} more...", list.len() - limit).into() } else { shown.into() }
}

fn label_text(map: &Value) -> Value {
    or(LabelSelector::from_map(map).to_string(), "<none>")
}

fn selector_text(selector: &Value) -> Value {
    match LabelSelector::from_object(selector) {
        Ok(selector) => or(selector.to_string(), "<none>"),
        Err(_) => "<error>".into(),
    }
}

/// The pod specification of a workload.
fn pod_spec(object: &Value) -> &Value {
    ["spec.jobTemplate.spec.template.spec", "spec.template.spec", "template.spec"]
        .into_iter()
        .map(|path| meta::get(object, path))
        .find(|spec| !spec.is_null())
        .unwrap_or(&Value::Null)
}

fn container_fields(object: &Value, key: &str) -> Value {
    meta::items(pod_spec(object), "containers").iter().map(|container| meta::text(container, key)).collect::<Vec<_>>().join(",").into()
}

pub(super) fn container_names(object: &Value) -> Value {
    container_fields(object, "name")
}

pub(super) fn container_images(object: &Value) -> Value {
    container_fields(object, "image")
}

pub(super) fn template_labels(object: &Value) -> Value {
    label_text(meta::get(object, "template.metadata.labels"))
}

pub(super) fn node_selector(object: &Value) -> Value {
    label_text(&pod_spec(object)["nodeSelector"])
}

/// Label selector objects and plain maps alike.
pub(super) fn selector(object: &Value) -> Value {
    let selector = meta::get(object, "spec.selector");
    let is_object = ["matchLabels", "matchExpressions"].iter().any(|key| selector.get(key).is_some_and(|value| !value.is_string()));
    if is_object { selector_text(selector) } else { label_text(selector) }
}

pub(super) fn cron_selector(object: &Value) -> Value {
    selector_text(meta::get(object, "spec.jobTemplate.spec.selector"))
}

pub(super) fn pod_selector(object: &Value) -> Value {
    selector_text(meta::get(object, "spec.podSelector"))
}

pub(super) fn ready_replicas(object: &Value) -> Value {
    format!("{}/{}", number(object, "status.readyReplicas"), number(object, "spec.replicas")).into()
}

pub(super) fn revision_controller(object: &Value) -> Value {
    let Some(owner) = meta::controller_of(object) else { return "<none>".into() };
    let (group, _) = crate::resource::split_api_version(meta::api_version(owner));
    let kind = meta::kind(owner).to_lowercase();
    let group = if group.is_empty() { String::new() } else { format!(".{group}") };
    format!("{kind}{group}/{}", meta::name_field(owner)).into()
}

pub(super) fn job_status(job: &Value) -> Value {
    for (kind, shown) in [("Complete", "Complete"), ("Failed", "Failed")] {
        if is_true(job, kind) {
            return shown.into();
        }
    }
    if meta::is_deleting(job) {
        return "Terminating".into();
    }
    for kind in ["Suspended", "FailureTarget", "SuccessCriteriaMet"] {
        if is_true(job, kind) {
            return kind.into();
        }
    }
    "Running".into()
}

pub(super) fn job_completions(job: &Value) -> Value {
    let succeeded = number(job, "status.succeeded");
    match (meta::get(job, "spec.completions").as_i64(), number(job, "spec.parallelism")) {
        (Some(completions), _) => format!("{succeeded}/{completions}").into(),
        (None, parallelism) if parallelism > 1 => format!("{succeeded}/1 of {parallelism}").into(),
        _ => format!("{succeeded}/1").into(),
    }
}

pub(super) fn job_duration(job: &Value, now: Timestamp) -> Value {
    let time = |path: &str| crate::time::parse(meta::text(job, path));
    match (time("status.startTime"), time("status.completionTime")) {
        (None, _) => "".into(),
        (Some(start), end) => human_duration(end.unwrap_or(now).duration_since(start).as_secs()).into(),
    }
}

pub(super) fn cron_suspended(object: &Value) -> Value {
    match meta::get(object, "spec.suspend").as_bool() {
        Some(true) => "True".into(),
        Some(false) => "False".into(),
        None => "<unset>".into(),
    }
}

pub(super) fn cluster_ip(service: &Value) -> Value {
    or(strings(service, "spec.clusterIPs").into_iter().next().unwrap_or_default(), "<none>")
}

/// Addresses and names of `status.loadBalancer`, sorted.
pub(super) fn load_balancer(object: &Value) -> Value {
    let points: BTreeSet<&str> = meta::items(object, "status.loadBalancer.ingress")
        .iter()
        .filter_map(|point| [meta::text(point, "ip"), meta::text(point, "hostname")].into_iter().find(|text| !text.is_empty()))
        .collect();
    points.into_iter().collect::<Vec<_>>().join(",").into()
}

pub(super) fn external_ip(service: &Value) -> Value {
    let addresses = strings(service, "spec.externalIPs");
    match meta::text(service, "spec.type") {
        "ClusterIP" | "NodePort" => or(addresses.join(","), "<none>"),
        "LoadBalancer" => {
            let mut all: Vec<String> =
                load_balancer(service).as_str().filter(|text| !text.is_empty()).map(String::from).into_iter().collect();
            all.extend(addresses);
            or(all.join(","), "<pending>")
        }
        "ExternalName" => meta::text(service, "spec.externalName").into(),
        _ => "<unknown>".into(),
    }
}

pub(super) fn service_ports(service: &Value) -> Value {
    let port_text = |port: &Value| {
        let (number, protocol) = (port["port"].as_i64().unwrap_or_default(), meta::text(port, "protocol"));
        match port["nodePort"].as_i64().unwrap_or_default() {
            0 => format!("{number}/{protocol}"),
            node_port => format!("{number}:{node_port}/{protocol}"),
        }
    };
    or(meta::items(service, "spec.ports").iter().map(port_text).collect::<Vec<_>>().join(","), "<none>")
}

fn host_port(address: &str, port: i64) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

pub(super) fn endpoints(object: &Value) -> Value {
    let mut list = Vec::new();
    for subset in meta::items(object, "subsets") {
        let addresses: Vec<&str> = meta::items(subset, "addresses").iter().map(|address| meta::text(address, "ip")).collect();
        let ports = meta::items(subset, "ports");
        if ports.is_empty() {
            list.extend(addresses.iter().map(|address| address.to_string()));
        }
        for port in ports {
            let number = port["port"].as_i64().unwrap_or_default();
            list.extend(addresses.iter().map(|address| host_port(address, number)));
        }
    }
    let empty = if meta::items(object, "subsets").is_empty() { "<none>" } else { "" };
    limited(&list, 3, empty)
}

pub(super) fn slice_ports(slice: &Value) -> Value {
    let port_text = |port: &Value| match (port["port"].as_i64(), port["name"].as_str()) {
        (Some(number), _) => number.to_string(),
        (None, Some(name)) => name.to_string(),
        (None, None) => "*".to_string(),
    };
    limited(&meta::items(slice, "ports").iter().map(port_text).collect::<Vec<_>>(), 3, "<unset>")
}

pub(super) fn slice_endpoints(slice: &Value) -> Value {
    let addresses: Vec<String> = meta::items(slice, "endpoints").iter().flat_map(|endpoint| strings(endpoint, "addresses")).collect();
    limited(&addresses, 3, "<unset>")
}

pub(super) fn node_status(node: &Value) -> Value {
    let ready = match condition(node, "status.conditions", "Ready") {
        Some(found) if found["status"] == "True" => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    };
    if meta::get(node, "spec.unschedulable") == true { format!("{ready},SchedulingDisabled").into() } else { ready.into() }
}

pub(super) fn node_roles(node: &Value) -> Value {
    let role = |(key, value): (&str, &str)| match key.strip_prefix("node-role.kubernetes.io/") {
        Some(role) => Some(role.to_string()),
        None => (key == "kubernetes.io/role").then(|| value.to_string()),
    };
    let roles: BTreeSet<String> = meta::labels(node).filter_map(role).filter(|role| !role.is_empty()).collect();
    or(roles.into_iter().collect::<Vec<_>>().join(","), "<none>")
}

fn node_address(node: &Value, kind: &str) -> Value {
    let address = condition(node, "status.addresses", kind).map(|address| meta::text(address, "address").to_string());
    or(address.unwrap_or_default(), "<none>")
}

pub(super) fn node_internal_ip(node: &Value) -> Value {
    node_address(node, "InternalIP")
}

pub(super) fn node_external_ip(node: &Value) -> Value {
    node_address(node, "ExternalIP")
}

fn first_text<'a>(object: &'a Value, paths: &[&str]) -> &'a str {
    paths.iter().map(|path| meta::text(object, path)).find(|text| !text.is_empty()).unwrap_or_default()
}

pub(super) fn event_first_seen(event: &Value, now: Timestamp) -> Value {
    age(first_text(event, &["firstTimestamp", "eventTime"]), now).into()
}

pub(super) fn event_last_seen(event: &Value, now: Timestamp) -> Value {
    age(first_text(event, &["series.lastObservedTime", "lastTimestamp", "firstTimestamp", "eventTime"]), now).into()
}

pub(super) fn event_object(event: &Value) -> Value {
    let kind = meta::text(event, "involvedObject.kind").to_lowercase();
    match meta::text(event, "involvedObject.name") {
        "" => kind.into(),
        name => format!("{kind}/{name}").into(),
    }
}

pub(super) fn event_source(event: &Value) -> Value {
    let component = first_text(event, &["source.component", "reportingComponent"]);
    match first_text(event, &["source.host", "reportingInstance"]) {
        "" => component.into(),
        instance => format!("{component}, {instance}").into(),
    }
}

pub(super) fn event_message(event: &Value) -> Value {
    meta::text(event, "message").trim().into()
}

pub(super) fn event_count(event: &Value) -> Value {
    let series = meta::get(event, "series.count").as_i64();
    series.unwrap_or_else(|| number(event, "count").max(1)).into()
}

pub(super) fn config_entries(object: &Value) -> Value {
    (meta::entries(object, "data").count() + meta::entries(object, "binaryData").count()).into()
}

fn access_modes(object: &Value, path: &str) -> Value {
    let present = strings(object, path);
    let short = [("ReadWriteOnce", "RWO"), ("ReadOnlyMany", "ROX"), ("ReadWriteMany", "RWX"), ("ReadWriteOncePod", "RWOP")];
    short.iter().filter(|(mode, _)| present.iter().any(|name| name == mode)).map(|(_, short)| *short).collect::<Vec<_>>().join(",").into()
}

pub(super) fn volume_access_modes(volume: &Value) -> Value {
    access_modes(volume, "spec.accessModes")
}

pub(super) fn claim_access_modes(claim: &Value) -> Value {
    if meta::text(claim, "spec.volumeName").is_empty() { "".into() } else { access_modes(claim, "status.accessModes") }
}

pub(super) fn claim_capacity(claim: &Value) -> Value {
    if meta::text(claim, "spec.volumeName").is_empty() {
        return "".into();
    }
    Quantity::of(meta::get(claim, "status.capacity.storage")).into()
}

pub(super) fn phase_or_terminating(object: &Value) -> Value {
    if meta::is_deleting(object) { "Terminating".into() } else { meta::text(object, "status.phase").into() }
}

pub(super) fn volume_claim(volume: &Value) -> Value {
    match meta::get(volume, "spec.claimRef") {
        Value::Null => "".into(),
        claim => format!("{}/{}", meta::text(claim, "namespace"), meta::text(claim, "name")).into(),
    }
}

pub(super) fn storage_class(object: &Value) -> Value {
    meta::annotation(object, "volume.beta.kubernetes.io/storage-class")
        .unwrap_or_else(|| meta::text(object, "spec.storageClassName"))
        .into()
}

pub(super) fn storage_class_name(class: &Value) -> Value {
    let keys = ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
    let is_default = keys.iter().any(|key| meta::annotation(class, key) == Some("true"));
    let name = meta::name(class);
    if is_default { format!("{name} (default)").into() } else { name.into() }
}

pub(super) fn component(object: &Value, key: &str) -> Value {
    condition(object, "conditions", "Healthy").map(|found| meta::text(found, key)).unwrap_or_default().into()
}

pub(super) fn component_status(object: &Value) -> Value {
    match condition(object, "conditions", "Healthy") {
        Some(found) if found["status"] == "True" => "Healthy".into(),
        Some(_) => "Unhealthy".into(),
        None => "Unknown".into(),
    }
}

pub(super) fn quota(object: &Value, limits: bool) -> Value {
    let mut names: Vec<&String> = meta::entries(object, "status.hard").map(|(name, _)| name).collect();
    names.sort();
    let entry = |name: &&String| {
        let value = |list: &str| Quantity::of(&object["status"][list][name.as_str()]);
        format!("{name}: {}/{}", value("used"), value("hard"))
    };
    names.iter().filter(|name| name.starts_with("limits.") == limits).map(entry).collect::<Vec<_>>().join(", ").into()
}

pub(super) fn ingress_hosts(ingress: &Value) -> Value {
    let rules = meta::items(ingress, "spec.rules");
    let hosts: Vec<&str> = rules.iter().map(|rule| meta::text(rule, "host")).filter(|host| !host.is_empty()).collect();
    match hosts.len() {
        0 => "*".into(),
        count if count > 3 => format!("{} + {} more...", hosts[..3].join(","), rules.len() - 3).into(),
        _ => hosts.join(",").into(),
    }
}

pub(super) fn ingress_ports(ingress: &Value) -> Value {
    if meta::items(ingress, "spec.tls").is_empty() { "80".into() } else { "80, 443".into() }
}

pub(super) fn class_parameters(class: &Value) -> Value {
    let parameters = meta::get(class, "spec.parameters");
    if parameters.is_null() {
        return "<none>".into();
    }
    let group = parameters["apiGroup"].as_str().map(|group| format!(".{group}")).unwrap_or_default();
    format!("{}{group}/{}", meta::kind(parameters), meta::name_field(parameters)).into()
}

pub(super) fn cidrs(object: &Value) -> Value {
    strings(object, "spec.cidrs").join(",").into()
}

pub(super) fn address_parent(object: &Value) -> Value {
    let parent = meta::get(object, "spec.parentRef");
    if parent.is_null() {
        return "<none>".into();
    }
    let text = |key: &str| meta::text(parent, key);
    let group = if text("group").is_empty() { String::new() } else { format!(".{}", text("group")) };
    let namespace = if text("namespace").is_empty() { String::new() } else { format!("{}/", text("namespace")) };
    format!("{}/{namespace}{}", format!("{}{group}", text("resource")).to_lowercase(), text("name")).into()
}

pub(super) fn role_reference(binding: &Value) -> Value {
    format!("{}/{}", meta::text(binding, "roleRef.kind"), meta::text(binding, "roleRef.name")).into()
}

pub(super) fn subjects(binding: &Value, kind: &str) -> Value {
    let shown = |subject: &Value| match kind {
        "ServiceAccount" => format!("{}/{}", meta::text(subject, "namespace"), meta::name_field(subject)),
        _ => meta::name_field(subject).to_string(),
    };
    meta::items(binding, "subjects").iter().filter(|subject| subject["kind"] == kind).map(shown).collect::<Vec<_>>().join(", ").into()
}

pub(super) fn requested_duration(request: &Value) -> Value {
    meta::get(request, "spec.expirationSeconds").as_i64().map_or("<none>".into(), |seconds| human_duration(seconds).into())
}

pub(super) fn request_condition(request: &Value) -> Value {
    let has = |kind: &str| condition(request, "status.conditions", kind).is_some();
    let mut shown = if has("Denied") {
        "Denied"
    } else if has("Approved") {
        "Approved"
    } else {
        "Pending"
    }
    .to_string();
    if has("Failed") {
        shown.push_str(",Failed");
    }
    if !meta::text(request, "status.certificate").is_empty() {
        shown.push_str(",Issued");
    }
    shown.into()
}

pub(super) fn autoscaler_reference(object: &Value) -> Value {
    format!("{}/{}", meta::text(object, "spec.scaleTargetRef.kind"), meta::text(object, "spec.scaleTargetRef.name")).into()
}

pub(super) fn autoscaler_metrics(object: &Value) -> Value {
    let current = meta::items(object, "status.currentMetrics");
    let list: Vec<String> = meta::items(object, "spec.metrics")
        .iter()
        .enumerate()
        .map(|(index, metric)| metric_text(metric, current.get(index).unwrap_or(&Value::Null)))
        .collect();
    match list.len() {
        0 => "<none>".into(),
        count if count > 2 => format!("{} + {} more...", list[..2].join(", "), count - 2).into(),
        _ => list.join(", ").into(),
    }
}

fn metric_text(metric: &Value, status: &Value) -> String {
    let source = match meta::text(metric, "type") {
        "External" => "external",
        "Pods" => "pods",
        "Object" => "object",
        "Resource" => "resource",
        "ContainerResource" => "containerResource",
        _ => return "<unknown type>".to_string(),
    };
    let target = &metric[source]["target"];
    let now = &status[source]["current"];
    let show = |value: &Value, absent: &str| value.as_str().map_or(absent.to_string(), String::from);
    let percent = |value: &Value, absent: &str| value.as_i64().map_or(absent.to_string(), |number| format!("{number}%"));
    let has_average = !target["averageValue"].is_null();
    match source {
        "resource" | "containerResource" => {
            let name = meta::text(&metric[source], "name");
            if has_average {
                format!("{name}: {}/{}", show(&now["averageValue"], "<unknown>"), show(&target["averageValue"], "<unknown>"))
            } else {
                format!("{name}: {}/{}", percent(&now["averageUtilization"], "<unknown>"), percent(&target["averageUtilization"], "<auto>"))
            }
        }
        "pods" => format!("{}/{}", show(&now["averageValue"], "<unknown>"), show(&target["averageValue"], "<unknown>")),
        _ if has_average => format!("{}/{} (avg)", show(&now["averageValue"], "<unknown>"), show(&target["averageValue"], "<unknown>")),
        _ => format!("{}/{}", show(&now["value"], "<unknown>"), show(&target["value"], "<unknown>")),
    }
}

pub(super) fn token_audiences(driver: &Value) -> Value {
    match meta::get(driver, "spec.tokenRequests") {
        Value::Null => "<unset>".into(),
        requests => {
            requests.as_array().into_iter().flatten().map(|request| meta::text(request, "audience")).collect::<Vec<_>>().join(",").into()
        }
    }
}

pub(super) fn lifecycle_modes(driver: &Value) -> Value {
    or(strings(driver, "spec.volumeLifecycleModes").join(","), "<none>")
}

pub(super) fn parameter_kind(policy: &Value) -> Value {
    match meta::get(policy, "spec.paramKind") {
        Value::Null => "<unset>".into(),
        kind => format!("{}/{}", meta::text(kind, "apiVersion"), meta::text(kind, "kind")).into(),
    }
}

pub(super) fn parameter_reference(binding: &Value) -> Value {
    let reference = meta::get(binding, "spec.paramRef");
    match (meta::text(reference, "name"), meta::text(reference, "namespace")) {
        ("", _) if reference["selector"].is_object() => selector_text(&reference["selector"]),
        ("", _) => "<unset>".into(),
        (name, "") => format!("*/{name}").into(),
        (name, namespace) => format!("{namespace}/{name}").into(),
    }
}

pub(super) fn dangling(schema: &Value) -> Value {
    condition(schema, "status.conditions", "Dangling").map(|found| meta::text(found, "status")).unwrap_or("?").into()
}

pub(super) fn claim_state(claim: &Value) -> Value {
    let mut states = Vec::new();
    let allocated = !meta::get(claim, "status.allocation").is_null();
    if meta::is_deleting(claim) {
        states.push("deleted");
    } else if !allocated {
        states.push("pending");
    }
    if allocated {
        states.push("allocated");
        if !meta::items(claim, "status.reservedFor").is_empty() {
            states.push("reserved");
        }
    }
    states.join(",").into()
}

pub(super) fn api_service(object: &Value) -> Value {
    match meta::get(object, "spec.service") {
        Value::Null => "Local".into(),
        service => format!("{}/{}", meta::text(service, "namespace"), meta::text(service, "name")).into(),
    }
}

pub(super) fn api_service_available(object: &Value) -> Value {
    match condition(object, "status.conditions", "Available") {
        Some(found) if found["status"] == "True" => "True".into(),
        Some(found) => format!("{} ({})", meta::text(found, "status"), meta::text(found, "reason")).into(),
        None => "Unknown".into(),
    }
}
