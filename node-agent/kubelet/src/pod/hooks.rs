//! Lifecycle hooks: postStart and preStop by exec, HTTP or sleep.
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod};

use crate::host::Host;
use crate::probe::http;

/// Runs one hook to its end; the error is for the waiting message and the log.
pub async fn run(
    host: &Host,
    pod: &Pod,
    container: &Container,
    container_id: &str,
    pod_ip: &str,
    hook: &LifecycleHandler,
) -> Result<(), String> {
    if let Some(exec) = &hook.exec {
        let command = exec.command.clone().unwrap_or_default();
        let output = host.cri.exec_sync(container_id, command.clone(), Duration::ZERO).await.map_err(|error| error.to_string())?;
        if output.exit_code == 0 {
            return Ok(());
        }
        let text = output.message();
        return Err(format!(
            "Exec lifecycle hook ({command:?}) for Container \"{}\" in Pod \"{}\" failed - error: command '{}' exited with {}: {text}, message: {text:?}",
            container.name,
            super::meta::full_name(pod),
            command.join(" "),
            output.exit_code
        ));
    }
    if let Some(get) = &hook.http_get {
        let target = http::Target::from_action(get, pod, container, pod_ip)?;
        // The answer's code doesn't matter to a hook, only that there is one.
        return http::get(&target, "kube-lifecycle/1.35", Duration::from_secs(60))
            .await
            .and_then(|answer| if answer.status >= 400 { Err(format!("HTTP hook answered {}", answer.status)) } else { Ok(()) });
    }
    if let Some(sleep) = &hook.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
        return Ok(());
    }
    Err(format!("Invalid handler: {hook:?}"))
}
