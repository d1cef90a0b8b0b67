//! From a request's path to its handler.
use std::sync::Arc;

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use outrigger_cluster::access::User;

use super::{Body, Context, answer, configz, exec, files, forward, json, logs, metrics, summary, text};

/// A query's parameters in their order.
pub struct Query(Vec<(String, String)>);

impl Query {
    pub fn of(uri: &http::Uri) -> Self {
        Self(form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).into_owned().collect())
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    pub fn all(&self, name: &str) -> Vec<String> {
        self.0.iter().filter(|(found, _)| found == name).map(|(_, value)| value.clone()).collect()
    }

    /// Upstream's streaming parameters are `1` or absent; its log parameters are `true` or `false`.
    pub fn is_set(&self, name: &str) -> bool {
        matches!(self.get(name), Some("1" | "true"))
    }
}

/// The container that a path names.
pub struct Target<'a> {
    pub namespace: &'a str,
    pub pod: &'a str,
    pub uid: Option<&'a str>,
    pub container: &'a str,
}

pub async fn handle(context: &Arc<Context>, peer: Option<User>, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    if let Err(refusal) = context.gate.admit(peer, request.method(), &path, request.headers()).await {
        return text(refusal.0, refusal.1);
    }
    let segments: Vec<&str> = path.trim_start_matches('/').trim_end_matches('/').split('/').collect();
    let get = request.method() == Method::GET || request.method() == Method::HEAD;
    let streams = get || request.method() == Method::POST;
    match segments.as_slice() {
        ["healthz", check @ ..] if get => healthz(context, check),
        ["pods"] if get => pods(context),
        ["runningpods"] if get => match summary::running_pods(context).await {
            Ok(list) => json(&list),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        },
        ["configz"] if get => json(&serde_json::json!({"kubeletconfig": configz::configz(context.kubelet.config())})),
        ["stats", "summary"] if get => match summary::summary(context, Query::of(request.uri()).is_set("only_cpu_and_memory")).await {
            Ok(summary) => json(&summary),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        },
        ["metrics", kind @ ..] if get => metrics::serve(context, kind).await,
        ["containerLogs", namespace, pod, container] if get => {
            let target = Target { namespace, pod, uid: None, container };
            logs::serve(context, &target, &Query::of(request.uri())).await
        }
        [verb @ ("exec" | "attach" | "run"), namespace, pod, rest @ ..] if streams => {
            let target = match rest {
                [container] => Target { namespace, pod, uid: None, container },
                [uid, container] => Target { namespace, pod, uid: Some(uid), container },
                _ => return text(StatusCode::NOT_FOUND, "404: Page Not Found"),
            };
            match *verb {
                "run" => exec::run(context, &target, &Query::of(request.uri())).await,
                "exec" => exec::stream(context, &target, exec::Kind::Exec, request).await,
                _ => exec::stream(context, &target, exec::Kind::Attach, request).await,
            }
        }
        ["portForward", namespace, pod, rest @ ..] if streams && rest.len() < 2 => {
            forward::serve(context, namespace, pod, rest.first().copied(), request).await
        }
        ["logs", rest @ ..] if get => files::serve(&context.config.log_dir, rest, path.ends_with('/')).await,
        [
            "healthz" | "pods" | "runningpods" | "configz" | "stats" | "metrics" | "containerLogs" | "exec" | "attach" | "run"
            | "portForward",
            ..,
        ] if !streams => text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed"),
        _ => text(StatusCode::NOT_FOUND, "404 page not found\n"),
    }
}

fn healthz(context: &Context, check: &[&str]) -> Response<Body> {
    let mut response = match check {
        [] | ["syncloop" | "ping" | "log"] if context.kubelet.is_running() => text(StatusCode::OK, "ok"),
        ["ping" | "log"] => text(StatusCode::OK, "ok"),
        [] | ["syncloop"] => {
            text(StatusCode::INTERNAL_SERVER_ERROR, "[+]ping ok\n[+]log ok\n[-]syncloop failed: reason withheld\nhealthz check failed\n")
        }
        _ => text(StatusCode::NOT_FOUND, "404 page not found\n"),
    };
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn pods(context: &Context) -> Response<Body> {
    let pods = context.kubelet.pods();
    #[derive(serde::Serialize)]
    #[serde(rename_all = "camelCase")]
    struct List<'a> {
        kind: &'static str,
        api_version: &'static str,
        metadata: serde_json::Value,
        items: &'a [k8s_openapi::api::core::v1::Pod],
    }
    let list = List { kind: "PodList", api_version: "v1", metadata: serde_json::json!({}), items: &pods };
    match serde_json::to_vec(&list) {
        Ok(content) => answer(StatusCode::OK, "application/json", content),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}
