//! Paths that are no resources: what is served and in which versions, health, version, metrics, OpenAPI and the token issuer's keys.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::Method;
use http::header::{ACCEPT, CONTENT_TYPE, ETAG, HeaderValue, IF_NONE_MATCH};
use outrigger_access::UserInfo;
use outrigger_api::{Catalog, Resource, Status};
use serde_json::{Value, json};
use sha2_hex::digest;

use crate::aggregator::{self, Group, Remote, groups};
use crate::body::{Request, Response};
use crate::cache::encode;
use crate::engine::Engine;
use crate::negotiate::{header_text, media_types};
use crate::reply;
use crate::request::{Query, RequestInfo};

/// A short content hash, for ETags and the OpenAPI index.
pub mod sha2_hex {
    use std::hash::Hasher;

    /// 128 bits of the bytes' hash in hexadecimal: it names a version of a document, it protects nothing.
    pub fn digest(bytes: &[u8]) -> String {
        let half = |seed: u64| {
            let mut hasher = std::hash::DefaultHasher::new();
            hasher.write_u64(seed);
            hasher.write(bytes);
            hasher.finish()
        };
        format!("{:016X}{:016X}", half(1), half(2))
    }
}

pub async fn route(engine: &Arc<Engine>, request: Request, info: &RequestInfo, query: &Query, user: &UserInfo) -> Result<Response, Status> {
    let path = info.path.trim_end_matches('/');
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Err(if known(&segments) { Status::method_not_allowed() } else { Status::path_not_found() });
    }
    if matches!(segments.first(), Some(&"api" | &"apis" | &"openapi")) {
        engine.fresh().await?;
    }
    let catalog = engine.catalog();
    match segments.as_slice() {
        [] | [""] => Ok(reply::json(200, &paths(engine, &catalog))),
        ["api"] => aggregated_or(&request, || api_versions(engine), || aggregated(engine, &catalog, true)),
        ["apis"] => aggregated_or(&request, || group_list(engine, &catalog), || aggregated(engine, &catalog, false)),
        ["api", "v1"] => Ok(reply::json(200, &resource_list(&catalog, "", "v1"))),
        ["apis", group] => match groups(engine, &catalog).iter().find(|known| known.name == *group) {
            Some(group) => Ok(reply::json(200, &group_value(group, true))),
            None => Err(Status::path_not_found()),
        },
        ["apis", group, version] if catalog.versions(group).contains(version) => {
            Ok(reply::json(200, &resource_list(&catalog, group, version)))
        }
        ["version"] => Ok(reply::json(200, &version(&engine.config.git_version))),
        ["healthz" | "livez" | "readyz", rest @ ..] => health(engine, segments[0], rest, query),
        ["metrics"] => Ok(reply::plain(
            200,
            "text/plain; version=0.0.4; charset=utf-8",
            engine.metrics.render(&engine.hub.counts(), engine.started.elapsed()),
        )),
        ["openapi", "v2"] => engine.openapi.v2(engine, request.headers()).await,
        ["openapi", "v3"] => engine.openapi.index(engine),
        ["openapi", "v3", "apis", group, version] if engine.aggregator.serves(&catalog, group, version) => {
            let path = format!("/apis/{group}/{version}");
            let remote = aggregator::serving(engine, &path).await?.ok_or_else(Status::path_not_found)?;
            aggregator::pass_on(engine, &remote, user, request).await
        }
        ["openapi", "v3", rest @ ..] => engine.openapi.document(engine, request.headers(), rest, query).await,
        ["openid", "v1", "jwks"] => Ok(reply::plain(200, "application/jwk-set+json", encode(&engine.tokens.jwks()))),
        [".well-known", "openid-configuration"] => {
            let jwks = format!("https://{}:{}/openid/v1/jwks", engine.config.advertise_address, engine.config.secure_port);
            Ok(reply::json(200, &engine.tokens.discovery(&jwks)))
        }
        _ => Err(Status::path_not_found()),
    }
}

fn known(segments: &[&str]) -> bool {
    matches!(segments.first(), Some(&"api" | &"apis" | &"version" | &"openapi" | &"healthz" | &"livez" | &"readyz"))
}

fn paths(engine: &Engine, catalog: &Catalog) -> Value {
    let mut paths = vec!["/.well-known/openid-configuration".to_string(), "/api".into(), "/api/v1".into(), "/apis".into()];
    for group in groups(engine, catalog) {
        paths.push(format!("/apis/{}", group.name));
        paths.extend(group.versions.iter().map(|(version, _)| format!("/apis/{}/{version}", group.name)));
    }
    for path in ["/healthz", "/livez", "/metrics", "/openapi/v2", "/openapi/v3", "/openid/v1/jwks", "/readyz", "/version"] {
        paths.push(path.into());
    }
    json!({"paths": paths})
}

pub fn version(git_version: &str) -> Value {
    let mut numbers = git_version.trim_start_matches('v').split('.');
    json!({
        "major": numbers.next().unwrap_or("1"),
        "minor": numbers.next().unwrap_or("35"),
        "emulationMajor": "1",
        "emulationMinor": "35",
        "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "34",
        "gitVersion": git_version,
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "rustc",
        "platform": format!("linux/{}", architecture()),
    })
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn api_versions(engine: &Engine) -> Value {
    let address = format!("{}:{}", engine.config.advertise_address, engine.config.secure_port);
    json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]})
}

fn group_list(engine: &Engine, catalog: &Catalog) -> Value {
    let groups: Vec<Value> = groups(engine, catalog).iter().map(|group| group_value(group, false)).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

fn group_value(group: &Group, alone: bool) -> Value {
    let versions: Vec<Value> = group
        .versions
        .iter()
        .map(|(version, _)| json!({"groupVersion": format!("{}/{version}", group.name), "version": version}))
        .collect();
    let preferred = versions.first().cloned().unwrap_or_default();
    let mut value = json!({});
    if alone {
        value = json!({"kind": "APIGroup", "apiVersion": "v1"});
    }
    value["name"] = group.name.as_str().into();
    value["versions"] = versions.into();
    value["preferredVersion"] = preferred;
    value
}

fn resource_list(catalog: &Catalog, group: &str, version: &str) -> Value {
    let mut resources = Vec::new();
    for resource in catalog.resources(group, version) {
        resources.push(resource_value(resource));
        for sub in &resource.subresources {
            let mut value = json!({
                "name": format!("{}/{}", resource.plural, sub.name),
                "singularName": "",
                "namespaced": resource.namespaced,
                "kind": sub.body.kind,
                "verbs": sub.verbs,
            });
            if sub.body.group != resource.group || sub.body.version != resource.version {
                value["group"] = sub.body.group.as_ref().into();
                value["version"] = sub.body.version.as_ref().into();
            }
            resources.push(value);
        }
    }
    let api_version = outrigger_api::resource::api_version(group, version);
    let mut list = json!({"kind": "APIResourceList", "groupVersion": api_version, "resources": resources});
    if !group.is_empty() {
        list["apiVersion"] = "v1".into();
    }
    list
}

fn resource_value(resource: &Resource) -> Value {
    let mut value = json!({
        "name": resource.plural,
        "singularName": resource.singular,
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": resource.verbs,
    });
    if !resource.short_names.is_empty() {
        value["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        value["categories"] = json!(resource.categories);
    }
    if !resource.strategy.create_only {
        value["storageVersionHash"] = storage_version_hash(resource).into();
    }
    value
}

fn storage_version_hash(resource: &Resource) -> String {
    use base64::Engine as _;
    let storage = format!("{}/{}/{}", resource.storage.group, resource.storage.version, resource.storage.kind);
    base64::engine::general_purpose::STANDARD.encode(&digest(storage.as_bytes()).as_bytes()[..6])
}

/// The aggregated form when the client asks for it, with an ETag.
fn aggregated_or(request: &Request, plain: impl Fn() -> Value, whole: impl Fn() -> Value) -> Result<Response, Status> {
    let accepted = header_text(request.headers(), &ACCEPT);
    let aggregated = media_types(accepted).into_iter().find_map(|media| {
        if media.name != "application/json" && media.name != "*/*" {
            return None;
        }
        match (media.param("g"), media.param("v"), media.param("as")) {
            (Some("apidiscovery.k8s.io"), Some(v @ ("v2" | "v2beta1")), Some("APIGroupDiscoveryList")) => Some(Some(v == "v2")),
            (None, None, None) => Some(None),
            _ => None,
        }
    });
    match aggregated.flatten() {
        Some(stable) => {
            let version = if stable { "v2" } else { "v2beta1" };
            let mut value = whole();
            value["apiVersion"] = format!("apidiscovery.k8s.io/{version}").into();
            let bytes = encode(&value);
            let kind = if stable {
                "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
            } else {
                "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList"
            };
            let etag = format!("\"{}\"", digest(&bytes));
            let known = header_text(request.headers(), &IF_NONE_MATCH) == etag;
            let mut response = if known { reply::plain(304, kind, "") } else { reply::plain(200, kind, bytes) };
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
            response.headers_mut().insert(http::header::VARY, HeaderValue::from_static("Accept"));
            if let Ok(etag) = HeaderValue::from_str(&etag) {
                response.headers_mut().insert(ETAG, etag);
            }
            Ok(response)
        }
        None => {
            let mut response = reply::json(200, &plain());
            response.headers_mut().insert(http::header::VARY, HeaderValue::from_static("Accept"));
            Ok(response)
        }
    }
}

fn aggregated(engine: &Engine, catalog: &Catalog, core: bool) -> Value {
    let core_group = || Group { name: String::new(), versions: catalog.versions("").into_iter().map(|v| (v.to_string(), None)).collect() };
    let groups = if core { vec![core_group()] } else { groups(engine, catalog) };
    let found = engine.aggregator.found();
    let version_value = |group: &str, version: &str, remote: Option<&Remote>| match remote {
        None => {
            let resources: Vec<Value> = catalog.resources(group, version).map(|r| discovered(r)).collect();
            json!({"version": version, "resources": resources, "freshness": "Current"})
        }
        // Of a server that doesn't answer the last answer is shown.
        Some(remote) => {
            let resources = found.get(&remote.name).map(|found| found.resources.clone()).unwrap_or_default();
            json!({"version": version, "resources": resources, "freshness": if remote.is_available() { "Current" } else { "Stale" }})
        }
    };
    let items = groups.iter().map(|group| {
        let versions: Vec<Value> =
            group.versions.iter().map(|(version, remote)| version_value(&group.name, version, remote.as_deref())).collect();
        let mut metadata = json!({"creationTimestamp": null});
        if !group.name.is_empty() {
            metadata["name"] = group.name.as_str().into();
        }
        json!({"metadata": metadata, "versions": versions})
    });
    let items: Vec<Value> = items.collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items})
}

fn discovered(resource: &Resource) -> Value {
    let kind = |gvk: &outrigger_api::GroupVersionKind| json!({"group": gvk.group, "version": gvk.version, "kind": gvk.kind});
    let mut value = json!({
        "resource": resource.plural,
        "responseKind": kind(&resource.gvk()),
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": resource.singular,
        "verbs": resource.verbs,
    });
    if !resource.short_names.is_empty() {
        value["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        value["categories"] = json!(resource.categories);
    }
    if !resource.subresources.is_empty() {
        let subs: Vec<Value> = resource
            .subresources
            .iter()
            .map(|sub| json!({"subresource": sub.name, "responseKind": kind(&sub.body), "verbs": sub.verbs}))
            .collect();
        value["subresources"] = subs.into();
    }
    value
}

fn health(engine: &Engine, endpoint: &str, rest: &[&str], query: &Query) -> Result<Response, Status> {
    let ready = engine.ready.load(Ordering::Acquire);
    let stopping = *engine.stop.borrow();
    let mut checks: Vec<(&str, bool)> = vec![("ping", true), ("log", true), ("etcd", engine.store.health().is_ok())];
    if endpoint == "readyz" {
        checks.push(("informer-sync", true));
        checks.push(("shutdown", !stopping));
    }
    checks.push(("poststarthook/rbac/bootstrap-roles", ready));
    checks.push(("poststarthook/start-service-ip-repair-controllers", ready));
    if let [first, more @ ..] = rest {
        let name = std::iter::once(*first).chain(more.iter().copied()).collect::<Vec<_>>().join("/");
        return match checks.iter().find(|(known, _)| *known == name) {
            Some((_, true)) => Ok(reply::text(200, "ok")),
            Some(_) => Ok(reply::text(500, "internal server error: not finished\n")),
            None => Err(Status::path_not_found()),
        };
    }
    let excluded = query.all("exclude");
    let mut lines = String::new();
    let mut healthy = true;
    for (name, good) in &checks {
        if excluded.iter().any(|e| e == name) {
            lines.push_str(&format!("[+]{name} excluded: ok\n"));
        } else if *good {
            lines.push_str(&format!("[+]{name} ok\n"));
        } else {
            healthy = false;
            lines.push_str(&format!("[-]{name} failed: reason withheld\n"));
        }
    }
    if !healthy {
        return Ok(reply::text(500, format!("{lines}{endpoint} check failed\n")));
    }
    if query.get("verbose").is_some() {
        return Ok(reply::text(200, format!("{lines}{endpoint} check passed\n")));
    }
    Ok(reply::text(200, "ok"))
}
