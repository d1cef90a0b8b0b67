//! Calling webhooks of admission and conversion: an HTTPS POST of one JSON object, to a URL or to an endpoint of a Service.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, HOST, HeaderValue, USER_AGENT};
use http::{Method, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use outrigger_api::{Status, meta};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;

use crate::body::{Request, boxed, full, read};
use crate::engine::Engine;
use crate::proxy::forward::{Target, connect, endpoint};
use crate::proxy::{Trust, client_tls, system_roots};

/// Why a webhook gave no answer.
#[derive(Debug)]
pub struct CallError {
    pub reason: String,
}

impl From<String> for CallError {
    fn from(reason: String) -> Self {
        Self { reason }
    }
}

/// Where a `clientConfig` points.
struct Address {
    host: String,
    port: u16,
    path: String,
    /// Namespace and name when it is a Service.
    service: Option<(String, String)>,
}

impl Address {
    fn of(config: &Value) -> Result<Self, CallError> {
        let service = &config["service"];
        if service.is_object() {
            let (namespace, name) = (meta::text(service, "namespace"), meta::text(service, "name"));
            return Ok(Self {
                host: format!("{name}.{namespace}.svc"),
                port: service["port"].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap_or(443),
                path: rooted(meta::text(service, "path")),
                service: Some((namespace.into(), name.into())),
            });
        }
        let url = meta::text(config, "url");
        if url.is_empty() {
            return Err("webhook configuration must have either service or URL".to_string().into());
        }
        let parsed: Uri = url.parse().map_err(|error| format!("Unparsable URL: {error}"))?;
        let host = parsed.host().unwrap_or_default().trim_matches(['[', ']']).to_string();
        Ok(Self { host, port: parsed.port_u16().unwrap_or(443), path: rooted(parsed.path()), service: None })
    }

    fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.service.is_none() && self.port == 443 { host } else { format!("{host}:{}", self.port) }
    }

    /// The socket to dial: an endpoint of the Service, or the URL's host.
    fn resolve(&self, engine: &Engine) -> Result<(String, u16), CallError> {
        match &self.service {
            None => Ok((self.host.clone(), self.port)),
            Some((namespace, name)) => {
                endpoint(engine, namespace, name, &self.port.to_string()).map_err(|status| CallError { reason: status.message })
            }
        }
    }
}

fn rooted(path: &str) -> String {
    if path.starts_with('/') { path.to_string() } else { format!("/{path}") }
}

/// Posts `body` and returns the JSON object answered. The limit is told to the webhook, too.
pub async fn post(engine: &Engine, config: &Value, body: &Value, limit: Duration) -> Result<Value, CallError> {
    let address = Address::of(config)?;
    let path = format!("{}?timeout={}s", address.path, limit.as_secs());
    let url = format!("https://{}{path}", address.authority());
    let bytes = crate::cache::encode(body);
    match tokio::time::timeout(limit, exchange(engine, config, &address, &path, bytes)).await {
        Ok(Ok((code, answer))) => decode(code, &answer),
        Ok(Err(error)) => Err(format!("Post {url:?}: {}", error.reason).into()),
        Err(_) => Err(format!("Post {url:?}: context deadline exceeded").into()),
    }
}

async fn exchange(engine: &Engine, config: &Value, address: &Address, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), CallError> {
    let (host, port) = address.resolve(engine)?;
    let target = Target { host, port, tls: Some(trust(meta::text(config, "caBundle"))?), server_name: Some(address.host.clone()) };
    let stream = connect(&target).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(text)?;
    tokio::spawn(connection);
    let response = sender.send_request(request(&address.authority(), path, body)?).await.map_err(text)?;
    let code = response.status();
    match read(boxed(response.into_body())).await {
        Ok(bytes) => Ok((code, bytes)),
        Err(_) => Err("the answer cannot be read".to_string().into()),
    }
}

fn request(authority: &str, path: &str, body: Bytes) -> Result<Request, CallError> {
    let json = HeaderValue::from_static("application/json");
    let mut request = Request::new(full(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = path.parse().map_err(|error| CallError { reason: format!("{error}") })?;
    let headers = request.headers_mut();
    headers.insert(HOST, HeaderValue::from_str(authority).map_err(text)?);
    headers.insert(CONTENT_TYPE, json.clone());
    headers.insert(ACCEPT, json);
    headers.insert(USER_AGENT, HeaderValue::from_static("kube-apiserver-admission"));
    Ok(request)
}

fn text(error: impl std::fmt::Display) -> CallError {
    CallError { reason: error.to_string() }
}

/// Trust in the bundle's certificates alone, or without one in the system's.
fn trust(bundle: &str) -> Result<Arc<ClientConfig>, CallError> {
    let bundle = STANDARD.decode(bundle).map_err(|error| format!("unable to load root certificates: {error}"))?;
    let mut roots = RootCertStore::empty();
    if bundle.trim_ascii().is_empty() {
        roots.add_parsable_certificates(system_roots());
    } else {
        let certificates = CertificateDer::pem_slice_iter(&bundle).flatten();
        if roots.add_parsable_certificates(certificates).0 == 0 {
            return Err("unable to load root certificates: unable to parse bytes as PEM block".to_string().into());
        }
    }
    client_tls(Trust::Only(roots), None).map(Arc::new).map_err(text)
}

/// An answer's object; answers of other codes become the errors that client-go makes of them.
fn decode(code: StatusCode, body: &[u8]) -> Result<Value, CallError> {
    let value: Option<Value> = serde_json::from_slice(body).ok().filter(Value::is_object);
    if code.is_success() {
        let error = || format!("couldn't get version/kind; json parse error in {:?}", String::from_utf8_lossy(body));
        return value.ok_or_else(|| error().into());
    }
    if let Some(status) = value.filter(|value| meta::kind(value) == "Status") {
        return Err(meta::text(&status, "message").to_string().into());
    }
    let body = String::from_utf8_lossy(body);
    Err(match code.as_u16() {
        400 => "the server rejected our request for an unknown reason".to_string(),
        401 => "the server has asked for the client to provide credentials".to_string(),
        403 => body.trim().to_string(),
        404 => Status::path_not_found().message,
        405 => "the server does not allow this method on the requested resource".to_string(),
        500.. => format!("an error on the server ({:?}) has prevented the request from succeeding", body.trim()),
        code => format!("the server responded with the status code {code} but did not return more information"),
    }
    .into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn addresses_are_read_from_services_and_urls() {
        let of = |config: Value| Address::of(&config).map(|a| (a.host.clone(), a.port, a.path.clone(), a.authority()));
        let text = |a: &str, port: u16, b: &str, c: &str| (a.to_string(), port, b.to_string(), c.to_string());
        assert_eq!(
            of(json!({"service": {"name": "a", "namespace": "n", "path": "/x"}})).unwrap(),
            text("a.n.svc", 443, "/x", "a.n.svc:443")
        );
        assert_eq!(of(json!({"url": "https://h.io/y"})).unwrap(), text("h.io", 443, "/y", "h.io"));
        assert_eq!(of(json!({"url": "https://[::1]:8443"})).unwrap(), text("::1", 8443, "/", "[::1]:8443"));
        assert!(of(json!({})).is_err());
    }

    #[test]
    fn failures_are_told_as_client_go_tells_them() {
        let reason = |code: u16, body: &str| decode(StatusCode::from_u16(code).unwrap(), body.as_bytes()).unwrap_err().reason;
        assert_eq!(reason(404, "404 page not found"), "the server could not find the requested resource");
        assert_eq!(reason(500, "boom\n"), "an error on the server (\"boom\") has prevented the request from succeeding");
        assert_eq!(reason(409, r#"{"kind": "Status", "message": "no"}"#), "no");
        assert!(decode(StatusCode::OK, b"{}").is_ok() && decode(StatusCode::OK, b"[]").is_err());
    }

    #[test]
    fn a_bundle_must_hold_certificates() {
        assert!(trust(&STANDARD.encode("nonsense")).is_err());
        assert!(trust("").is_ok());
    }
}
