//! The Container Runtime Interface v1, spoken over the runtime's unix socket.
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

pub mod events;

/// The messages of `api.proto`, as generated.
#[allow(clippy::doc_lazy_continuation, clippy::doc_overindented_list_items, clippy::large_enum_variant, rust_2018_idioms)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

use v1::image_service_client::ImageServiceClient;
use v1::runtime_service_client::RuntimeServiceClient;

/// Ordinary calls end after this; those that wait for a program to end get its time on top.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// Lists of a full node are larger than gRPC's default of 4 MiB.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// A failed call: which one, and what the runtime said.
#[derive(Clone, Debug, thiserror::Error)]
#[error("rpc error: code = {code:?} desc = {message}")]
pub struct Error {
    pub call: &'static str,
    pub code: tonic::Code,
    pub message: String,
}

impl Error {
    pub fn is_not_found(&self) -> bool {
        self.code == tonic::Code::NotFound
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// What a program run by [`Cri::exec_sync`] left behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
}

impl ExecOutput {
    /// What fits into an event or a status of all that was written, as much as upstream takes of a probe's output.
    pub fn message(&self) -> String {
        const LIMIT: usize = 10 << 10;
        let mut written = [self.stdout.as_slice(), &self.stderr].concat();
        written.truncate(LIMIT);
        String::from_utf8_lossy(&written).into_owned()
    }
}

/// A handle on the runtime; cheap to clone, calls run at the same time over one connection.
#[derive(Clone, Debug)]
pub struct Cri {
    channel: Channel,
    socket: PathBuf,
}

impl Cri {
    /// `endpoint` is `unix:///path` or a plain path. The connection is made at the first call and again after each loss.
    pub fn connect(endpoint: &str) -> Self {
        let socket = PathBuf::from(endpoint.strip_prefix("unix://").unwrap_or(endpoint));
        let path = socket.clone();
        let connector = service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector);
        Self { channel, socket }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The generated client, for the calls that have no wrapper here (exec, attach, stats ...).
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub async fn version(&self) -> Result<v1::VersionResponse> {
        call("Version", CALL_TIMEOUT, self.runtime().version(v1::VersionRequest::default())).await
    }

    pub async fn status(&self) -> Result<v1::StatusResponse> {
        call("Status", CALL_TIMEOUT, self.runtime().status(v1::StatusRequest { verbose: false })).await
    }

    /// The image that every sandbox is made of, where the runtime tells: containerd before 2.0 doesn't call it pinned.
    pub async fn sandbox_image(&self) -> Option<String> {
        let request = v1::StatusRequest { verbose: true };
        let status = call("Status", CALL_TIMEOUT, self.runtime().status(request)).await.ok()?;
        let config: serde_json::Value = serde_json::from_str(status.info.get("config")?).ok()?;
        Some(config.get("sandboxImage")?.as_str()?.to_owned())
    }

    pub async fn run_sandbox(&self, config: v1::PodSandboxConfig, runtime_handler: String) -> Result<String> {
        let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler };
        // The network plugin may take its time.
        Ok(call("RunPodSandbox", CALL_TIMEOUT * 2, self.runtime().run_pod_sandbox(request)).await?.pod_sandbox_id)
    }

    pub async fn stop_sandbox(&self, id: &str) -> Result<()> {
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.into() };
        gone_is_fine(call("StopPodSandbox", CALL_TIMEOUT, self.runtime().stop_pod_sandbox(request)).await)
    }

    pub async fn remove_sandbox(&self, id: &str) -> Result<()> {
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.into() };
        gone_is_fine(call("RemovePodSandbox", CALL_TIMEOUT, self.runtime().remove_pod_sandbox(request)).await)
    }

    pub async fn sandbox_status(&self, id: &str, verbose: bool) -> Result<v1::PodSandboxStatusResponse> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose };
        call("PodSandboxStatus", CALL_TIMEOUT, self.runtime().pod_sandbox_status(request)).await
    }

    pub async fn list_sandboxes(&self, filter: v1::PodSandboxFilter) -> Result<Vec<v1::PodSandbox>> {
        let request = v1::ListPodSandboxRequest { filter: Some(filter) };
        Ok(call("ListPodSandbox", CALL_TIMEOUT, self.runtime().list_pod_sandbox(request)).await?.items)
    }

    pub async fn create_container(
        &self,
        sandbox: &str,
        config: v1::ContainerConfig,
        sandbox_config: v1::PodSandboxConfig,
    ) -> Result<String> {
        let request =
            v1::CreateContainerRequest { pod_sandbox_id: sandbox.into(), config: Some(config), sandbox_config: Some(sandbox_config) };
        Ok(call("CreateContainer", CALL_TIMEOUT, self.runtime().create_container(request)).await?.container_id)
    }

    pub async fn start_container(&self, id: &str) -> Result<()> {
        let request = v1::StartContainerRequest { container_id: id.into() };
        call("StartContainer", CALL_TIMEOUT, self.runtime().start_container(request)).await.map(drop)
    }

    /// Sends the stop signal, waits `grace` seconds, kills.
    pub async fn stop_container(&self, id: &str, grace: i64) -> Result<()> {
        let request = v1::StopContainerRequest { container_id: id.into(), timeout: grace };
        let time = CALL_TIMEOUT + Duration::from_secs(grace.max(0).unsigned_abs());
        gone_is_fine(call("StopContainer", time, self.runtime().stop_container(request)).await)
    }

    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let request = v1::RemoveContainerRequest { container_id: id.into() };
        gone_is_fine(call("RemoveContainer", CALL_TIMEOUT, self.runtime().remove_container(request)).await)
    }

    pub async fn list_containers(&self, filter: v1::ContainerFilter) -> Result<Vec<v1::Container>> {
        let request = v1::ListContainersRequest { filter: Some(filter) };
        Ok(call("ListContainers", CALL_TIMEOUT, self.runtime().list_containers(request)).await?.containers)
    }

    pub async fn container_status(&self, id: &str, verbose: bool) -> Result<v1::ContainerStatusResponse> {
        let request = v1::ContainerStatusRequest { container_id: id.into(), verbose };
        call("ContainerStatus", CALL_TIMEOUT, self.runtime().container_status(request)).await
    }

    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let request = v1::ReopenContainerLogRequest { container_id: id.into() };
        call("ReopenContainerLog", CALL_TIMEOUT, self.runtime().reopen_container_log(request)).await.map(drop)
    }

    pub async fn update_container(&self, id: &str, linux: v1::LinuxContainerResources) -> Result<()> {
        let request = v1::UpdateContainerResourcesRequest { container_id: id.into(), linux: Some(linux), ..Default::default() };
        call("UpdateContainerResources", CALL_TIMEOUT, self.runtime().update_container_resources(request)).await.map(drop)
    }

    /// Runs a program in the container; `timeout` zero means no limit of its own.
    pub async fn exec_sync(&self, id: &str, command: Vec<String>, timeout: Duration) -> Result<ExecOutput> {
        let seconds = i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX);
        let request = v1::ExecSyncRequest { container_id: id.into(), cmd: command, timeout: seconds };
        let limit = if timeout.is_zero() { Duration::from_secs(24 * 3600) } else { CALL_TIMEOUT + timeout };
        let answer = call("ExecSync", limit, self.runtime().exec_sync(request)).await?;
        Ok(ExecOutput { stdout: answer.stdout, stderr: answer.stderr, exit_code: answer.exit_code })
    }

    pub async fn list_images(&self) -> Result<Vec<v1::Image>> {
        Ok(call("ListImages", CALL_TIMEOUT, self.images().list_images(v1::ListImagesRequest::default())).await?.images)
    }

    pub async fn image_status(&self, image: v1::ImageSpec) -> Result<Option<v1::Image>> {
        let request = v1::ImageStatusRequest { image: Some(image), verbose: false };
        Ok(call("ImageStatus", CALL_TIMEOUT, self.images().image_status(request)).await?.image)
    }

    /// Returns the reference of the image that was pulled. No time limit: layers can be large; callers drop the future to give up.
    pub async fn pull_image(
        &self,
        image: v1::ImageSpec,
        auth: Option<v1::AuthConfig>,
        sandbox_config: Option<v1::PodSandboxConfig>,
    ) -> Result<String> {
        let request = v1::PullImageRequest { image: Some(image), auth, sandbox_config };
        Ok(call("PullImage", Duration::from_secs(24 * 3600), self.images().pull_image(request)).await?.image_ref)
    }

    pub async fn remove_image(&self, image: v1::ImageSpec) -> Result<()> {
        let request = v1::RemoveImageRequest { image: Some(image) };
        gone_is_fine(call("RemoveImage", CALL_TIMEOUT, self.images().remove_image(request)).await.map(drop))
    }

    pub async fn image_fs_info(&self) -> Result<v1::ImageFsInfoResponse> {
        call("ImageFsInfo", CALL_TIMEOUT, self.images().image_fs_info(v1::ImageFsInfoRequest {})).await
    }
}

/// Awaits one call with a limit and names it in the error.
async fn call<T, F>(name: &'static str, limit: Duration, future: F) -> Result<T>
where
    F: Future<Output = std::result::Result<tonic::Response<T>, tonic::Status>>,
{
    match tokio::time::timeout(limit, future).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(Error { call: name, code: status.code(), message: status.message().to_owned() }),
        Err(_) => Err(Error { call: name, code: tonic::Code::DeadlineExceeded, message: "context deadline exceeded".into() }),
    }
}

/// Taking away what isn't there has the wanted outcome.
fn gone_is_fine<T>(result: Result<T>) -> Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_an_end() {
        let said = |stdout: &str, stderr: &str| ExecOutput { stdout: stdout.into(), stderr: stderr.into(), exit_code: 1 }.message();
        assert_eq!(said("out\n", "err\n"), "out\nerr\n");
        let (almost, long) = ("x".repeat(10 * 1024 - 1), "y".repeat(10 * 1024));
        assert_eq!(said(&almost, &long), format!("{almost}y"));
        assert_eq!(said(&long, &almost), long);
    }
}
