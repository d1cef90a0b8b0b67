//! The answering side: HTTP over a socket that only root may open.
use std::convert::Infallible;
use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use outrigger_cluster::Key;
use outrigger_cluster::watch::Watch;
use outrigger_dataplane::{ProxyHandle, View};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::broadcast::error::RecvError;

use super::sight;
use crate::policy::Policing;
use crate::roles::Health;

#[derive(Clone)]
pub struct Sources {
    pub parts: Health,
    pub proxy: Option<ProxyHandle>,
    pub policing: Option<Policing>,
    pub watch: Watch,
}

/// Why a question has no answer.
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, self.1).into_response()
    }
}

type Answer<T = Json<Value>> = std::result::Result<T, Refusal>;

fn bad(message: impl ToString) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, message.to_string())
}

impl Sources {
    fn proxy(&self) -> Answer<&ProxyHandle> {
        self.proxy.as_ref().ok_or_else(|| Refusal(StatusCode::NOT_FOUND, "this agent runs no Service proxy".into()))
    }

    async fn ask<T: Send + 'static>(&self, question: impl FnOnce(&View<'_>) -> T + Send + 'static) -> Answer<T> {
        let stopped = || Refusal(StatusCode::SERVICE_UNAVAILABLE, "the Service proxy has stopped".into());
        self.proxy()?.ask(question).await.ok_or_else(stopped)
    }
}

pub fn serve(path: &Path, sources: Sources) -> Result<()> {
    let failed = || format!("listen on {}", path.display());
    // A former agent's socket; two agents don't share a data directory.
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(failed)?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).with_context(failed)?;
    let router = Router::new()
        .route("/status", get(status))
        .route("/mode", post(mode))
        .route("/attachments", post(attachments))
        .route("/services", get(services))
        .route("/trace", get(trace))
        .route("/monitor", get(monitor))
        .with_state(sources);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(())
}

/// Each part's own reading of its health.
async fn status(State(sources): State<Sources>) -> Json<Value> {
    let parts: serde_json::Map<String, Value> = sources
        .parts
        .read()
        .into_iter()
        .map(|(role, reading)| (role.name().to_owned(), json!({"healthy": reading.is_ok(), "message": reading.err()})))
        .collect();
    let proxy = sources.proxy.as_ref().map(|proxy| {
        let choice = proxy.choice();
        json!({"mode": choice.mode.to_string(), "reason": choice.reason})
    });
    let policies = sources.policing.as_ref().map(|policing| json!({"enforced": policing.off().is_none(), "reason": policing.off()}));
    Json(json!({"parts": parts, "proxy": proxy, "networkPolicies": policies}))
}

#[derive(Deserialize)]
struct Attachments {
    /// The one that waits to be let in.
    admit: Option<String>,
}

/// The CNI plugin's word that it has attached a pod, or let go of one.
async fn attachments(State(sources): State<Sources>, Query(Attachments { admit }): Query<Attachments>) -> Answer {
    let nobody = || Refusal(StatusCode::NOT_FOUND, "this agent gives pods no network".into());
    let policing = sources.policing.as_ref().ok_or_else(nobody)?;
    match admit {
        Some(key) => policing.admit(key).await.map_err(|reason| Refusal(StatusCode::SERVICE_UNAVAILABLE, reason))?,
        None => policing.attachments_changed(),
    }
    Ok(Json(Value::Null))
}

#[derive(Deserialize)]
struct Mode {
    to: String,
}

/// Switches while traffic flows.
async fn mode(State(sources): State<Sources>, Query(Mode { to }): Query<Mode>) -> Answer {
    let choice = sources.proxy()?.set_mode(to.parse().map_err(bad)?).await;
    let choice = choice.map_err(|error| Refusal(StatusCode::CONFLICT, error.to_string()))?;
    Ok(Json(json!({"mode": choice.mode.to_string(), "reason": choice.reason})))
}

#[derive(Deserialize)]
struct Filter {
    /// `namespace/name`, or the beginning of it.
    #[serde(default)]
    service: String,
}

async fn services(State(sources): State<Sources>, Query(Filter { service }): Query<Filter>) -> Answer {
    sources.ask(move |view| Json(sight::services(view, &service))).await
}

#[derive(Deserialize)]
struct Trace {
    /// A pod on this node (`namespace/name`), or an address, maybe with a port.
    from: String,
    /// `IP:PORT`
    to: String,
    protocol: Option<String>,
}

async fn trace(State(sources): State<Sources>, Query(question): Query<Trace>) -> Answer {
    let (source, port, is_pod) = match (question.from.parse::<SocketAddr>(), question.from.parse()) {
        (Ok(client), _) => (client.ip(), Some(client.port()), false),
        (_, Ok(ip)) => (ip, None, false),
        _ => (pod_ip(&sources.watch, &question.from)?, None, true),
    };
    let destination = question.to.parse().map_err(|_| bad(format!("{:?} is no IP:PORT", question.to)))?;
    let protocol = outrigger_desired::Protocol::parse(question.protocol.as_deref().map(str::to_uppercase).as_deref());
    let protocol = protocol.ok_or_else(|| bad("the protocol is one of TCP, UDP, SCTP"))?;
    let flow = outrigger_desired::trace::Flow { source, destination, protocol };
    sources.ask(move |view| Json(sight::trace(view, &flow, port, is_pod))).await
}

fn pod_ip(watch: &Watch, name: &str) -> Answer<std::net::IpAddr> {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    let pod = watch.pods.get(&Key::new(namespace, name));
    let ip = pod.as_ref().and_then(|pod| pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok());
    ip.ok_or_else(|| Refusal(StatusCode::NOT_FOUND, format!("no pod {namespace}/{name} with an address is known here: give its address")))
}

/// One JSON object per line, for as long as somebody reads: first what lives, then what happens.
async fn monitor(State(sources): State<Sources>) -> Answer<Response> {
    let events = sources.proxy()?.watch();
    let named = pods(&sources.watch);
    let live = sources.ask(move |view| sight::live(view, &named)).await?;
    let first = match live {
        Ok(live) => live.iter().fold(String::new(), |text, event| text + &event.to_string() + "\n"),
        Err(error) => trouble(&error.to_string()),
    };
    let rest = futures::stream::unfold((sources, events), |(sources, mut events)| async move {
        let line = match events.recv().await {
            Ok(event) => sight::event(&event, &pods(&sources.watch)).to_string() + "\n",
            Err(RecvError::Lagged(missed)) => trouble(&format!("{missed} events came too fast")),
            Err(RecvError::Closed) => return None,
        };
        Some((line, (sources, events)))
    });
    let lines = futures::stream::once(std::future::ready(first)).chain(rest).map(Ok::<_, Infallible>);
    Ok(Body::from_stream(lines).into_response())
}

fn trouble(message: &str) -> String {
    json!({"event": "error", "message": message}).to_string() + "\n"
}

/// By the addresses that are their own.
fn pods(watch: &Watch) -> sight::Pods {
    let named = |pod: Arc<Pod>| {
        let own = pod.spec.as_ref().is_some_and(|spec| spec.host_network != Some(true));
        let name = Key::of_meta(&pod.metadata).to_string();
        let addresses = pod.status.as_ref().filter(|_| own)?.pod_ips.iter().flatten();
        Some(addresses.filter_map(|address| Some((address.ip.parse().ok()?, name.clone()))).collect::<Vec<_>>())
    };
    watch.pods.list().into_iter().filter_map(named).flatten().collect()
}
