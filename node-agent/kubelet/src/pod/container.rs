//! The CRI configuration of one container.
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod, VolumeMount};

use super::env;
use super::meta::{full_name, host_network, name_of, namespace_of, spec, uid_of};
use super::resources as amounts;
use super::sandbox;
use crate::cri::v1;
use crate::host::Host;
use crate::runtime;
use crate::volume::subpath;

const MASKED_PATHS: &[&str] = &[
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY_PATHS: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What a container's configuration depends on besides the spec.
pub struct Circumstances<'a> {
    pub image_ref: String,
    pub restart_count: i32,
    pub pod_ips: &'a [String],
    /// Host paths of the pod's volumes.
    pub volumes: &'a HashMap<String, PathBuf>,
    /// The container whose processes an ephemeral container joins.
    pub target: Option<String>,
}

/// The error is the message of a `CreateContainerConfigError`.
pub async fn container_config(
    host: &Host,
    pod: &Pod,
    container: &Container,
    circumstances: &Circumstances<'_>,
) -> Result<v1::ContainerConfig, String> {
    let services = host.watch.services.list();
    let host_ips = host.host_ips();
    let facts = crate::downward::Facts { pod_ips: circumstances.pod_ips, host_ips: &host_ips, allocatable: &host.allocatable };
    let sources = env::Sources { lookup: &host.lookup, services: &services, downward: &facts };
    let variables = env::environment(pod, container, &sources).await?;
    let image_user = image_user(host, container).await?;
    verify_non_root(pod, container, &image_user)?;
    let mounts = mounts(host, pod, container, circumstances, &variables).await?;
    Ok(v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: container.name.clone(),
            attempt: u32::try_from(circumstances.restart_count).unwrap_or(0),
        }),
        image: Some(v1::ImageSpec {
            image: circumstances.image_ref.clone(),
            user_specified_image: container.image.clone().unwrap_or_default(),
            ..v1::ImageSpec::default()
        }),
        command: env::expand_all(container.command.as_ref(), &variables),
        args: env::expand_all(container.args.as_ref(), &variables),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: variables.iter().map(|(key, value)| v1::KeyValue { key: key.clone(), value: value.clone() }).collect(),
        mounts,
        labels: runtime::container_labels(pod, container),
        annotations: runtime::container_annotations(pod, container, circumstances.restart_count),
        log_path: format!("{}/{}.log", container.name, circumstances.restart_count),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        linux: Some(linux(host, pod, container, &image_user, circumstances.target.clone())?),
        stop_signal: stop_signal(container),
        ..v1::ContainerConfig::default()
    })
}

fn stop_signal(container: &Container) -> i32 {
    let name = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.stop_signal.as_deref()).unwrap_or_default();
    v1::Signal::from_str_name(name).unwrap_or(v1::Signal::RuntimeDefault) as i32
}

/// The user that the image says, by number or by name.
struct ImageUser {
    uid: Option<i64>,
    name: String,
}

async fn image_user(host: &Host, container: &Container) -> Result<ImageUser, String> {
    let image = container.image.clone().unwrap_or_default();
    let spec = v1::ImageSpec { image: image.clone(), ..v1::ImageSpec::default() };
    let found = host.cri.image_status(spec).await.map_err(|error| error.message)?;
    let found = found.ok_or_else(|| format!("unable to inspect image \"{image}\""))?;
    let uid = found.uid.map(|uid| uid.value);
    Ok(match uid {
        Some(uid) => ImageUser { uid: Some(uid), name: String::new() },
        None if !found.username.is_empty() => ImageUser { uid: None, name: found.username },
        // Without any user in the image it runs as root.
        None => ImageUser { uid: Some(0), name: String::new() },
    })
}

fn run_as_user(pod: &Pod, container: &Container) -> Option<i64> {
    let own = container.security_context.as_ref().and_then(|context| context.run_as_user);
    own.or_else(|| spec(pod).security_context.as_ref().and_then(|context| context.run_as_user))
}

fn verify_non_root(pod: &Pod, container: &Container, image: &ImageUser) -> Result<(), String> {
    let own = container.security_context.as_ref().and_then(|context| context.run_as_non_root);
    let wanted = own.or_else(|| spec(pod).security_context.as_ref().and_then(|context| context.run_as_non_root));
    if wanted != Some(true) {
        return Ok(());
    }
    let place = format!("(pod: \"{}\", container: {})", full_name(pod), container.name);
    match run_as_user(pod, container) {
        Some(0) => Err(format!("container's runAsUser breaks non-root policy {place}")),
        Some(_) => Ok(()),
        None if image.uid == Some(0) => Err(format!("container has runAsNonRoot and image will run as root {place}")),
        None if !image.name.is_empty() => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({}), cannot verify user is non-root {place}",
            image.name
        )),
        None => Ok(()),
    }
}

fn linux(
    host: &Host,
    pod: &Pod,
    container: &Container,
    image: &ImageUser,
    target: Option<String>,
) -> Result<v1::LinuxContainerConfig, String> {
    let context = container.security_context.clone().unwrap_or_default();
    let pod_context = spec(pod).security_context.clone().unwrap_or_default();
    let id = |value: Option<i64>| value.map(|value| v1::Int64Value { value });
    let user = run_as_user(pod, container);
    let unmasked = context.proc_mount.as_deref() == Some("Unmasked");
    let paths = |list: &[&str]| if unmasked { Vec::new() } else { list.iter().map(|path| (*path).to_owned()).collect() };
    let mut namespaces = sandbox::namespaces(pod);
    if let Some(target) = target
        && namespaces.pid == v1::NamespaceMode::Container as i32
    {
        namespaces.pid = v1::NamespaceMode::Target as i32;
        namespaces.target_id = target;
    }
    // Adding capabilities or being privileged needs the right to gain them.
    let adds_admin = context
        .capabilities
        .as_ref()
        .is_some_and(|capabilities| capabilities.add.iter().flatten().any(|name| name == "SYS_ADMIN" || name == "CAP_SYS_ADMIN"));
    let no_new_privileges = context.allow_privilege_escalation == Some(false) && context.privileged != Some(true) && !adds_admin;
    Ok(v1::LinuxContainerConfig {
        resources: Some(container_resources(host, pod, container)),
        security_context: Some(v1::LinuxContainerSecurityContext {
            capabilities: context.capabilities.map(|capabilities| v1::Capability {
                add_capabilities: capabilities.add.unwrap_or_default(),
                drop_capabilities: capabilities.drop.unwrap_or_default(),
                ..v1::Capability::default()
            }),
            privileged: context.privileged.unwrap_or(false),
            namespace_options: Some(namespaces),
            run_as_user: id(user.or(image.uid)),
            run_as_group: id(context.run_as_group.or(pod_context.run_as_group)),
            run_as_username: if user.is_none() { image.name.clone() } else { String::new() },
            readonly_rootfs: context.read_only_root_filesystem.unwrap_or(false),
            supplemental_groups: sandbox::supplemental_groups(pod),
            supplemental_groups_policy: sandbox::groups_policy(pod)?,
            no_new_privs: no_new_privileges,
            masked_paths: paths(MASKED_PATHS),
            readonly_paths: paths(READ_ONLY_PATHS),
            seccomp: Some(sandbox::seccomp(&host.config, pod, container)?),
            ..v1::LinuxContainerSecurityContext::default()
        }),
    })
}

pub fn container_resources(host: &Host, pod: &Pod, container: &Container) -> v1::LinuxContainerResources {
    let cpu_limit = amounts::container_cpu_limit(pod, container).unwrap_or(0);
    let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
    v1::LinuxContainerResources {
        cpu_period: amounts::CPU_PERIOD,
        cpu_quota: amounts::cpu_quota(cpu_limit),
        cpu_shares: amounts::cpu_shares(amounts::request_milli(container, "cpu")),
        memory_limit_in_bytes: amounts::container_memory_limit(pod, container).unwrap_or(0),
        oom_score_adj: amounts::oom_score_adjust(pod, container, host.machine.memory),
        hugepage_limits: host
            .machine
            .hugepage_limits(&amounts::hugepage_limits(limits))
            .into_iter()
            .map(|(page_size, limit)| v1::HugepageLimit { page_size, limit })
            .collect(),
        ..v1::LinuxContainerResources::default()
    }
}

async fn mounts(
    host: &Host,
    pod: &Pod,
    container: &Container,
    circumstances: &Circumstances<'_>,
    variables: &std::collections::BTreeMap<String, String>,
) -> Result<Vec<v1::Mount>, String> {
    let mut mounts = Vec::new();
    for (index, wanted) in container.volume_mounts.iter().flatten().enumerate() {
        let place = subpath::Place { pod_dir: host.config.pod_dir(uid_of(pod)), container: container.name.clone(), index };
        mounts.push(volume_mount(container, wanted, circumstances.volumes, variables, &place)?);
    }
    mounts.extend(own_files(host, pod, container, circumstances.pod_ips).await?);
    Ok(mounts)
}

fn volume_mount(
    container: &Container,
    wanted: &VolumeMount,
    volumes: &HashMap<String, PathBuf>,
    variables: &std::collections::BTreeMap<String, String>,
    place: &subpath::Place,
) -> Result<v1::Mount, String> {
    let volume = volumes
        .get(&wanted.name)
        .ok_or_else(|| format!("cannot find volume \"{}\" to mount into container \"{}\"", wanted.name, container.name))?;
    let sub_path = match (wanted.sub_path.as_deref(), wanted.sub_path_expr.as_deref()) {
        (Some(path), _) if !path.is_empty() => path.to_owned(),
        (_, Some(expression)) if !expression.is_empty() => expand_strictly(expression, variables)?,
        _ => String::new(),
    };
    let host_path = if sub_path.is_empty() {
        volume.clone()
    } else {
        if Path::new(&sub_path).is_absolute() || Path::new(&sub_path).components().any(|part| part == std::path::Component::ParentDir) {
            return Err(format!("subPath \"{sub_path}\" must be a relative path without '..'"));
        }
        subpath::prepare(volume, &wanted.name, &sub_path, place).map_err(|error| {
            format!("failed to prepare subPath for volumeMount \"{}\" of container \"{}\": {error}", wanted.name, container.name)
        })?
    };
    let privileged = sandbox::is_privileged(container);
    let propagation = match wanted.mount_propagation.as_deref() {
        Some("HostToContainer") => v1::MountPropagation::PropagationHostToContainer,
        Some("Bidirectional") if privileged => v1::MountPropagation::PropagationBidirectional,
        Some("Bidirectional") => return Err("Bidirectional mount propagation is available only to privileged containers".into()),
        _ => v1::MountPropagation::PropagationPrivate,
    };
    Ok(v1::Mount {
        container_path: absolute(&wanted.mount_path),
        host_path: host_path.display().to_string(),
        readonly: wanted.read_only.unwrap_or(false),
        propagation: propagation as i32,
        ..v1::Mount::default()
    })
}

/// Unlike in commands, an unknown variable is an error here.
fn expand_strictly(expression: &str, variables: &std::collections::BTreeMap<String, String>) -> Result<String, String> {
    let missing = std::cell::RefCell::new(None);
    let text = env::expand(expression, &|name| {
        let value = variables.get(name).cloned();
        if value.is_none() {
            missing.borrow_mut().get_or_insert_with(|| name.to_owned());
        }
        value
    });
    match missing.into_inner() {
        Some(_) => Err(format!("missing value for \"{expression}\"")),
        None => Ok(text),
    }
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// Makes the files of the pod's own folder that the container mounts, /etc/hosts and the one for its last words, and the folder of
/// its logs.
async fn own_files(host: &Host, pod: &Pod, container: &Container, pod_ips: &[String]) -> Result<Vec<v1::Mount>, String> {
    let mut mounts = Vec::new();
    let mut files = Vec::new();
    let mut add = |container_path: &str, path: PathBuf, text: String, mode: u32| {
        let (container_path, host_path) = (absolute(container_path), path.display().to_string());
        mounts.push(v1::Mount { container_path, host_path, ..v1::Mount::default() });
        files.push((path, text, mode));
    };
    let pod_dir = host.config.pod_dir(uid_of(pod));
    let brings_hosts = container.volume_mounts.iter().flatten().any(|mount| mount.mount_path == "/etc/hosts");
    if !brings_hosts && !pod_ips.is_empty() {
        add("/etc/hosts", pod_dir.join("etc-hosts"), hosts_text(host, pod, pod_ips).await, 0o644);
    }
    if let Some(path) = container.termination_message_path.as_deref().filter(|path| !path.is_empty()) {
        // A new one for each start.
        add(path, pod_dir.join("containers").join(&container.name).join(crate::short_id()), String::new(), 0o666);
    }
    let logs = host.config.pod_logs_dir(namespace_of(pod), name_of(pod), uid_of(pod)).join(&container.name);
    let written = host.in_flight.run(uid_of(pod), move || {
        let failed = |path: &Path, error: std::io::Error| std::io::Error::other(format!("{}: {error}", path.display()));
        std::fs::create_dir_all(&logs).map_err(|error| failed(&logs, error))?;
        files.iter().try_for_each(|(path, text, mode)| write_file(path, text, *mode).map_err(|error| failed(path, error)))
    });
    written.await.map_err(|error| format!("failed to make the files of container {}: {error}", container.name))?;
    Ok(mounts)
}

async fn hosts_text(host: &Host, pod: &Pod, pod_ips: &[String]) -> String {
    if !host_network(pod) {
        return super::dns::hosts_file(pod, pod_ips, &host.config.cluster_domain);
    }
    let node = tokio::fs::read_to_string("/etc/hosts").await.unwrap_or_default();
    super::dns::host_network_hosts_file(pod, &node)
}

/// The mode is what was asked for, whatever the umask.
fn write_file(path: &Path, text: &str, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::write(path, text)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}
