//! The CRI configuration of a pod's sandbox and the security settings that its containers share.
use k8s_openapi::api::core::v1::{Container, Pod, SeccompProfile};

use super::dns;
use super::meta::{containers, ephemeral_containers, host_network, init_containers, name_of, namespace_of, spec, uid_of};
use super::resources;
use crate::config::Config;
use crate::cri::v1;
use crate::runtime::pod_labels;

pub fn sandbox_config(
    config: &Config,
    pod: &Pod,
    attempt: u32,
    cgroup_parent: &str,
    node_dns: &v1::DnsConfig,
) -> Result<v1::PodSandboxConfig, String> {
    let (namespace, name, uid) = (namespace_of(pod), name_of(pod), uid_of(pod));
    // A pod in the host's network keeps the host's name.
    let hostname = if host_network(pod) { String::new() } else { dns::kernel_hostname(pod, &config.cluster_domain)? };
    Ok(v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata { name: name.into(), namespace: namespace.into(), uid: uid.into(), attempt }),
        hostname,
        log_directory: config.pod_logs_dir(namespace, name, uid).display().to_string(),
        dns_config: Some(dns::resolver(pod, node_dns, &config.cluster_dns, &config.cluster_domain)),
        port_mappings: port_mappings(pod),
        labels: pod_labels(pod),
        annotations: pod.metadata.annotations.clone().unwrap_or_default().into_iter().collect(),
        linux: Some(linux(config, pod, cgroup_parent)?),
        windows: None,
    })
}

fn port_mappings(pod: &Pod) -> Vec<v1::PortMapping> {
    if host_network(pod) {
        return Vec::new();
    }
    let ports = init_containers(pod).iter().filter(|container| super::meta::is_sidecar(container)).chain(containers(pod));
    ports
        .flat_map(|container| container.ports.iter().flatten())
        .map(|port| v1::PortMapping {
            protocol: match port.protocol.as_deref() {
                Some("UDP") => v1::Protocol::Udp as i32,
                Some("SCTP") => v1::Protocol::Sctp as i32,
                _ => v1::Protocol::Tcp as i32,
            },
            container_port: port.container_port,
            host_port: port.host_port.unwrap_or(0),
            host_ip: port.host_ip.clone().unwrap_or_default(),
        })
        .collect()
}

fn linux(config: &Config, pod: &Pod, cgroup_parent: &str) -> Result<v1::LinuxPodSandboxConfig, String> {
    let spec = spec(pod);
    let context = spec.security_context.clone().unwrap_or_default();
    let id = |value: Option<i64>| value.map(|value| v1::Int64Value { value });
    let ephemeral = ephemeral_containers(pod);
    let privileged = containers(pod).iter().chain(init_containers(pod)).chain(&ephemeral).any(is_privileged);
    let sysctls = context.sysctls.iter().flatten().map(|sysctl| (sysctl.name.replace('/', "."), sysctl.value.clone())).collect();
    let cpu_limit = resources::pod_limit_milli(pod, "cpu").unwrap_or(0);
    let pod_resources = v1::LinuxContainerResources {
        cpu_period: resources::CPU_PERIOD,
        cpu_quota: resources::cpu_quota(cpu_limit),
        cpu_shares: resources::cpu_shares(resources::pod_request_milli(pod, "cpu")),
        memory_limit_in_bytes: resources::pod_limit_milli(pod, "memory").map_or(0, |milli| milli / 1000),
        ..v1::LinuxContainerResources::default()
    };
    let _ = config;
    Ok(v1::LinuxPodSandboxConfig {
        cgroup_parent: cgroup_parent.into(),
        security_context: Some(v1::LinuxSandboxSecurityContext {
            namespace_options: Some(namespaces(pod)),
            run_as_user: id(context.run_as_user),
            run_as_group: id(context.run_as_group),
            supplemental_groups: supplemental_groups(pod),
            supplemental_groups_policy: groups_policy(pod)?,
            privileged,
            seccomp: Some(v1::SecurityProfile {
                profile_type: v1::security_profile::ProfileType::RuntimeDefault as i32,
                localhost_ref: String::new(),
            }),
            ..v1::LinuxSandboxSecurityContext::default()
        }),
        sysctls,
        overhead: None,
        resources: Some(pod_resources),
    })
}

pub fn is_privileged(container: &Container) -> bool {
    container.security_context.as_ref().and_then(|context| context.privileged) == Some(true)
}

/// Which namespaces the pod's processes live in.
pub fn namespaces(pod: &Pod) -> v1::NamespaceOption {
    let spec = spec(pod);
    let node_or =
        |host: Option<bool>, otherwise: v1::NamespaceMode| (if host == Some(true) { v1::NamespaceMode::Node } else { otherwise }) as i32;
    let own_pid = if spec.share_process_namespace == Some(true) { v1::NamespaceMode::Pod } else { v1::NamespaceMode::Container };
    v1::NamespaceOption {
        network: node_or(spec.host_network, v1::NamespaceMode::Pod),
        pid: node_or(spec.host_pid, own_pid),
        ipc: node_or(spec.host_ipc, v1::NamespaceMode::Pod),
        target_id: String::new(),
        userns_options: None,
    }
}

pub fn supplemental_groups(pod: &Pod) -> Vec<i64> {
    let spec = spec(pod);
    let Some(context) = &spec.security_context else { return Vec::new() };
    context.fs_group.into_iter().chain(context.supplemental_groups.iter().flatten().copied()).collect()
}

pub fn groups_policy(pod: &Pod) -> Result<i32, String> {
    let spec = spec(pod);
    let policy = spec.security_context.as_ref().and_then(|context| context.supplemental_groups_policy.as_deref());
    match policy {
        None | Some("Merge") => Ok(v1::SupplementalGroupsPolicy::Merge as i32),
        Some("Strict") => Ok(v1::SupplementalGroupsPolicy::Strict as i32),
        Some(other) => Err(format!("unsupported supplementalGroupsPolicy: {other}")),
    }
}

/// The seccomp profile of a container: its own, else the pod's, else none.
pub fn seccomp(config: &Config, pod: &Pod, container: &Container) -> Result<v1::SecurityProfile, String> {
    use v1::security_profile::ProfileType;
    let spec = spec(pod);
    let own = container.security_context.as_ref().and_then(|context| context.seccomp_profile.as_ref());
    let profile: Option<&SeccompProfile> =
        own.or_else(|| spec.security_context.as_ref().and_then(|context| context.seccomp_profile.as_ref()));
    let of = |profile_type: ProfileType, localhost_ref: String| v1::SecurityProfile { profile_type: profile_type as i32, localhost_ref };
    match profile.map(|profile| profile.type_.as_str()) {
        Some("RuntimeDefault") => Ok(of(ProfileType::RuntimeDefault, String::new())),
        Some("Localhost") => {
            let file = profile.and_then(|profile| profile.localhost_profile.as_deref()).filter(|file| !file.is_empty());
            let file = file.ok_or("localhostProfile must be set if seccompProfile type is Localhost.")?;
            Ok(of(ProfileType::Localhost, config.data_dir.join("seccomp").join(file).display().to_string()))
        }
        _ => Ok(of(ProfileType::Unconfined, String::new())),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodSecurityContext, PodSpec};

    use super::*;

    #[test]
    fn namespaces_follow_the_spec() {
        let of = |spec: PodSpec| {
            let options = namespaces(&Pod { spec: Some(spec), ..Pod::default() });
            (options.network, options.pid, options.ipc)
        };
        assert_eq!(of(PodSpec::default()), (0, 1, 0));
        assert_eq!(of(PodSpec { share_process_namespace: Some(true), ..PodSpec::default() }), (0, 0, 0));
        assert_eq!(of(PodSpec { host_network: Some(true), host_pid: Some(true), host_ipc: Some(true), ..PodSpec::default() }), (2, 2, 2));
    }

    #[test]
    fn groups_start_with_the_volumes_group() {
        let context = PodSecurityContext { fs_group: Some(7), supplemental_groups: Some(vec![8, 9]), ..PodSecurityContext::default() };
        let pod = Pod { spec: Some(PodSpec { security_context: Some(context), ..PodSpec::default() }), ..Pod::default() };
        assert_eq!(supplemental_groups(&pod), [7, 8, 9]);
    }
}
