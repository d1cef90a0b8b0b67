//! One probe attempt: exec, HTTP, TCP or gRPC, with upstream's outputs.
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use tokio::net::TcpStream;

use super::http;
use crate::cri::Cri;

/// The generated client of the gRPC health protocol.
#[allow(rust_2018_idioms, clippy::enum_variant_names)]
mod health {
    tonic::include_proto!("grpc.health.v1");
}

const USER_AGENT: &str = "kube-probe/1.35";

/// What an attempt found. `Err` of [`attempt`] means that it couldn't be made, which says nothing about the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Success,
    Failure(String),
}

pub async fn attempt(
    cri: &Cri,
    pod: &Pod,
    container: &Container,
    container_id: &str,
    pod_ip: &str,
    probe: &Probe,
) -> Result<Outcome, String> {
    let limit = Duration::from_secs(u64::try_from(probe.timeout_seconds.unwrap_or(1)).unwrap_or(1).max(1));
    if let Some(exec) = &probe.exec {
        let command = exec.command.clone().unwrap_or_default();
        let command: Vec<String> = command.iter().map(|text| crate::pod::env::expand(text, &|name| literal(container, name))).collect();
        return run(cri, container_id, command, limit).await;
    }
    if let Some(action) = &probe.http_get {
        let target = http::Target::from_action(action, pod, container, pod_ip)?;
        return Ok(match http::get(&target, USER_AGENT, limit).await {
            Ok(answer) if (200..400).contains(&answer.status) => Outcome::Success,
            Ok(answer) => Outcome::Failure(format!("HTTP probe failed with statuscode: {}", answer.status)),
            Err(error) => Outcome::Failure(error),
        });
    }
    if let Some(action) = &probe.tcp_socket {
        let host = action.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(pod_ip);
        return Ok(dial(host, http::port_number(&action.port, container)?, limit).await);
    }
    if let Some(action) = &probe.grpc {
        let port = u16::try_from(action.port).map_err(|_| format!("invalid port number: {}", action.port))?;
        return Ok(grpc(pod_ip, port, action.service.clone().unwrap_or_default(), limit).await);
    }
    Err(format!("missing probe handler for {}:{}", crate::pod::meta::full_name(pod), container.name))
}

/// Commands of probes may use the container's literal variables.
fn literal(container: &Container, name: &str) -> Option<String> {
    container.env.iter().flatten().find(|variable| variable.name == name).and_then(|variable| variable.value.clone())
}

async fn run(cri: &Cri, container_id: &str, command: Vec<String>, limit: Duration) -> Result<Outcome, String> {
    let text = command.join(" ");
    match cri.exec_sync(container_id, command, limit).await {
        Ok(output) if output.exit_code == 0 => Ok(Outcome::Success),
        Ok(output) => Ok(Outcome::Failure(output.message())),
        Err(error) if error.code == tonic::Code::DeadlineExceeded => {
            Ok(Outcome::Failure(format!("command timed out: \"{text}\" timed out after {}s", limit.as_secs())))
        }
        Err(error) => Err(error.to_string()),
    }
}

async fn dial(host: &str, port: u16, limit: Duration) -> Outcome {
    let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    match tokio::time::timeout(limit, TcpStream::connect(&address)).await {
        Ok(Ok(_)) => Outcome::Success,
        Ok(Err(error)) => Outcome::Failure(http::dial_error(&address, &error)),
        Err(_) => Outcome::Failure(format!("dial tcp {address}: i/o timeout")),
    }
}

async fn grpc(host: &str, port: u16, service: String, limit: Duration) -> Outcome {
    let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let timed_out = || {
        Outcome::Failure(format!("timeout: failed to connect service \"{address}\" within {}s: context deadline exceeded", limit.as_secs()))
    };
    let ask = async {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).map_err(|error| error.to_string())?;
        let endpoint = endpoint.user_agent(USER_AGENT).map_err(|error| error.to_string())?;
        let channel = endpoint.connect().await.map_err(|error| format!("error: failed to connect to grpc server: {error}"))?;
        let mut client = health::health_client::HealthClient::new(channel);
        let answer = client.check(health::HealthCheckRequest { service }).await;
        answer.map(tonic::Response::into_inner).map_err(|status| match status.code() {
            tonic::Code::Unimplemented => {
                format!("error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}", status.message())
            }
            _ => format!("error: health rpc probe failed: {status}"),
        })
    };
    match tokio::time::timeout(limit, ask).await {
        Ok(Ok(answer)) if answer.status() == health::health_check_response::ServingStatus::Serving => Outcome::Success,
        Ok(Ok(answer)) => Outcome::Failure(format!("service unhealthy (responded with \"{}\")", answer.status().as_str_name())),
        Ok(Err(error)) => Outcome::Failure(error),
        Err(_) => timed_out(),
    }
}
