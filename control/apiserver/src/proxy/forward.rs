//! One request sent on to another server over a new connection, upgraded connections included.

use std::sync::Arc;
use std::time::Duration;

use http::header::{AUTHORIZATION, CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION, TRANSFER_ENCODING, UPGRADE};
use http::{StatusCode, Uri};
use hyper_util::rt::TokioIo;
use outrigger_api::{Status, meta};
use rand::Rng;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::admission::{self, Attributes, Operation, lookup};
use crate::body::{Request, Response, boxed};
use crate::call::Call;
use crate::engine::Engine;
use crate::proxy::mount::Mount;
use crate::reply::Reply;

/// Where a request goes.
pub struct Target {
    pub host: String,
    pub port: u16,
    /// None: plain HTTP.
    pub tls: Option<Arc<ClientConfig>>,
    /// The name that the certificate must have, when it isn't the host.
    pub server_name: Option<String>,
}

impl Target {
    /// Host and port, as URLs and the Host header have them.
    pub fn authority(&self) -> String {
        let Self { host, port, .. } = self;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }
}

pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

const HOP_BY_HOP: &[&str] =
    &["connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "http2-settings"];

/// A connection to the target, TLS included.
pub async fn connect(target: &Target) -> Result<Box<dyn Stream>, String> {
    let address = target.authority();
    let connected = tokio::time::timeout(Duration::from_secs(10), TcpStream::connect(&address)).await;
    let stream = match connected {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(format!("dial tcp {address}: {error}")),
        Err(_) => return Err(format!("dial tcp {address}: i/o timeout")),
    };
    let _ = stream.set_nodelay(true);
    let Some(config) = &target.tls else { return Ok(Box::new(stream)) };
    let name = target.server_name.as_ref().unwrap_or(&target.host);
    let name = ServerName::try_from(name.clone()).map_err(|e| format!("{name}: {e}"))?;
    let connector = tokio_rustls::TlsConnector::from(config.clone());
    let stream = connector.connect(name, stream).await.map_err(|e| format!("tls: handshake with {address}: {e}"))?;
    Ok(Box::new(stream))
}

/// Sends the request to `target` with another path and query, and returns its answer; an upgrade is carried on as raw bytes.
pub async fn forward(mut request: Request, target: &Target, path_and_query: &str) -> Result<Response, Status> {
    let unavailable = |why: String| Status::service_unavailable(format!("error trying to reach service: {why}"));
    let upgrade = request.headers().get(UPGRADE).cloned();
    let client_side = upgrade.as_ref().map(|_| hyper::upgrade::on(&mut request));
    let stream = connect(target).await.map_err(unavailable)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| unavailable(e.to_string()))?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "proxied connection ended");
        }
    });
    let outgoing = outgoing(request, target, path_and_query, upgrade.as_ref())?;
    let mut response = sender.send_request(outgoing).await.map_err(|e| unavailable(e.to_string()))?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some(client_side) = client_side
    {
        let server_side = hyper::upgrade::on(&mut response);
        tokio::spawn(splice(client_side, server_side));
    } else {
        for name in HOP_BY_HOP {
            response.headers_mut().remove(*name);
        }
    }
    Ok(response.map(boxed))
}

fn outgoing(request: Request, target: &Target, path_and_query: &str, upgrade: Option<&HeaderValue>) -> Result<Request, Status> {
    let (mut parts, body) = request.into_parts();
    parts.uri = path_and_query.parse::<Uri>().map_err(|e| Status::bad_request(e.to_string()))?;
    parts.version = http::Version::HTTP_11;
    clean(&mut parts.headers);
    if let Some(upgrade) = upgrade {
        parts.headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        parts.headers.insert(UPGRADE, upgrade.clone());
    }
    parts.headers.insert(HOST, HeaderValue::from_str(&target.authority()).map_err(|e| Status::bad_request(e.to_string()))?);
    let mut request = Request::from_parts(parts, body);
    // Extensions carry the other connection's upgrade; they must not leak into this one.
    *request.extensions_mut() = http::Extensions::new();
    Ok(request)
}

fn clean(headers: &mut HeaderMap) {
    for name in HOP_BY_HOP {
        headers.remove(*name);
    }
    headers.remove(AUTHORIZATION);
    headers.remove(TRANSFER_ENCODING);
    let impersonation: Vec<HeaderName> = headers.keys().filter(|name| name.as_str().starts_with("impersonate-")).cloned().collect();
    for name in impersonation {
        headers.remove(name);
    }
}

async fn splice(client: hyper::upgrade::OnUpgrade, server: hyper::upgrade::OnUpgrade) {
    match tokio::try_join!(client, server) {
        Ok((client, server)) => {
            let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
            if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut server).await {
                tracing::debug!(%error, "upgraded connection ended");
            }
        }
        Err(error) => tracing::warn!(%error, "upgrade failed"),
    }
}

/// The first usable address of a node.
pub fn node_host(node: &Value) -> Option<String> {
    let addresses = meta::items(node, "status.addresses");
    ["InternalIP", "ExternalIP", "InternalDNS", "Hostname", "ExternalDNS"].iter().find_map(|kind| {
        let found = addresses.iter().find(|a| a["type"] == *kind)?;
        found["address"].as_str().map(String::from)
    })
}

/// A node's kubelet.
pub fn kubelet(engine: &Engine, node: &str) -> Result<Target, Status> {
    let object = lookup(engine, "", "nodes", "", node).ok_or_else(|| Status::not_found("", "nodes", node))?;
    let host = node_host(&object).ok_or_else(|| {
        Status::internal(format!("no preferred addresses found; known addresses: {}", meta::get(&object, "status.addresses")))
    })?;
    let port = meta::get(&object, "status.daemonEndpoints.kubeletEndpoint.Port").as_u64().unwrap_or(10250);
    Ok(Target { host, port: u16::try_from(port).unwrap_or(10250), tls: Some(engine.kubelets.tls.clone()), server_name: None })
}

/// pods/proxy, services/proxy and nodes/proxy.
pub async fn subresource(engine: &Engine, call: &Call, request: Request) -> Result<Reply, Status> {
    engine.fresh().await?;
    if let Some(known) = call.resource.subresource(&call.info.subresource) {
        let mut options = json!({"kind": known.body.kind, "apiVersion": "v1", "path": format!("/{}", call.info.trailing())});
        engine.admission.admit(engine, &Attributes::new(call, Operation::Connect, &call.info.name), &mut options).await?;
    }
    let (scheme, name, port) = split_name(&call.info.name)
        .ok_or_else(|| Status::bad_request(format!("invalid {} request {:?}", call.resource.singular, call.info.name)))?;
    let plain_or_tls = |host: String, port: u16| {
        let tls = (scheme == "https").then(|| engine.kubelets.anonymous_tls.clone());
        Target { host, port, tls, server_name: None }
    };
    let target = match call.resource.plural.as_ref() {
        "nodes" => match port {
            "" | "10250" => kubelet(engine, name)?,
            port => {
                let node = lookup(engine, "", "nodes", "", name).ok_or_else(|| call.not_found(name))?;
                let host = node_host(&node).ok_or_else(|| Status::internal("the node has no address"))?;
                plain_or_tls(host, port.parse().map_err(|_| Status::bad_request(format!("invalid port {port:?}")))?)
            }
        },
        "pods" => {
            let pod = lookup(engine, "", "pods", call.namespace(), name).ok_or_else(|| call.not_found(name))?;
            let host = meta::text(&pod, "status.podIP").to_string();
            if host.is_empty() {
                return Err(Status::internal("address not allowed"));
            }
            plain_or_tls(host, pod_port(&pod, port)?)
        }
        _ => {
            let (host, port) = endpoint(engine, call.namespace(), name, port)?;
            plain_or_tls(host, port)
        }
    };
    proxied(call, request, &target).await
}

async fn proxied(call: &Call, mut request: Request, target: &Target) -> Result<Reply, Status> {
    let path = request.uri().path();
    let marker = format!("/{}/{}/proxy", call.resource.plural, crate::request::encode(&call.info.name));
    let raw_marker = format!("/{}/{}/proxy", call.resource.plural, call.info.name);
    let rest = [&raw_marker, &marker].iter().find_map(|m| path.find(m.as_str()).map(|at| &path[at + m.len()..])).unwrap_or("").to_string();
    let prefix = path[..path.len() - rest.len()].to_string();
    let query = request.uri().query().map(|q| format!("?{q}")).unwrap_or_default();
    let upgrade = request.headers().contains_key(UPGRADE);
    if rest.is_empty() && matches!(*request.method(), http::Method::GET | http::Method::HEAD) && !upgrade {
        let mut response = crate::reply::text(301, "");
        if let Ok(location) = HeaderValue::from_str(&format!("{path}/{query}")) {
            response.headers_mut().insert(LOCATION, location);
        }
        return Ok(Reply::Whole(response));
    }
    let to = if rest.is_empty() { format!("/{query}") } else { format!("{rest}{query}") };
    if upgrade {
        return Ok(Reply::Whole(forward(request, target, &to).await?));
    }
    let mount = Mount::new(prefix, target.authority(), &request);
    mount.announce(request.headers_mut(), &rest);
    let response = forward(request, target, &to).await?;
    Ok(Reply::Whole(mount.response(response).await?))
}

/// "name", "name:port", "scheme:name:port" or "scheme:name:".
fn split_name(text: &str) -> Option<(&str, &str, &str)> {
    match text.split(':').collect::<Vec<_>>().as_slice() {
        [name] => Some(("", name, "")),
        [name, port] => Some(("", name, port)),
        [scheme @ ("" | "http" | "https"), name, port] => Some((scheme, name, port)),
        _ => None,
    }
}

fn pod_port(pod: &Value, port: &str) -> Result<u16, Status> {
    let containers = meta::items(pod, "spec.containers");
    let mut ports = containers.iter().flat_map(|c| meta::items(c, "ports"));
    let found = match port {
        "" => ports.next().and_then(|p| p["containerPort"].as_u64()).or(Some(80)),
        text => text.parse().ok().or_else(|| ports.find(|p| p["name"] == text).and_then(|p| p["containerPort"].as_u64())),
    };
    found.and_then(|p| u16::try_from(p).ok()).ok_or_else(|| Status::bad_request(format!("invalid pod port {port:?}")))
}

/// An endpoint of the Service's port (by name, number, or the only one), drawn at random from its slices.
pub fn endpoint(engine: &Engine, namespace: &str, name: &str, port: &str) -> Result<(String, u16), Status> {
    let service = lookup(engine, "", "services", namespace, name).ok_or_else(|| Status::not_found("", "services", name))?;
    let ports = meta::items(&service, "spec.ports");
    let wanted = match port {
        "" => ports.first().filter(|_| ports.len() == 1),
        text => ports
            .iter()
            .find(|p| p["name"] == text)
            .or_else(|| ports.iter().find(|p| p["port"].as_u64().is_some_and(|port| text.parse() == Ok(port)))),
    };
    let unavailable = |why: String| Status::service_unavailable(why);
    let wanted = wanted.ok_or_else(|| unavailable(format!("no service port {port:?} found for service {name:?}")))?;
    let port_name = wanted["name"].as_str().unwrap_or_default();
    let mut found: Vec<(String, u16)> = Vec::new();
    for slice in admission::all(engine, "discovery.k8s.io", "endpointslices", namespace) {
        if meta::label(&slice, "kubernetes.io/service-name") != Some(name) {
            continue;
        }
        let slice_port = meta::items(&slice, "ports").iter().find(|p| p["name"].as_str().unwrap_or_default() == port_name);
        let Some(number) = slice_port.and_then(|p| u16::try_from(p["port"].as_u64()?).ok()) else { continue };
        for endpoint in meta::items(&slice, "endpoints").iter().filter(|e| e["conditions"]["ready"] != false) {
            found.extend(meta::items(endpoint, "addresses").first().and_then(Value::as_str).map(|ip| (ip.to_string(), number)));
        }
    }
    if found.is_empty() {
        return Err(unavailable(format!("no endpoints available for service {name:?}")));
    }
    Ok(found.swap_remove(rand::rng().random_range(0..found.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxy_names_carry_scheme_and_port() {
        assert_eq!(split_name("a"), Some(("", "a", "")));
        assert_eq!(split_name("a:80"), Some(("", "a", "80")));
        assert_eq!(split_name("https:a:"), Some(("https", "a", "")));
        assert_eq!(split_name("ftp:a:1"), None);
    }
}
