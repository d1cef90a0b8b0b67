//! `/containerLogs`: which container's log, from where on, and how it reaches the client.
use std::sync::Arc;

use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ContainerStatus;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tracing::debug;

use super::log_file::{self, Options};
use super::route::{Query, Target};
use super::{Body, Context, body, containers, text};
use crate::cri::{Cri, v1};

pub async fn serve(context: &Arc<Context>, target: &Target<'_>, query: &Query) -> Response<Body> {
    let options = match options(query, Timestamp::now()) {
        Ok(options) => options,
        Err((status, message)) => return text(status, message),
    };
    let Some(pod) = context.kubelet.pod(target.namespace, target.pod) else {
        return text(StatusCode::NOT_FOUND, format!("pod {:?} does not exist", target.pod));
    };
    if !containers::is_in_spec(&pod, target.container) {
        return text(StatusCode::NOT_FOUND, format!("container {:?} not found in pod {:?}", target.container, target.pod));
    }
    let status = pod.status.as_ref().and_then(|status| containers::status_of(status, target.container));
    let id = match container_id(status, target, query.is_set("previous")) {
        Ok(id) => id,
        Err(message) => return text(StatusCode::BAD_REQUEST, message),
    };
    let runtime_id = id.split_once("://").map_or(id.as_str(), |(_, id)| id).to_owned();
    // From here on the answer has begun, as upstream's has: a failure is part of the text.
    let mut response = match context.cri.container_status(&runtime_id, false).await {
        Ok(answer) => stream(context, runtime_id, answer.status.map(|status| status.log_path).unwrap_or_default(), options),
        Err(error) => {
            debug!(container = runtime_id, %error, "no log");
            Response::new(body(format!("unable to retrieve container logs for {id}")))
        }
    };
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain"));
    response
}

fn stream(context: &Arc<Context>, container_id: String, path: String, options: Options) -> Response<Body> {
    let (sender, receiver) = mpsc::channel::<Bytes>(8);
    let context = context.clone();
    tokio::spawn(async move {
        let is_running = || is_running(context.cri.clone(), container_id.clone());
        if let Err(error) = log_file::copy(path.as_ref(), &options, is_running, sender.clone()).await {
            // The client may be gone already.
            let _ = sender.send(Bytes::from(format!("{error}\n"))).await;
        }
    });
    let frames = ReceiverStream::new(receiver).map(|piece| Ok(Frame::data(piece)));
    Response::new(StreamBody::new(frames).boxed_unsync())
}

async fn is_running(cri: Cri, container_id: String) -> bool {
    match cri.container_status(&container_id, false).await {
        Ok(answer) => answer.status.is_some_and(|status| status.state == v1::ContainerState::ContainerRunning as i32),
        // A runtime that is away for a moment doesn't stop its containers.
        Err(error) => error.code == tonic::Code::Unavailable,
    }
}

/// The container whose log is meant, or upstream's words for why there is none.
fn container_id(status: Option<&ContainerStatus>, target: &Target<'_>, previous: bool) -> Result<String, String> {
    let (container, pod) = (target.container, target.pod);
    let Some(status) = status else { return Err(format!("container {container:?} in pod {pod:?} is not available")) };
    let id = |id: &Option<String>| id.clone().filter(|id| !id.is_empty());
    let last = status.last_state.as_ref().and_then(|state| state.terminated.as_ref());
    let last_id = last.and_then(|last| id(&last.container_id));
    if previous {
        return last_id.ok_or_else(|| format!("previous terminated container {container:?} in pod {pod:?} not found"));
    }
    let terminated = || format!("container {container:?} in pod {pod:?} is terminated");
    let state = status.state.as_ref();
    if state.is_some_and(|state| state.running.is_some()) {
        return id(&status.container_id).ok_or_else(terminated);
    }
    if let Some(state) = state.and_then(|state| state.terminated.as_ref()) {
        return id(&state.container_id).or(last_id).ok_or_else(terminated);
    }
    if last.is_some() {
        return last_id.ok_or_else(terminated);
    }
    let reason = match state.and_then(|state| state.waiting.as_ref()) {
        None => return Err(format!("container {container:?} in pod {pod:?} is waiting to start - no logs yet")),
        Some(waiting) => match waiting.reason.as_deref().unwrap_or_default() {
            "ErrImagePull" => "image can't be pulled".to_owned(),
            "ImagePullBackOff" => "trying and failing to pull image".to_owned(),
            reason => reason.to_owned(),
        },
    };
    Err(format!("container {container:?} in pod {pod:?} is waiting to start: {reason}"))
}

/// PodLogOptions from the query; errors are upstream's, in its odd JSON.
fn options(query: &Query, now: Timestamp) -> Result<Options, (StatusCode, String)> {
    let undecodable = || (StatusCode::BAD_REQUEST, r#"{"message": "Unable to decode query."}"#.to_owned());
    let invalid = || (StatusCode::UNPROCESSABLE_ENTITY, r#"{"message": "Invalid request."}"#.to_owned());
    let number = |name: &str| -> Result<Option<i64>, (StatusCode, String)> {
        query.get(name).filter(|text| !text.is_empty()).map(|text| text.parse().map_err(|_| undecodable())).transpose()
    };
    let tail = match query.get("tail") {
        Some("all") => None,
        Some(text) if !text.is_empty() => Some(text.parse().map_err(|_| undecodable())?),
        _ => number("tailLines")?,
    };
    let (limit, since_seconds) = (number("limitBytes")?, number("sinceSeconds")?);
    let since_time: Option<Timestamp> =
        query.get("sinceTime").filter(|text| !text.is_empty()).map(|text| text.parse().map_err(|_| undecodable())).transpose()?;
    let out_of_range =
        tail.is_some_and(|tail| tail < 0) || limit.is_some_and(|limit| limit < 1) || since_seconds.is_some_and(|seconds| seconds < 1);
    if out_of_range || (since_seconds.is_some() && since_time.is_some()) {
        return Err(invalid());
    }
    let (stdout, stderr) = match query.get("stream") {
        None | Some("" | "All") => (true, true),
        // Tail counts lines of the file, which mixes both streams.
        Some("Stdout" | "Stderr") if tail.is_some() => return Err(invalid()),
        Some("Stdout") => (true, false),
        Some("Stderr") => (false, true),
        Some(_) => return Err(invalid()),
    };
    let since = since_seconds.and_then(|seconds| now.checked_sub(SignedDuration::from_secs(seconds)).ok());
    Ok(Options {
        tail: tail.and_then(|tail| u64::try_from(tail).ok()),
        limit: limit.and_then(|limit| u64::try_from(limit).ok()),
        since: since.or(since_time),
        follow: query.is_set("follow"),
        timestamps: query.is_set("timestamps"),
        stdout,
        stderr,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_why_there_is_no_log() {
        let target = Target { namespace: "n", pod: "p", uid: None, container: "c" };
        let running = serde_json::json!({"running": {}});
        let ended = |id: &str| serde_json::json!({"terminated": {"exitCode": 0, "containerID": id}});
        let waiting = |reason: &str| serde_json::json!({"waiting": {"reason": reason}});
        let none = serde_json::json!({});
        let cases = [
            (running.clone(), none.clone(), false, Ok("containerd://1")),
            (running.clone(), none.clone(), true, Err(r#"previous terminated container "c" in pod "p" not found"#)),
            (running, ended("containerd://0"), true, Ok("containerd://0")),
            (ended("containerd://1"), none.clone(), false, Ok("containerd://1")),
            (ended(""), none.clone(), false, Err(r#"container "c" in pod "p" is terminated"#)),
            (ended(""), ended("containerd://0"), false, Ok("containerd://0")),
            (waiting("CrashLoopBackOff"), ended("containerd://0"), false, Ok("containerd://0")),
            (waiting("ContainerCreating"), none.clone(), false, Err(r#"container "c" in pod "p" is waiting to start: ContainerCreating"#)),
            (
                waiting("ImagePullBackOff"),
                none.clone(),
                false,
                Err(r#"container "c" in pod "p" is waiting to start: trying and failing to pull image"#),
            ),
            (none.clone(), none, false, Err(r#"container "c" in pod "p" is waiting to start - no logs yet"#)),
        ];
        for (state, last, previous, expected) in cases {
            let status = serde_json::json!({
                "name": "c", "image": "i", "imageID": "i", "ready": true, "restartCount": 0, "containerID": "containerd://1", "state": state, "lastState": last
            });
            let status: ContainerStatus = serde_json::from_value(status).unwrap();
            let found = container_id(Some(&status), &target, previous);
            assert_eq!(found.as_deref().map_err(String::as_str), expected);
        }
        assert_eq!(container_id(None, &target, false).unwrap_err(), r#"container "c" in pod "p" is not available"#);
    }

    #[test]
    fn options_are_checked() {
        let parse = |query: &str| {
            let uri: http::Uri = format!("/x?{query}").parse().unwrap();
            options(&Query::of(&uri), "2026-01-01T00:01:00Z".parse().unwrap()).map_err(|(status, _)| status.as_u16())
        };
        let all = Options { tail: None, limit: None, since: None, follow: false, timestamps: false, stdout: true, stderr: true };
        let cases = [
            ("", Ok(all.clone())),
            (
                "follow=true&timestamps=true&tailLines=5&limitBytes=10",
                Ok(Options { follow: true, timestamps: true, tail: Some(5), limit: Some(10), ..all.clone() }),
            ),
            ("tail=all&tailLines=3", Ok(all.clone())),
            ("sinceSeconds=60", Ok(Options { since: Some("2026-01-01T00:00:00Z".parse().unwrap()), ..all.clone() })),
            ("stream=Stderr", Ok(Options { stdout: false, ..all })),
            ("tailLines=x", Err(400)),
            ("sinceTime=x", Err(400)),
            ("tailLines=-1", Err(422)),
            ("limitBytes=0", Err(422)),
            ("sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z", Err(422)),
            ("stream=Stdout&tailLines=1", Err(422)),
            ("stream=both", Err(422)),
        ];
        for (query, expected) in cases {
            assert_eq!(parse(query), expected, "{query}");
        }
    }
}
