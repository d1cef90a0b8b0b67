//! The proxy's two ports: health for load balancers and kubelets, metrics and configuration for operators.
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use outrigger_dataplane::ProxyHandle;
use outrigger_dataplane::metrics::Exposition;
use tokio::net::TcpListener;
use tracing::{info, warn};

use super::health::Checks;
use super::settings::Settings;

const RETRY: Duration = Duration::from_secs(5);
/// A scrape doesn't wait longer for a proxy that is busy with the kernel.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone)]
pub struct Sources {
    pub proxy: ProxyHandle,
    pub checks: Checks,
    pub settings: Arc<Settings>,
    pub node_name: Arc<str>,
}

/// Serves both; with `hard_fail` an address that can't be had is an error, else it is tried again for ever.
pub async fn start(sources: Sources) -> Result<()> {
    let settings = sources.settings.clone();
    serve("health", settings.healthz, settings.hard_fail, sources.checks.router()).await?;
    serve("metrics", settings.metrics, settings.hard_fail, router(sources)).await
}

async fn serve(what: &'static str, address: Option<SocketAddr>, hard_fail: bool, router: Router) -> Result<()> {
    let Some(address) = address else { return Ok(()) };
    let first = TcpListener::bind(address).await.with_context(|| format!("serve {what} at {address}"));
    let first = if hard_fail { Ok(first?) } else { first };
    tokio::spawn(async move {
        let mut next = first;
        loop {
            match next {
                Ok(listener) => {
                    info!(%address, "{what} served");
                    // It ends only with the listener.
                    let _ = axum::serve(listener, router.clone()).await;
                }
                Err(error) => warn!(error = format!("{error:#}"), "trying again"),
            }
            tokio::time::sleep(RETRY).await;
            next = TcpListener::bind(address).await.with_context(|| format!("serve {what} at {address}"));
        }
    });
    Ok(())
}

fn router(sources: Sources) -> Router {
    let plain = |text: String| ([(header::CONTENT_TYPE, "text/plain; charset=utf-8"), no_sniff()], text);
    Router::new()
        .route("/healthz", get(move || async move { plain("ok".into()) }))
        .route("/proxyMode", get(move |State(sources): State<Sources>| async move { plain(sources.proxy.mode().to_string()) }))
        .route(
            "/configz",
            get(|State(sources): State<Sources>| async move { Json(sources.settings.configz(&sources.node_name, sources.proxy.mode())) }),
        )
        .route("/metrics", get(metrics))
        .with_state(sources)
}

fn no_sniff() -> (HeaderName, &'static str) {
    (HeaderName::from_static("x-content-type-options"), "nosniff")
}

async fn metrics(State(sources): State<Sources>) -> Response {
    let metrics = sources.proxy.metrics();
    let ask = sources.proxy.ask(move |view| {
        let mut out = Exposition::default();
        metrics.render(view.table, view.backend.mode(), &mut out);
        match view.backend.counted(view.table) {
            Ok(counts) => counts.render(&mut out),
            Err(error) => warn!(%error, "metrics lack what was counted of the traffic"),
        }
        out
    });
    match tokio::time::timeout(PATIENCE, ask).await {
        Ok(Some(mut out)) => {
            sources.checks.render(&mut out);
            ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], out.0).into_response()
        }
        _ => (StatusCode::SERVICE_UNAVAILABLE, "the proxy is busy with the kernel").into_response(),
    }
}
