//! log, exec, attach and portforward of pods: checked here, answered by the kubelet of the pod's node.

use outrigger_api::resource::api_version;
use outrigger_api::{Status, meta};
use serde_json::{Value, json};

use crate::admission::{Attributes, Operation, lookup};
use crate::body::{self, Request, Response};
use crate::call::Call;
use crate::engine::Engine;
use crate::proxy::forward::{forward, kubelet};
use crate::proxy::websocket;
use crate::reply::{self, Reply};
use crate::request::encode;

async fn pod_of(engine: &Engine, call: &Call) -> Result<Value, Status> {
    engine.fresh().await?;
    let name = &call.info.name;
    lookup(engine, "", "pods", call.namespace(), name).ok_or_else(|| call.not_found(name))
}

fn names<'a>(pod: &'a Value, list: &str) -> Vec<&'a str> {
    meta::items(pod, &format!("spec.{list}")).iter().filter_map(|c| c["name"].as_str()).collect()
}

/// The asked container, or the only one.
fn container<'a>(pod: &'a Value, asked: &'a str) -> Result<&'a str, Status> {
    let (main, init, ephemeral) = (names(pod, "containers"), names(pod, "initContainers"), names(pod, "ephemeralContainers"));
    let pod_name = meta::name(pod);
    if !asked.is_empty() {
        if [&main, &init, &ephemeral].iter().any(|list| list.contains(&asked)) {
            return Ok(asked);
        }
        return Err(Status::bad_request(format!("container {asked} is not valid for pod {pod_name}")));
    }
    if let [only] = main.as_slice()
        && init.is_empty()
        && ephemeral.is_empty()
    {
        return Ok(only);
    }
    if main.is_empty() {
        return Err(Status::bad_request(format!("a container name must be specified for pod {pod_name}")));
    }
    if let Some(named) = meta::annotation(pod, "kubectl.kubernetes.io/default-container").filter(|n| main.contains(n)) {
        return Ok(named);
    }
    let mut why = format!("a container name must be specified for pod {pod_name}, choose one of: [{}]", main.join(" "));
    if !init.is_empty() {
        why.push_str(&format!(" or one of the init containers: [{}]", init.join(" ")));
    }
    if !ephemeral.is_empty() {
        why.push_str(&format!(" or one of the ephemeral containers: [{}]", ephemeral.join(" ")));
    }
    Err(Status::bad_request(why))
}

pub async fn log(engine: &Engine, call: &Call, mut request: Request) -> Result<Reply, Status> {
    let pod = pod_of(engine, call).await?;
    check_log_options(call)?;
    let container = container(&pod, call.query.text("container"))?;
    let node = meta::text(&pod, "spec.nodeName");
    if node.is_empty() {
        return Ok(Reply::Whole(reply::plain(200, "text/plain", "")));
    }
    let mut options = Vec::new();
    for key in ["follow", "previous", "timestamps"] {
        if call.query.flag(key) {
            options.push(format!("{key}=true"));
        }
    }
    for key in ["sinceSeconds", "sinceTime", "tailLines", "limitBytes", "stream"] {
        if let Some(value) = call.query.get(key) {
            options.push(format!("{key}={}", encode(value)));
        }
    }
    let path = format!("/containerLogs/{}/{}/{container}?{}", call.namespace(), meta::name(&pod), options.join("&"));
    let target = kubelet(engine, node)?;
    let handshake = websocket::take(&mut request)?;
    let answer = forward(request, &target, &path).await?;
    if !answer.status().is_success() {
        return Err(kubelet_error(answer, meta::name(&pod)).await);
    }
    Ok(Reply::Whole(match handshake {
        Some(handshake) => handshake.stream(answer.into_body()),
        None => answer,
    }))
}

/// The kubelet answers failures in plain text; clients of the API expect a Status.
async fn kubelet_error(answer: Response, pod: &str) -> Status {
    let code = answer.status().as_u16();
    let text = body::read(answer.into_body()).await.map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default();
    match code {
        400 => Status::bad_request(text),
        404 => Status::new(404, "NotFound", format!("the server could not find the requested resource ( pods/log {pod})")),
        _ => Status::internal(text),
    }
}

fn check_log_options(call: &Call) -> Result<(), Status> {
    let mut errors = Vec::new();
    let negative = |key: &str| call.query.number(key).filter(|n| *n < 0);
    let at_least_zero = "must be greater than or equal to 0";
    if let Some(lines) = negative("tailLines") {
        errors.push(outrigger_api::FieldError::invalid("tailLines", lines, at_least_zero));
    }
    if let Some(bytes) = call.query.number("limitBytes").filter(|n| *n < 1) {
        errors.push(outrigger_api::FieldError::invalid("limitBytes", bytes, "must be greater than 0"));
    }
    if call.query.get("sinceSeconds").is_some() && call.query.get("sinceTime").is_some() {
        errors.push(outrigger_api::FieldError::forbidden("", "at most one of `sinceTime` or `sinceSeconds` may be specified"));
    } else if let Some(seconds) = call.query.number("sinceSeconds").filter(|n| *n < 1) {
        errors.push(outrigger_api::FieldError::invalid("sinceSeconds", seconds, "must be greater than 0"));
    }
    if errors.is_empty() { Ok(()) } else { Err(Status::invalid("", "PodLogOptions", &call.info.name, &errors)) }
}

/// exec, attach and portforward: an upgraded connection to the kubelet.
pub async fn stream(engine: &Engine, call: &Call, request: Request) -> Result<Reply, Status> {
    // A WebSocket comes as GET; what it does is still the creation of a stream.
    if call.info.verb == "get" {
        let may = outrigger_access::Attributes {
            namespace: call.namespace(),
            name: &call.info.name,
            subresource: &call.info.subresource,
            api_version: &call.info.version,
            ..outrigger_access::Attributes::resource(&call.user, "create", "", "pods")
        };
        engine.permit(&may)?;
    }
    engine.fresh().await?;
    let mut options = stream_options(call);
    engine.admission.admit(engine, &Attributes::new(call, Operation::Connect, &call.info.name), &mut options).await?;
    let pod = pod_of(engine, call).await?;
    let kind = call.info.subresource.as_str();
    let node = meta::text(&pod, "spec.nodeName");
    let pod_name = meta::name(&pod);
    let path = match kind {
        "portforward" => {
            if node.is_empty() {
                return Err(Status::bad_request(format!("pod {pod_name} does not have a host assigned")));
            }
            let ports: Vec<String> = meta::items(&options, "ports").iter().map(ToString::to_string).collect();
            let query = if ports.is_empty() { String::new() } else { format!("?port={}", ports.join(",")) };
            format!("/portForward/{}/{pod_name}{query}", call.namespace())
        }
        kind => {
            let container = container(&pod, meta::text(&options, "container"))?;
            if node.is_empty() {
                return Err(Status::bad_request(format!("pod {pod_name} does not have a host assigned")));
            }
            format!("/{kind}/{}/{pod_name}/{container}?{}", call.namespace(), kubelet_options(&options))
        }
    };
    let target = kubelet(engine, node)?;
    Ok(Reply::Whole(forward(request, &target, &path).await?))
}

/// PodExecOptions, PodAttachOptions or PodPortForwardOptions out of the query.
fn stream_options(call: &Call) -> Value {
    let mut options = json!({});
    if let Some(known) = call.resource.subresource(&call.info.subresource) {
        meta::set_type(&mut options, &api_version(&known.body.group, &known.body.version), &known.body.kind);
    }
    if call.info.subresource == "portforward" {
        let ports = call.query.all("ports").iter().flat_map(|ports| ports.split(','));
        options["ports"] = ports.filter_map(|port| port.parse::<i32>().ok()).collect();
        return options;
    }
    for stream in ["stdin", "stdout", "stderr", "tty"] {
        if call.query.flag(stream) {
            options[stream] = true.into();
        }
    }
    if let Some(container) = call.query.get("container") {
        options["container"] = container.into();
    }
    if call.info.subresource == "exec" {
        options["command"] = call.query.all("command").into();
    }
    options
}

/// The kubelet's names for the streams.
fn kubelet_options(options: &Value) -> String {
    let streams = [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")];
    let wanted = streams.iter().filter(|(ours, _)| options[*ours] == true).map(|(_, theirs)| format!("{theirs}=1"));
    let command = meta::items(options, "command").iter().filter_map(Value::as_str).map(|word| format!("command={}", encode(word)));
    wanted.chain(command).collect::<Vec<_>>().join("&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_container_is_found_or_asked_for() {
        let one = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}]}});
        let two =
            json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}, {"name": "b"}], "initContainers": [{"name": "i"}]}});
        assert_eq!(container(&one, "").unwrap(), "a");
        assert_eq!(container(&two, "i").unwrap(), "i");
        assert_eq!(container(&one, "x").unwrap_err().message, "container x is not valid for pod p");
        assert_eq!(
            container(&two, "").unwrap_err().message,
            "a container name must be specified for pod p, choose one of: [a b] or one of the init containers: [i]"
        );
    }
}
