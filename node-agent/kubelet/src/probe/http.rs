//! One HTTP request as probes and hooks make it: no connection reuse, no verification of certificates, redirects followed on the same host.
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Pod};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::net::TcpStream;

use crate::pod::meta::{containers, init_containers};

const MAX_BODY: usize = 10 * 1024;
const MAX_REDIRECTS: usize = 10;

/// Where to and with which headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub https: bool,
    pub host: String,
    pub port: u16,
    /// Begins with `/`; may have a query.
    pub path: String,
    pub headers: Vec<(String, String)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub body: String,
    /// The last answer was a redirect to another host, which isn't followed.
    pub redirected_away: bool,
}

/// A port by number, or by the name that one of the container's ports has.
pub fn port_number(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => i64::from(*number),
        IntOrString::String(name) => match container.ports.iter().flatten().find(|port| port.name.as_deref() == Some(name)) {
            Some(port) => i64::from(port.container_port),
            None => name.parse().map_err(|_| format!("couldn't find port {name:?} in container {:?}", container.name))?,
        },
    };
    u16::try_from(number).ok().filter(|number| *number > 0).ok_or_else(|| format!("invalid port number: {number}"))
}

impl Target {
    pub fn from_action(action: &HTTPGetAction, _pod: &Pod, container: &Container, pod_ip: &str) -> Result<Self, String> {
        let host = action.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(pod_ip);
        let path = action.path.as_deref().unwrap_or_default();
        Ok(Self {
            https: action.scheme.as_deref() == Some("HTTPS"),
            host: host.to_owned(),
            port: port_number(&action.port, container)?,
            path: if path.starts_with('/') { path.to_owned() } else { format!("/{path}") },
            headers: action.http_headers.iter().flatten().map(|header| (header.name.clone(), header.value.clone())).collect(),
        })
    }

    fn authority(&self) -> String {
        if self.host.contains(':') { format!("[{}]:{}", self.host, self.port) } else { format!("{}:{}", self.host, self.port) }
    }

    pub fn url(&self) -> String {
        format!("{}://{}{}", if self.https { "https" } else { "http" }, self.authority(), self.path)
    }
}

/// The container that a probe's port name is looked up in.
pub fn owner<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    containers(pod).iter().chain(init_containers(pod)).find(|container| container.name == name)
}

/// The error is what a Go program would print.
pub async fn get(target: &Target, user_agent: &str, limit: Duration) -> Result<Answer, String> {
    match tokio::time::timeout(limit, follow(target, user_agent)).await {
        Ok(result) => result,
        Err(_) => Err(format!("Get \"{}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)", target.url())),
    }
}

async fn follow(target: &Target, user_agent: &str) -> Result<Answer, String> {
    let mut target = target.clone();
    for _ in 0..=MAX_REDIRECTS {
        let (answer, location) = request(&target, user_agent).await.map_err(|error| format!("Get \"{}\": {error}", target.url()))?;
        let Some(location) = location else { return Ok(answer) };
        match redirect(&target, &location) {
            Some(next) => target = next,
            None => return Ok(Answer { redirected_away: true, ..answer }),
        }
    }
    Err(format!("Get \"{}\": stopped after {MAX_REDIRECTS} redirects", target.url()))
}

/// `None` when the new place is on another host.
fn redirect(from: &Target, location: &str) -> Option<Target> {
    let uri: Uri = location.parse().ok()?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let Some(host) = uri.host() else {
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        return Some(Target { path, ..from.clone() });
    };
    let host = host.trim_matches(['[', ']']);
    if host != from.host {
        return None;
    }
    let https = uri.scheme_str().map_or(from.https, |scheme| scheme == "https");
    let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
    Some(Target { https, port, path: path.to_owned(), ..from.clone() })
}

async fn request(target: &Target, user_agent: &str) -> Result<(Answer, Option<String>), String> {
    let authority = target.authority();
    let stream = TcpStream::connect(&authority).await.map_err(|error| dial_error(&authority, &error))?;
    if target.https {
        let name = rustls::pki_types::ServerName::try_from(target.host.clone()).map_err(|error| error.to_string())?;
        let connector = tokio_rustls::TlsConnector::from(TLS.clone());
        let stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
        exchange(target, user_agent, TokioIo::new(stream)).await
    } else {
        exchange(target, user_agent, TokioIo::new(stream)).await
    }
}

/// `dial tcp 10.0.0.1:80: connect: connection refused`
pub fn dial_error(address: &str, error: &std::io::Error) -> String {
    let text = match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
        std::io::ErrorKind::HostUnreachable => "connect: no route to host".to_owned(),
        std::io::ErrorKind::NetworkUnreachable => "connect: network is unreachable".to_owned(),
        _ => error.to_string(),
    };
    format!("dial tcp {address}: {text}")
}

async fn exchange<S>(target: &Target, user_agent: &str, stream: S) -> Result<(Answer, Option<String>), String>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.map_err(|error| error.to_string())?;
    let driver = tokio::spawn(connection);
    let request = build(target, user_agent)?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string());
    let outcome = match response {
        Ok(response) => read(response).await,
        Err(error) => Err(error),
    };
    driver.abort();
    outcome
}

fn build(target: &Target, user_agent: &str) -> Result<Request<Empty<Bytes>>, String> {
    let mut request = Request::get(&target.path).body(Empty::new()).map_err(|error| error.to_string())?;
    let headers = request.headers_mut();
    let value = |text: &str| HeaderValue::from_str(text).map_err(|error| error.to_string());
    for (name, text) in &target.headers {
        let name: HeaderName = name.parse().map_err(|error: http::header::InvalidHeaderName| error.to_string())?;
        headers.append(name, value(text)?);
    }
    if !headers.contains_key(header::HOST) {
        headers.insert(header::HOST, value(&target.authority())?);
    }
    // An empty value given by the user takes the header away.
    for (name, default) in [(header::USER_AGENT, user_agent), (header::ACCEPT, "*/*")] {
        match headers.get(&name).map(HeaderValue::is_empty) {
            Some(true) => drop(headers.remove(&name)),
            Some(false) => {}
            None => drop(headers.insert(name, value(default)?)),
        }
    }
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    Ok(request)
}

async fn read(response: http::Response<hyper::body::Incoming>) -> Result<(Answer, Option<String>), String> {
    let status = response.status();
    let redirects = [
        StatusCode::MOVED_PERMANENTLY,
        StatusCode::FOUND,
        StatusCode::SEE_OTHER,
        StatusCode::TEMPORARY_REDIRECT,
        StatusCode::PERMANENT_REDIRECT,
    ];
    let location = response.headers().get(header::LOCATION).filter(|_| redirects.contains(&status));
    let location = location.and_then(|value| value.to_str().ok()).map(str::to_owned);
    // A body that is too long is no failure, as upstream reads its first part only.
    let body = Limited::new(response.into_body(), MAX_BODY).collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    Ok((Answer { status: status.as_u16(), body: String::from_utf8_lossy(&body).into_owned(), redirected_away: false }, location))
}

static TLS: LazyLock<Arc<rustls::ClientConfig>> = LazyLock::new(|| {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("ring supports the default versions");
    let config = builder.dangerous().with_custom_certificate_verifier(Arc::new(TrustEverything(provider))).with_no_client_auth();
    Arc::new(config)
});

/// Probes ask whether somebody answers, not who: upstream doesn't verify either.
#[derive(Debug)]
struct TrustEverything(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for TrustEverything {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> Target {
        Target { https: false, host: "10.0.0.1".into(), port: 8080, path: "/a?b".into(), headers: vec![("X-A".into(), "1".into())] }
    }

    #[test]
    fn redirects_stay_on_the_host() {
        assert_eq!(redirect(&target(), "/new").map(|target| target.url()).as_deref(), Some("http://10.0.0.1:8080/new"));
        assert_eq!(redirect(&target(), "https://10.0.0.1/x").map(|target| target.url()).as_deref(), Some("https://10.0.0.1:443/x"));
        assert_eq!(redirect(&target(), "http://example.com/"), None);
    }

    #[test]
    fn headers_can_be_set_and_taken_away() {
        let mut target = target();
        target.headers = vec![("Host".into(), "web".into()), ("Accept".into(), String::new())];
        let request = build(&target, "kube-probe/1.35").unwrap();
        assert_eq!(request.headers()["host"], "web");
        assert!(!request.headers().contains_key("accept"));
        assert_eq!(request.headers()["user-agent"], "kube-probe/1.35");
    }
}
