//! Fields of a pod as text, for environment variables and downwardAPI volumes.
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::pod::meta::{name_of, namespace_of, spec, uid_of};
use crate::quantity::{self, Resources};

/// What isn't in the pod's own object when its containers are made.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    pub pod_ips: &'a [String],
    pub host_ips: &'a [String],
    /// Stands in for missing limits.
    pub allocatable: &'a Resources,
}

/// A map as `key="value"` lines, sorted, values quoted as Go quotes them.
pub fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> = map.into_iter().flatten().map(|(key, value)| format!("{key}={}", quote(value))).collect();
    lines.join("\n")
}

fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\u{b}' => out.push_str("\\v"),
            c if (c as u32) < 0x20 || c == '\u{7f}' => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The value of a `fieldPath`.
pub fn field(pod: &Pod, path: &str, facts: &Facts<'_>) -> Result<String, String> {
    if let Some((field, key)) = subscript(path) {
        let map = match field {
            "metadata.labels" => pod.metadata.labels.as_ref(),
            "metadata.annotations" => pod.metadata.annotations.as_ref(),
            _ => return Err(format!("fieldPath \"{path}\" does not support subscript")),
        };
        return Ok(map.and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    let spec = spec(pod);
    Ok(match path {
        "metadata.name" => name_of(pod).into(),
        "metadata.namespace" => namespace_of(pod).into(),
        "metadata.uid" => uid_of(pod).into(),
        "metadata.labels" => format_map(pod.metadata.labels.as_ref()),
        "metadata.annotations" => format_map(pod.metadata.annotations.as_ref()),
        "spec.nodeName" => spec.node_name.clone().unwrap_or_default(),
        "spec.serviceAccountName" => spec.service_account_name.clone().unwrap_or_default(),
        "status.hostIP" => facts.host_ips.first().cloned().unwrap_or_default(),
        "status.hostIPs" => facts.host_ips.join(","),
        "status.podIP" => facts.pod_ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => facts.pod_ips.join(","),
        _ => return Err(format!("unsupported fieldPath: {path}")),
    })
}

/// `metadata.labels['key']` -> its two parts.
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (field, rest) = path.split_once("['")?;
    Some((field, rest.strip_suffix("']")?))
}

/// The value of a `resourceFieldRef` of that container.
pub fn resource(container: &Container, name: &str, divisor: Option<&Quantity>, facts: &Facts<'_>) -> Result<String, String> {
    let (kind, resource) = name.split_once('.').ok_or_else(|| format!("unsupported container resource : {name}"))?;
    let resources = container.resources.as_ref();
    let own = match kind {
        "limits" => resources.and_then(|resources| resources.limits.as_ref()),
        "requests" => resources.and_then(|resources| resources.requests.as_ref()),
        _ => return Err(format!("unsupported container resource : {name}")),
    };
    let known = matches!(resource, "cpu" | "memory" | "ephemeral-storage") || resource.starts_with("hugepages-");
    if !known {
        return Err(format!("unsupported container resource : {name}"));
    }
    let mut amount = own.and_then(|list| list.get(resource)).and_then(|amount| quantity::nano(&amount.0)).unwrap_or(0);
    if amount == 0 && kind == "limits" && !resource.starts_with("hugepages-") {
        amount = facts.allocatable.get(resource).and_then(|amount| quantity::nano(&amount.0)).unwrap_or(0);
    }
    Ok(quantity::divided(amount, divisor).to_string())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ResourceRequirements;

    use super::*;

    #[test]
    fn fields_and_maps() {
        let mut pod = Pod::default();
        pod.metadata.name = Some("p".into());
        pod.metadata.labels = Some([("b".into(), "2".into()), ("a".into(), "x\"y\n".into())].into());
        let facts =
            Facts { pod_ips: &["10.0.0.1".into(), "fd00::1".into()], host_ips: &["192.0.2.1".into()], allocatable: &Resources::new() };
        for (path, value) in [
            ("metadata.name", "p"),
            ("metadata.labels", "a=\"x\\\"y\\n\"\nb=\"2\""),
            ("metadata.labels['b']", "2"),
            ("metadata.annotations['none']", ""),
            ("status.podIPs", "10.0.0.1,fd00::1"),
            ("status.hostIP", "192.0.2.1"),
        ] {
            assert_eq!(field(&pod, path, &facts).as_deref(), Ok(value), "{path}");
        }
        assert!(field(&pod, "spec.containers", &facts).is_err());
    }

    #[test]
    fn missing_limits_are_the_nodes() {
        let list = |text: &str| Resources::from([("cpu".to_owned(), Quantity(text.into()))]);
        let allocatable = list("4");
        let facts = Facts { pod_ips: &[], host_ips: &[], allocatable: &allocatable };
        let mut container = Container::default();
        assert_eq!(resource(&container, "limits.cpu", None, &facts).as_deref(), Ok("4"));
        assert_eq!(resource(&container, "requests.cpu", None, &facts).as_deref(), Ok("0"));
        container.resources = Some(ResourceRequirements { limits: Some(list("1250m")), ..ResourceRequirements::default() });
        assert_eq!(resource(&container, "limits.cpu", None, &facts).as_deref(), Ok("2"));
        assert_eq!(resource(&container, "limits.cpu", Some(&Quantity("1m".into())), &facts).as_deref(), Ok("1250"));
    }
}
