//! A pod as the runtime has it: its sandboxes and containers, newest first, and the labels by which they are found again.
use std::collections::HashMap;

use k8s_openapi::api::core::v1::{Container, Pod};

use crate::cri::{self, Cri, v1};
use crate::pod::meta::{name_of, namespace_of, uid_of};

pub const POD_NAME: &str = "io.kubernetes.pod.name";
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub const POD_UID: &str = "io.kubernetes.pod.uid";
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";

const CONTAINER_HASH: &str = "io.kubernetes.container.hash";
const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
const MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
const MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
const POD_DELETION_GRACE: &str = "io.kubernetes.pod.deletionGracePeriod";
const POD_TERMINATION_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";

/// The longest message of one container that is read back.
const MESSAGE_LIMIT: u64 = 4096;
/// How much of a log's end stands in for a missing message.
const LOG_LIMIT: u64 = 2048;
const LOG_LINES: usize = 80;
const LOG_SETTLE: [u64; 5] = [5, 10, 20, 40, 80];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    Created,
    Running,
    Exited,
    Unknown,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ContainerView {
    pub id: String,
    pub sandbox_id: String,
    pub name: String,
    pub state: RunState,
    pub image: String,
    pub image_ref: String,
    /// Nanoseconds since the epoch, as all times here.
    pub created_at: i64,
    pub started_at: i64,
    pub finished_at: i64,
    pub exit_code: i32,
    pub reason: String,
    pub message: String,
    pub hash: Option<String>,
    pub restart_count: i32,
    pub termination_grace: Option<i64>,
    pub user: Option<v1::LinuxContainerUser>,
    pub resources: Option<v1::LinuxContainerResources>,
    pub log_path: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SandboxView {
    pub id: String,
    pub attempt: u32,
    pub ready: bool,
    pub created_at: i64,
    pub host_network: bool,
    pub ips: Vec<String>,
}

/// One pod in the runtime.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodView {
    pub sandboxes: Vec<SandboxView>,
    pub containers: Vec<ContainerView>,
}

impl PodView {
    /// The newest container of that name.
    pub fn find(&self, name: &str) -> Option<&ContainerView> {
        self.containers.iter().find(|container| container.name == name)
    }

    pub fn running(&self) -> impl Iterator<Item = &ContainerView> {
        self.containers.iter().filter(|container| container.state == RunState::Running)
    }

    pub fn is_empty(&self) -> bool {
        self.sandboxes.is_empty() && self.containers.is_empty()
    }

    /// The addresses of the newest sandbox, if it's up.
    pub fn ips(&self) -> Vec<String> {
        self.sandboxes.first().filter(|sandbox| sandbox.ready).map(|sandbox| sandbox.ips.clone()).unwrap_or_default()
    }

    /// Whether a new sandbox is needed, its attempt number, and the sandbox to keep or replace.
    pub fn sandbox_changed(&self, host_network: bool) -> (bool, u32, Option<&SandboxView>) {
        let ready = self.sandboxes.iter().filter(|sandbox| sandbox.ready).count();
        let Some(newest) = self.sandboxes.first() else { return (true, 0, None) };
        let needed = ready > 1 || !newest.ready || newest.host_network != host_network || (!newest.host_network && newest.ips.is_empty());
        // A sandbox that failed half-way may have no creation time, so the newest isn't always the one with the highest number.
        let highest = self.sandboxes.iter().map(|sandbox| sandbox.attempt).max().unwrap_or(newest.attempt);
        (needed, if needed { highest + 1 } else { newest.attempt }, Some(newest))
    }
}

/// Reads one pod. Fails as a whole: a half-read pod would look as if containers were missing.
pub async fn read(cri: &Cri, uid: &str) -> cri::Result<PodView> {
    let labels: HashMap<String, String> = [(POD_UID.to_owned(), uid.to_owned())].into();
    let sandboxes = cri.list_sandboxes(v1::PodSandboxFilter { label_selector: labels.clone(), ..Default::default() });
    let containers = cri.list_containers(v1::ContainerFilter { label_selector: labels, ..Default::default() });
    let (sandboxes, containers) = tokio::try_join!(sandboxes, containers)?;
    let mut view = PodView::default();
    for sandbox in sandboxes {
        match cri.sandbox_status(&sandbox.id, false).await {
            Ok(answer) => view.sandboxes.extend(answer.status.map(sandbox_view)),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    for container in containers {
        match cri.container_status(&container.id, false).await {
            Ok(answer) => {
                if let Some(status) = answer.status {
                    view.containers.push(container_view(&container.pod_sandbox_id, status).await);
                }
            }
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    view.sandboxes.sort_by_key(|sandbox| std::cmp::Reverse((sandbox.created_at, sandbox.attempt)));
    view.containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    Ok(view)
}

fn sandbox_view(status: v1::PodSandboxStatus) -> SandboxView {
    let network = status.network.unwrap_or_default();
    let ips = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|ip| ip.ip)).filter(|ip| !ip.is_empty());
    let options = status.linux.and_then(|linux| linux.namespaces).and_then(|namespaces| namespaces.options).unwrap_or_default();
    SandboxView {
        id: status.id,
        attempt: status.metadata.map(|metadata| metadata.attempt).unwrap_or_default(),
        ready: status.state == v1::PodSandboxState::SandboxReady as i32,
        created_at: status.created_at,
        host_network: options.network == v1::NamespaceMode::Node as i32,
        ips: ips.collect(),
    }
}

async fn container_view(sandbox_id: &str, status: v1::ContainerStatus) -> ContainerView {
    let annotation = |key: &str| status.annotations.get(key).map(String::as_str);
    let state = match status.state() {
        v1::ContainerState::ContainerCreated => RunState::Created,
        v1::ContainerState::ContainerRunning => RunState::Running,
        v1::ContainerState::ContainerExited => RunState::Exited,
        v1::ContainerState::ContainerUnknown => RunState::Unknown,
    };
    let mut message = status.message.clone();
    if state == RunState::Exited {
        let written = termination_message(&status).await;
        if !written.is_empty() {
            if !message.is_empty() {
                message.push_str(": ");
            }
            message.push_str(&written);
        }
    }
    ContainerView {
        sandbox_id: sandbox_id.into(),
        name: status.labels.get(CONTAINER_NAME).cloned().unwrap_or_default(),
        state,
        image: status.image.as_ref().map(|image| image.image.clone()).unwrap_or_default(),
        image_ref: status.image_ref.clone(),
        created_at: status.created_at,
        started_at: status.started_at,
        finished_at: status.finished_at,
        exit_code: status.exit_code,
        reason: status.reason.clone(),
        message,
        hash: annotation(CONTAINER_HASH).map(str::to_owned),
        restart_count: annotation(RESTART_COUNT).and_then(|count| count.parse().ok()).unwrap_or(0),
        termination_grace: annotation(POD_TERMINATION_GRACE).and_then(|grace| grace.parse().ok()),
        user: status.user.clone().and_then(|user| user.linux),
        resources: status.resources.clone().and_then(|resources| resources.linux),
        log_path: status.log_path.clone(),
        id: status.id,
    }
}

/// What the program left as its last words: the mounted file, or the end of its log when asked for.
async fn termination_message(status: &v1::ContainerStatus) -> String {
    let path = status.annotations.get(MESSAGE_PATH).map(String::as_str).unwrap_or_default();
    let fall_back = status.annotations.get(MESSAGE_POLICY).is_some_and(|policy| policy == "FallbackToLogsOnError")
        && status.exit_code != 0
        && status.reason != "ContainerCannotRun";
    let absolute = if path.is_empty() || path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let mount = status.mounts.iter().find(|mount| !path.is_empty() && mount.container_path == absolute);
    if let Some(mount) = mount {
        match read_end(&mount.host_path, MESSAGE_LIMIT).await {
            Ok(text) if text.is_empty() && fall_back => {}
            Ok(text) => return String::from_utf8_lossy(&text).into_owned(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return format!("Error on reading termination log {}: {error}", mount.host_path),
        }
    }
    if !fall_back {
        return String::new();
    }
    // The runtime tells of the end a moment before the last line is in the log.
    let mut pauses = LOG_SETTLE.iter();
    loop {
        let text = read_end(&status.log_path, LOG_LIMIT * 4).await.unwrap_or_default();
        let lines = last_log_lines(&String::from_utf8_lossy(&text));
        let fresh = jiff::Timestamp::now().as_nanosecond() - i128::from(status.finished_at) < 1_000_000_000;
        match pauses.next() {
            Some(pause) if lines.is_empty() && fresh => tokio::time::sleep(std::time::Duration::from_millis(*pause)).await,
            _ => return lines,
        }
    }
}

async fn read_end(path: &str, limit: u64) -> std::io::Result<Vec<u8>> {
    use tokio::io::{AsyncReadExt, AsyncSeekExt};
    let mut file = tokio::fs::File::open(path).await?;
    let length = file.metadata().await?.len();
    file.seek(std::io::SeekFrom::Start(length.saturating_sub(limit))).await?;
    let mut text = Vec::new();
    file.take(limit).read_to_end(&mut text).await?;
    Ok(text)
}

/// The payload of the last lines of a log in CRI's format (`time stream tag text`). Tag `P` marks a piece that no line end follows:
/// of a long line, or what the program wrote last.
fn last_log_lines(log: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in log.lines() {
        let mut parts = line.splitn(4, ' ');
        let (Some(_), Some("stdout" | "stderr"), Some(tag)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let end = if tag == "P" { "" } else { "\n" };
        lines.push(format!("{}{end}", parts.next().unwrap_or_default()));
    }
    let mut text = lines[lines.len().saturating_sub(LOG_LINES)..].concat();
    let limit = usize::try_from(LOG_LIMIT).unwrap_or(usize::MAX);
    let too_long = text.len().saturating_sub(limit);
    text.split_off(text.ceil_char_boundary(too_long))
}

/// Changes exactly when the container must be replaced: upstream looks at the name and the image, as all else is immutable.
pub fn hash(container: &Container) -> String {
    let mut hash: u32 = 0x811c_9dc5;
    for byte in container.name.bytes().chain([0]).chain(container.image.iter().flat_map(|image| image.bytes())) {
        hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    }
    format!("{hash:x}")
}

pub fn pod_labels(pod: &Pod) -> HashMap<String, String> {
    let mut labels: HashMap<String, String> = pod.metadata.labels.clone().unwrap_or_default().into_iter().collect();
    labels.insert(POD_NAME.into(), name_of(pod).into());
    labels.insert(POD_NAMESPACE.into(), namespace_of(pod).into());
    labels.insert(POD_UID.into(), uid_of(pod).into());
    labels
}

pub fn container_labels(pod: &Pod, container: &Container) -> HashMap<String, String> {
    [(POD_NAME, name_of(pod)), (POD_NAMESPACE, namespace_of(pod)), (POD_UID, uid_of(pod)), (CONTAINER_NAME, container.name.as_str())]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

pub fn container_annotations(pod: &Pod, container: &Container, restart_count: i32) -> HashMap<String, String> {
    let mut annotations: HashMap<String, String> = [
        (CONTAINER_HASH, hash(container)),
        (RESTART_COUNT, restart_count.to_string()),
        (MESSAGE_PATH, container.termination_message_path.clone().unwrap_or_default()),
        (MESSAGE_POLICY, container.termination_message_policy.clone().unwrap_or_default()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    if let Some(grace) = pod.metadata.deletion_grace_period_seconds {
        annotations.insert(POD_DELETION_GRACE.into(), grace.to_string());
    }
    if let Some(grace) = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds) {
        annotations.insert(POD_TERMINATION_GRACE.into(), grace.to_string());
    }
    annotations
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_ends_are_unwrapped() {
        let log = "2026-01-01T00:00:00Z stdout F one\n2026-01-01T00:00:00Z stderr P tw\n2026-01-01T00:00:00Z stderr F o\n";
        assert_eq!(last_log_lines(log), "one\ntwo\n");
        assert_eq!(last_log_lines("2026-01-01T00:00:00Z stdout P DONE\n"), "DONE", "written without a line end");
        assert_eq!(last_log_lines("2026-01-01T00:00:00Z stdout F \n"), "\n");
        let many: String = (0..100).map(|number| format!("2026-01-01T00:00:00Z stdout F {number}\n")).collect();
        assert!(last_log_lines(&many).starts_with("20\n") && last_log_lines(&many).ends_with("\n99\n"));
        let long = format!("2026-01-01T00:00:00Z stdout F é{}\n", "x".repeat(2046));
        assert_eq!(last_log_lines(&long), "x".repeat(2046) + "\n", "no half of a character");
    }

    #[test]
    fn the_hash_follows_name_and_image() {
        let container = |name: &str, image: &str| Container { name: name.into(), image: Some(image.into()), ..Container::default() };
        assert_eq!(hash(&container("a", "x")), hash(&container("a", "x")));
        assert_ne!(hash(&container("a", "x")), hash(&container("a", "y")));
    }

    #[test]
    fn a_sandbox_is_replaced_when_it_is_down_or_has_no_address() {
        let sandbox = |ready, ips: &[&str]| SandboxView {
            id: "s".into(),
            attempt: 3,
            ready,
            created_at: 0,
            host_network: false,
            ips: ips.iter().map(|ip| (*ip).to_owned()).collect(),
        };
        let changed = |sandboxes: Vec<SandboxView>| {
            let view = PodView { sandboxes, containers: Vec::new() };
            let (changed, attempt, _) = view.sandbox_changed(false);
            (changed, attempt)
        };
        assert_eq!(changed(vec![]), (true, 0));
        assert_eq!(changed(vec![sandbox(true, &["10.0.0.1"])]), (false, 3));
        assert_eq!(changed(vec![sandbox(false, &["10.0.0.1"])]), (true, 4));
        assert_eq!(changed(vec![sandbox(true, &[])]), (true, 4));
        assert_eq!(changed(vec![sandbox(true, &["1"]), sandbox(true, &["2"])]), (true, 4));
    }
}
