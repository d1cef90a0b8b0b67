//! Whether aggregated servers answer: asked when something changes and now and then, written to the condition `Available`. The same
//! questions bring their discovery and OpenAPI.

use std::sync::{Arc, Weak};
use std::time::Duration;

use http::header::ACCEPT;
use outrigger_access::UserInfo;
use outrigger_api::{Status, meta};
use serde_json::{Map, Value, json};

use super::proxy::send;
use super::{Found, GROUP, PLURAL, PREFIX, Remote};
use crate::admission::{all, lookup};
use crate::body::{Request, full, read};
use crate::call::Call;
use crate::engine::Engine;
use crate::registry::subresource::set_condition;
use crate::registry::update::change_unchecked;

/// Servers that answered are asked again after this time, the others after the shorter one.
const GOOD: Duration = Duration::from_secs(30);
const BAD: Duration = Duration::from_secs(2);
/// Between two rounds, as a round's own writes make another one.
const PAUSE: Duration = Duration::from_millis(500);
/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a server is not available: reason and message.
type Trouble = (&'static str, String);

/// Asks all remote servers for as long as the engine lives.
pub async fn watch(engine: Weak<Engine>) {
    let Some((mut services, mut slices)) = engine.upgrade().map(|engine| {
        let slices = engine.builtin("discovery.k8s.io", "v1", "endpointslices").storage_prefix.to_string();
        (engine.hub.cache(PREFIX).subscribe(), engine.hub.cache(&slices).subscribe())
    }) else {
        return;
    };
    loop {
        services.mark_unchanged();
        slices.mark_unchanged();
        let (good, any) = {
            let Some(engine) = engine.upgrade() else { return };
            let remotes = engine.aggregator.remotes();
            forget(&engine);
            settle_local(&engine).await;
            let checks = remotes.iter().map(|remote| check(&engine, remote));
            (futures::future::join_all(checks).await.into_iter().all(|good| good), !remotes.is_empty())
        };
        tokio::time::sleep(PAUSE).await;
        let ended = tokio::select! {
            changed = services.changed() => changed.is_err(),
            changed = slices.changed(), if any => changed.is_err(),
            () = tokio::time::sleep(if good { GOOD } else { BAD }) => false,
        };
        if ended {
            return;
        }
    }
}

/// What was found of servers that are no longer registered.
fn forget(engine: &Engine) {
    let remotes = engine.aggregator.remotes();
    for name in engine.aggregator.found().keys().filter(|name| !remotes.iter().any(|remote| remote.name == **name)) {
        engine.aggregator.learn(name, None);
    }
}

/// Groups and versions of this server itself are always available.
async fn settle_local(engine: &Arc<Engine>) {
    let condition = available("True", "Local", "Local APIServices are always available".into());
    for object in all(engine, GROUP, PLURAL, "").iter().filter(|object| !meta::get(object, "spec.service").is_object()) {
        report(engine, meta::name(object), condition.clone()).await;
    }
}

fn available(status: &str, reason: &str, message: String) -> Value {
    json!({"type": "Available", "status": status, "reason": reason, "message": message})
}

async fn check(engine: &Arc<Engine>, remote: &Remote) -> bool {
    let outcome = match reachable(engine, remote) {
        Ok(()) => ask(engine, remote).await,
        Err(trouble) => Err(trouble),
    };
    let (status, reason, message) = match outcome {
        Ok(found) => {
            engine.aggregator.learn(&remote.name, Some(found));
            ("True", "Passed", "all checks passed".to_string())
        }
        Err((reason, message)) => ("False", reason, message),
    };
    report(engine, &remote.name, available(status, reason, message)).await;
    status == "True"
}

async fn report(engine: &Arc<Engine>, name: &str, condition: Value) {
    if let Err(status) = publish(engine, name, condition).await {
        tracing::warn!(apiservice = name, %status, "writing whether an APIService is available");
    }
}

async fn publish(engine: &Engine, name: &str, condition: Value) -> Result<(), Status> {
    let says = |object: &Value| {
        let known = meta::items(object, "status.conditions").iter().find(|known| known["type"] == condition["type"]);
        known.is_some_and(|known| ["status", "reason", "message"].iter().all(|key| known[*key] == condition[*key]))
    };
    if lookup(engine, GROUP, PLURAL, "", name).is_none_or(|object| says(&object)) {
        return Ok(());
    }
    let mut call = Call::internal(engine.builtin(GROUP, "v1", PLURAL), "patch", "", name);
    call.info.subresource = "status".into();
    change_unchecked(engine, &call, name, |current| {
        let mut object = current.clone();
        set_condition(&mut object, condition.clone());
        Ok(object)
    })
    .await
}

/// The Service is there, has the port, and endpoints for it.
fn reachable(engine: &Engine, remote: &Remote) -> Result<(), Trouble> {
    let (service, space) = (&remote.service, &remote.namespace);
    let Some(object) = lookup(engine, "", "services", space, service) else {
        return Err(("ServiceNotFound", format!("service/{service} in {space:?} is not present")));
    };
    if meta::text(&object, "spec.type") != "ClusterIP" {
        return Ok(());
    }
    let Some(port) = meta::items(&object, "spec.ports").iter().find(|port| port["port"].as_u64() == Some(remote.port.into())) else {
        return Err(("ServicePortError", format!("service/{service} in {space:?} is not listening on port {}", remote.port)));
    };
    let name = port["name"].as_str().unwrap_or_default();
    let slices: Vec<Value> = all(engine, "discovery.k8s.io", "endpointslices", space)
        .into_iter()
        .filter(|slice| meta::label(slice, "kubernetes.io/service-name") == Some(service))
        .collect();
    if slices.is_empty() {
        return Err(("EndpointsNotFound", format!("cannot find endpointslices for service/{service} in {space:?}")));
    }
    let has_port = |slice: &&Value| meta::items(slice, "ports").iter().any(|port| port["name"].as_str().unwrap_or_default() == name);
    let is_ready = |slice: &Value| meta::items(slice, "endpoints").iter().any(|endpoint| endpoint["conditions"]["ready"] != false);
    if !slices.iter().filter(has_port).any(is_ready) {
        let message = format!("endpointslices for service/{service} in {space:?} have no addresses with port name {name:?}");
        return Err(("MissingEndpoints", message));
    }
    Ok(())
}

/// Asks for the group's resources, which must be answered, and for OpenAPI, which need not.
async fn ask(engine: &Engine, remote: &Remote) -> Result<Found, Trouble> {
    let path = format!("/apis/{}/{}", remote.group, remote.version);
    let failed = |what: String| ("FailedDiscoveryCheck", what);
    let list = get(engine, remote, &path).await.map_err(|error| failed(format!("failing or missing response from {path}: {error}")))?;
    let mut found = Found { resources: resources(&list), ..Found::default() };
    if let Ok(index) = get(engine, remote, "/openapi/v3").await {
        let location = &index["paths"][path.trim_start_matches('/')]["serverRelativeURL"];
        found.openapi_v3 = location.as_str().map(String::from);
    }
    if let Ok(mut document) = get(engine, remote, "/openapi/v2").await {
        found.definitions = members(&mut document, "definitions", |name| !name.starts_with("io.k8s.api"));
        found.paths = members(&mut document, "paths", |name| name.starts_with(&path));
    }
    Ok(found)
}

fn members(document: &mut Value, key: &str, wanted: impl Fn(&str) -> bool) -> Map<String, Value> {
    let mut map = document[key].as_object_mut().map(std::mem::take).unwrap_or_default();
    map.retain(|name, _| wanted(name));
    map
}

/// One document of the server, asked for as the aggregator itself.
async fn get(engine: &Engine, remote: &Remote, path: &str) -> Result<Value, String> {
    let request: Request =
        http::Request::get(path).header(ACCEPT, "application/json").body(full(bytes::Bytes::new())).map_err(|error| error.to_string())?;
    let user = UserInfo::new("system:kube-aggregator", [outrigger_access::user::GROUP_MASTERS]);
    let exchange = async {
        let response = send(engine, remote, &user, request).await.map_err(|status| status.message)?;
        let code = response.status();
        if !code.is_success() {
            return Err(format!("bad status from {path}: {}", code.as_u16()));
        }
        read(response.into_body()).await.map_err(|_| "the answer broke off".to_string())
    };
    let bytes = tokio::time::timeout(PATIENCE, exchange).await.map_err(|_| "context deadline exceeded".to_string())??;
    serde_json::from_slice(&bytes).map_err(|error| error.to_string())
}

/// An APIResourceList's resources in the form of aggregated discovery, subresources under their parents.
fn resources(list: &Value) -> Vec<Value> {
    let (group, version) = outrigger_api::resource::split_api_version(meta::text(list, "groupVersion"));
    let kind = |entry: &Value| {
        let or = |key: &str, default: &str| entry[key].as_str().filter(|text| !text.is_empty()).unwrap_or(default).to_string();
        json!({"group": or("group", group), "version": or("version", version), "kind": entry["kind"]})
    };
    let mut found: Vec<Value> = Vec::new();
    for entry in meta::items(list, "resources") {
        let name = meta::text(entry, "name");
        match name.split_once('/') {
            None => {
                let scope = if entry["namespaced"] == true { "Namespaced" } else { "Cluster" };
                let mut value = json!({
                    "resource": name, "responseKind": kind(entry), "scope": scope,
                    "singularResource": entry["singularName"], "verbs": entry["verbs"],
                });
                for key in ["shortNames", "categories"] {
                    if entry[key].is_array() {
                        value[key] = entry[key].clone();
                    }
                }
                found.push(value);
            }
            Some((parent, sub)) => {
                let value = json!({"subresource": sub, "responseKind": kind(entry), "verbs": entry["verbs"]});
                if let Some(parent) = found.iter_mut().find(|known| known["resource"] == parent) {
                    match parent["subresources"].as_array_mut() {
                        Some(list) => list.push(value),
                        None => parent["subresources"] = json!([value]),
                    }
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resource_lists_become_aggregated_discovery() {
        let list = json!({"groupVersion": "w.io/v1", "resources": [
            {"name": "fs", "singularName": "f", "namespaced": true, "kind": "F", "verbs": ["get"], "shortNames": ["ff"]},
            {"name": "fs/scale", "singularName": "", "namespaced": true, "kind": "Scale", "group": "autoscaling", "version": "v1", "verbs": ["get"]}]});
        let expected = json!([{
            "resource": "fs", "responseKind": {"group": "w.io", "version": "v1", "kind": "F"}, "scope": "Namespaced", "singularResource": "f",
            "verbs": ["get"], "shortNames": ["ff"],
            "subresources": [{"subresource": "scale", "responseKind": {"group": "autoscaling", "version": "v1", "kind": "Scale"}, "verbs": ["get"]}],
        }]);
        assert_eq!(Value::Array(resources(&list)), expected);
    }
}
