//! A container's environment: literals, references, service variables, and `$(NAME)` in values and commands.
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVar, EnvVarSource, Pod, Secret, Service};
use outrigger_cluster::Lookup;

use super::meta::{name_of, namespace_of, spec};
use crate::downward;

/// Replaces `$(NAME)` by what `lookup` says; unknown names stay as they are, `$$` is a dollar sign.
pub fn expand(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some(tail) = after.strip_prefix('(') {
            match tail.find(')') {
                Some(end) => {
                    let name = &tail[..end];
                    match lookup(name) {
                        Some(value) => out.push_str(&value),
                        None => out.push_str(&format!("$({name})")),
                    }
                    rest = &tail[end + 1..];
                }
                // No end: not a reference.
                None => {
                    out.push_str("$(");
                    rest = tail;
                }
            }
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// The variables that let a program find Services without DNS.
pub fn service_variables(services: &[Arc<Service>], namespace: &str, links: bool) -> BTreeMap<String, String> {
    let mut chosen: BTreeMap<&str, &Service> = BTreeMap::new();
    for service in services {
        let ip = service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()).unwrap_or_default();
        if ip.is_empty() || ip == "None" {
            continue;
        }
        let name = service.metadata.name.as_deref().unwrap_or_default();
        let home = service.metadata.namespace.as_deref().unwrap_or_default();
        if home == namespace && links {
            chosen.insert(name, service);
        } else if home == "default" && name == "kubernetes" {
            chosen.entry(name).or_insert(service);
        }
    }
    let mut variables = BTreeMap::new();
    for (name, service) in chosen {
        add_service(name, service, &mut variables);
    }
    variables
}

fn add_service(name: &str, service: &Service, variables: &mut BTreeMap<String, String>) {
    let Some(spec) = &service.spec else { return };
    let ports = spec.ports.as_deref().unwrap_or_default();
    let Some(first) = ports.first() else { return };
    let prefix = name.to_uppercase().replace('-', "_");
    let ip = spec.cluster_ip.clone().unwrap_or_default();
    let host = if ip.contains(':') { format!("[{ip}]") } else { ip.clone() };
    variables.insert(format!("{prefix}_SERVICE_HOST"), ip.clone());
    variables.insert(format!("{prefix}_SERVICE_PORT"), first.port.to_string());
    for port in ports.iter() {
        if let Some(port_name) = port.name.as_deref().filter(|name| !name.is_empty()) {
            variables.insert(format!("{prefix}_SERVICE_PORT_{}", port_name.to_uppercase().replace('-', "_")), port.port.to_string());
        }
    }
    for (index, port) in ports.iter().enumerate() {
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let url = format!("{}://{host}:{}", protocol.to_lowercase(), port.port);
        if index == 0 {
            variables.insert(format!("{prefix}_PORT"), url.clone());
        }
        let one = format!("{prefix}_PORT_{}_{}", port.port, protocol.to_uppercase());
        variables.insert(format!("{one}_PROTO"), protocol.to_lowercase());
        variables.insert(format!("{one}_PORT"), port.port.to_string());
        variables.insert(format!("{one}_ADDR"), ip.clone());
        variables.insert(one, url);
    }
}

/// What the environment is made from besides the pod.
pub struct Sources<'a> {
    pub lookup: &'a Lookup,
    pub services: &'a [Arc<Service>],
    pub downward: &'a downward::Facts<'a>,
}

/// The whole environment, or the message of a `CreateContainerConfigError`. Also the names that had to be left out of `envFrom`.
pub async fn environment(pod: &Pod, container: &Container, sources: &Sources<'_>) -> Result<BTreeMap<String, String>, String> {
    let links = spec(pod).enable_service_links.unwrap_or(true);
    let services = service_variables(sources.services, namespace_of(pod), links);
    let mut variables = from_whole_objects(pod, container, sources).await?;
    for variable in container.env.iter().flatten() {
        if let Some(value) = value_of(pod, container, variable, &variables, &services, sources).await? {
            variables.insert(variable.name.clone(), value);
        }
    }
    for (name, value) in services {
        variables.entry(name).or_insert(value);
    }
    Ok(variables)
}

/// Printable ASCII without `=` (relaxed names are the default since 1.32).
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| (0x20..0x7f).contains(&byte) && byte != b'=')
}

async fn from_whole_objects(pod: &Pod, container: &Container, sources: &Sources<'_>) -> Result<BTreeMap<String, String>, String> {
    let mut variables = BTreeMap::new();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        let mut add = |name: &str, value: String| {
            let name = format!("{prefix}{name}");
            if is_name(&name) {
                variables.insert(name, value);
            }
        };
        if let Some(reference) = &source.config_map_ref {
            if let Some(object) = config_map(pod, &reference.name, reference.optional, sources).await? {
                object.data.iter().flatten().for_each(|(name, value)| add(name, value.clone()));
            }
        } else if let Some(reference) = &source.secret_ref
            && let Some(object) = secret(pod, &reference.name, reference.optional, sources).await?
        {
            object.data.iter().flatten().for_each(|(name, value)| add(name, String::from_utf8_lossy(&value.0).into_owned()));
        }
    }
    Ok(variables)
}

async fn config_map(pod: &Pod, name: &str, optional: Option<bool>, sources: &Sources<'_>) -> Result<Option<Arc<ConfigMap>>, String> {
    match sources.lookup.config_map(namespace_of(pod), name).await.map_err(|error| error.to_string())? {
        None if optional != Some(true) => Err(format!("configmap \"{name}\" not found")),
        found => Ok(found),
    }
}

async fn secret(pod: &Pod, name: &str, optional: Option<bool>, sources: &Sources<'_>) -> Result<Option<Arc<Secret>>, String> {
    match sources.lookup.secret(namespace_of(pod), name).await.map_err(|error| error.to_string())? {
        None if optional != Some(true) => Err(format!("secret \"{name}\" not found")),
        found => Ok(found),
    }
}

async fn value_of(
    pod: &Pod,
    container: &Container,
    variable: &EnvVar,
    known: &BTreeMap<String, String>,
    services: &BTreeMap<String, String>,
    sources: &Sources<'_>,
) -> Result<Option<String>, String> {
    if let Some(value) = variable.value.as_deref().filter(|value| !value.is_empty()) {
        return Ok(Some(expand(value, &|name| known.get(name).or_else(|| services.get(name)).cloned())));
    }
    match &variable.value_from {
        Some(source) => referenced(pod, container, source, sources).await,
        None => Ok(Some(String::new())),
    }
}

/// `None`: an optional reference leads nowhere, so the variable isn't set.
async fn referenced(pod: &Pod, container: &Container, source: &EnvVarSource, sources: &Sources<'_>) -> Result<Option<String>, String> {
    let namespace = namespace_of(pod);
    if let Some(field) = &source.field_ref {
        return downward::field(pod, &field.field_path, sources.downward).map(Some);
    }
    if let Some(resource) = &source.resource_field_ref {
        let owner = match resource.container_name.as_deref().filter(|name| !name.is_empty()) {
            Some(name) => super::meta::find_container(pod, name).map(|(_, container)| container),
            None => Some(container.clone()),
        };
        let owner = owner.ok_or_else(|| format!("container {} not found", resource.container_name.as_deref().unwrap_or_default()))?;
        return downward::resource(&owner, &resource.resource, resource.divisor.as_ref(), sources.downward).map(Some);
    }
    if let Some(key) = &source.config_map_key_ref {
        let object = config_map(pod, &key.name, key.optional, sources).await?;
        let Some(object) = object else { return Ok(None) };
        return match object.data.as_ref().and_then(|data| data.get(&key.key)) {
            Some(value) => Ok(Some(value.clone())),
            None if key.optional == Some(true) => Ok(None),
            None => Err(format!("couldn't find key {} in ConfigMap {namespace}/{}", key.key, key.name)),
        };
    }
    if let Some(key) = &source.secret_key_ref {
        let object = secret(pod, &key.name, key.optional, sources).await?;
        let Some(object) = object else { return Ok(None) };
        return match object.data.as_ref().and_then(|data| data.get(&key.key)) {
            Some(value) => Ok(Some(String::from_utf8_lossy(&value.0).into_owned())),
            None if key.optional == Some(true) => Ok(None),
            None => Err(format!("couldn't find key {} in Secret {namespace}/{}", key.key, key.name)),
        };
    }
    Err(format!("unsupported source of an environment variable in pod {}", name_of(pod)))
}

/// Command and arguments with their references replaced from the environment.
pub fn expand_all(list: Option<&Vec<String>>, variables: &BTreeMap<String, String>) -> Vec<String> {
    list.into_iter().flatten().map(|text| expand(text, &|name| variables.get(name).cloned())).collect()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{ServicePort, ServiceSpec};

    use super::*;

    #[test]
    fn references_in_texts() {
        let lookup = |name: &str| (name == "A").then(|| "x".to_owned());
        for (text, expanded) in [
            ("$(A)", "x"),
            ("a $(A) b$(A)", "a x bx"),
            ("$(B)", "$(B)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$x"),
            ("$A $", "$A $"),
            ("$(A", "$(A"),
            ("ü$(A)ü", "üxü"),
        ] {
            assert_eq!(expand(text, &lookup), expanded, "{text}");
        }
    }

    #[test]
    fn services_of_the_namespace_and_the_api_server() {
        let service = |namespace: &str, name: &str, ip: &str| {
            let mut service = Service {
                spec: Some(ServiceSpec {
                    cluster_ip: Some(ip.into()),
                    ports: Some(vec![ServicePort { name: Some("http".into()), port: 80, ..ServicePort::default() }]),
                    ..ServiceSpec::default()
                }),
                ..Service::default()
            };
            service.metadata.name = Some(name.into());
            service.metadata.namespace = Some(namespace.into());
            Arc::new(service)
        };
        let services =
            [service("shop", "my-web", "10.0.0.1"), service("other", "x", "10.0.0.2"), service("default", "kubernetes", "10.96.0.1")];
        let variables = service_variables(&services, "shop", true);
        assert_eq!(variables["MY_WEB_SERVICE_HOST"], "10.0.0.1");
        assert_eq!(variables["MY_WEB_SERVICE_PORT_HTTP"], "80");
        assert_eq!(variables["MY_WEB_PORT"], "tcp://10.0.0.1:80");
        assert_eq!(variables["MY_WEB_PORT_80_TCP_ADDR"], "10.0.0.1");
        assert_eq!(variables["KUBERNETES_SERVICE_HOST"], "10.96.0.1");
        assert!(!variables.contains_key("X_SERVICE_HOST"));
        assert!(!service_variables(&services, "shop", false).contains_key("MY_WEB_SERVICE_HOST"));
    }
}
