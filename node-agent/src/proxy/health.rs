//! `/healthz` and `/livez` as kube-proxy answers them: load balancers ask the first whether this node takes traffic, the kubelet
//! asks the second whether the proxy works.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use axum::{Router, extract::State};
use k8s_openapi::api::core::v1::Node;
use outrigger_cluster::{Key, Mirror};
use outrigger_dataplane::metrics::Exposition;
use outrigger_dataplane::{Health, ProxyHandle};
use serde::Serialize;

/// The cluster autoscaler's mark on a node that is about to go.
const LEAVING_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

#[derive(Clone)]
pub struct Checks(Arc<Inner>);

struct Inner {
    proxy: ProxyHandle,
    nodes: Mirror<Node>,
    node: Key,
    answered: [[AtomicU64; 2]; 2],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    status: std::collections::BTreeMap<&'static str, FamilyStatus>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyStatus {
    last_updated: String,
    healthy: bool,
}

impl Checks {
    pub fn new(proxy: ProxyHandle, nodes: Mirror<Node>, node_name: &str) -> Self {
        Self(Arc::new(Inner { proxy, nodes, node: Key::new("", node_name), answered: Default::default() }))
    }

    /// Whether the kernel keeps up with what is watched.
    pub fn is_healthy(&self) -> bool {
        self.0.proxy.health().is_healthy(SystemTime::now())
    }

    pub fn router(&self) -> Router {
        Router::new().route("/healthz", any(healthz)).route("/livez", any(livez)).with_state(self.clone())
    }

    /// How often each was asked, by answer.
    pub fn render(&self, out: &mut Exposition) {
        for (name, counts) in ["healthz", "livez"].iter().zip(&self.0.answered) {
            let samples = ["200", "503"].iter().zip(counts).filter(|(_, count)| count.load(Ordering::Relaxed) != 0);
            let samples: Vec<_> = samples.map(|(code, count)| (format!("code=\"{code}\""), count.load(Ordering::Relaxed))).collect();
            let help = format!("[ALPHA] Cumulative proxy {name} HTTP status");
            out.family(&format!("kubeproxy_proxy_{name}_total"), "counter", &help, samples);
        }
    }
}

async fn healthz(State(checks): State<Checks>) -> Response {
    let node = checks.0.nodes.get(&checks.0.node);
    checks.0.answer(0, Some(node.is_some_and(|node| is_eligible(&node))))
}

async fn livez(State(checks): State<Checks>) -> Response {
    checks.0.answer(1, None)
}

impl Inner {
    fn answer(&self, which: usize, eligible: Option<bool>) -> Response {
        let (good, body) = body(&self.proxy.health(), SystemTime::now(), eligible);
        self.answered[which][usize::from(!good)].fetch_add(1, Ordering::Relaxed);
        let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let no_sniff = (HeaderName::from_static("x-content-type-options"), "nosniff");
        match serde_json::to_string(&body) {
            Ok(text) => (status, [(header::CONTENT_TYPE, "application/json"), no_sniff], text).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    }
}

fn is_eligible(node: &Node) -> bool {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    node.metadata.deletion_timestamp.is_none() && !taints.iter().any(|taint| taint.key == LEAVING_TAINT)
}

fn body(health: &Health, now: SystemTime, eligible: Option<bool>) -> (bool, Body) {
    let healthy = health.is_healthy(now);
    let good = healthy && eligible != Some(false);
    let family = |time| FamilyStatus { last_updated: text(time), healthy };
    let status = health.updated.into_iter().flat_map(|time| [("IPv4", family(time)), ("IPv6", family(time))]).collect();
    // A good answer is of now, as it was when the kernel was written to all the time.
    let last_updated = if good { text(now) } else { health.updated.map_or_else(|| "0001-01-01T00:00:00Z".into(), text) };
    (good, Body { last_updated, current_time: text(now), node_eligible: eligible, healthy, status })
}

fn text(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map(|time| time.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{NodeSpec, Taint};

    use super::*;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn told(health: &Health, eligible: Option<bool>) -> (bool, String) {
        let (good, body) = body(health, at(100), eligible);
        (good, serde_json::to_string(&body).unwrap())
    }

    #[test]
    fn a_proxy_that_keeps_up_is_healthy() {
        let health = Health { synced: true, updated: Some(at(50)), ..Health::default() };
        let families =
            r#""IPv4":{"lastUpdated":"1970-01-01T00:00:50Z","healthy":true},"IPv6":{"lastUpdated":"1970-01-01T00:00:50Z","healthy":true}"#;
        let expected = format!(
            r#"{{"lastUpdated":"1970-01-01T00:01:40Z","currentTime":"1970-01-01T00:01:40Z","nodeEligible":true,"healthy":true,"status":{{{families}}}}}"#
        );
        assert_eq!(told(&health, Some(true)), (true, expected));
        let (good, text) = told(&health, None);
        assert!(good && !text.contains("nodeEligible"), "{text}");
    }

    #[test]
    fn a_change_that_waits_too_long_is_an_illness_and_a_leaving_node_is_not() {
        let behind = Health { updated: Some(at(30)), pending_since: Some(at(40)), ..Health::default() };
        let (good, text) = told(&behind, None);
        assert!(!good && text.starts_with(r#"{"lastUpdated":"1970-01-01T00:00:30Z""#) && text.contains(r#""healthy":false"#), "{text}");
        assert!(told(&Health { pending_since: Some(at(41)), ..behind.clone() }, None).0);
        assert!(told(&Health { updated: None, ..behind }, None).0, "a proxy that starts is not ill");
        let (good, text) = told(&Health { updated: Some(at(30)), ..Health::default() }, Some(false));
        assert!(!good && text.contains(r#""nodeEligible":false,"healthy":true"#), "{text}");
    }

    #[test]
    fn a_node_that_goes_takes_no_traffic() {
        let taint = |key: &str| Taint { key: key.into(), effect: "NoSchedule".into(), ..Taint::default() };
        let node = |key: &str| Node { spec: Some(NodeSpec { taints: Some(vec![taint(key)]), ..NodeSpec::default() }), ..Node::default() };
        assert!(is_eligible(&node("other")));
        assert!(!is_eligible(&node(LEAVING_TAINT)));
    }
}
