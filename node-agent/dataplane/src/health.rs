//! What load balancers ask at the healthCheckNodePort of a Service with externalTrafficPolicy Local: whether this node has endpoints of
//! it. Answered from this process alone, so also while the API server is away.
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use foldhash::HashMap;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use outrigger_desired::{HealthCheck, ServiceName};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::namespace;
use crate::proxy::Health;

const BACKLOG: u32 = 128;
/// A pause when accepting fails for lack of something (file descriptors, memory).
const BREATH: Duration = Duration::from_millis(50);
const WEIGHT: &str = "x-load-balancing-endpoint-weight";

type Page = Response<String>;

/// What one Service's load balancer is told.
fn of_service(name: &ServiceName, local: usize, healthy: bool) -> Page {
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{}\",\n\t\t\"name\": \"{}\"\n\t}},\n\t\"localEndpoints\": {local},\n\t\"serviceProxyHealthy\": {healthy}\n}}",
        name.namespace(),
        name.name()
    );
    let mut page = Response::new(body);
    *page.status_mut() = if local != 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = page.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(WEIGHT, HeaderValue::from(local));
    page
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        // IPv4's own listener has its own answer to whether it could be opened.
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Ipv6V6Only, &true)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn answer(listener: TcpListener, respond: impl Fn() -> Page + Clone + Send + 'static) {
    let mut connections = JoinSet::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "a health check was not accepted");
                    tokio::time::sleep(BREATH).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
        };
        let respond = respond.clone();
        let service = service_fn(move |_: Request<Incoming>| {
            let page = respond();
            async move { Ok::<_, Infallible>(page) }
        });
        // What a client does to its own connection is nobody else's affair.
        connections
            .spawn(async move { _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await });
    }
}

/// The listeners of healthCheckNodePorts.
pub(crate) struct Checks {
    nodeport_addresses: Vec<IpNet>,
    health: watch::Receiver<Health>,
    open: HashMap<ServiceName, Open>,
}

struct Open {
    port: u16,
    local: Arc<AtomicUsize>,
    /// Dropping it closes listeners and connections.
    _tasks: JoinSet<()>,
}

impl Checks {
    pub fn new(nodeport_addresses: &[IpNet], health: watch::Receiver<Health>) -> Self {
        Self { nodeport_addresses: nodeport_addresses.to_vec(), health, open: HashMap::default() }
    }

    /// Opens what is wanted, closes the rest. A port that somebody else has is tried again at the next change.
    pub fn settle(&mut self, wanted: &HashMap<ServiceName, HealthCheck>) {
        self.open.retain(|name, open| wanted.get(name).is_some_and(|check| check.port == open.port));
        for (name, check) in wanted {
            if let Some(open) = self.open.get(name) {
                open.local.store(check.local_endpoints, Ordering::Relaxed);
                continue;
            }
            match self.open(name, check) {
                Ok(open) => _ = self.open.insert(name.clone(), open),
                Err(error) => tracing::warn!(service = %name, port = check.port, %error, "healthCheckNodePort not served"),
            }
        }
    }

    fn open(&self, name: &ServiceName, check: &HealthCheck) -> io::Result<Open> {
        let local = Arc::new(AtomicUsize::new(check.local_endpoints));
        let mut tasks = JoinSet::new();
        for ip in self.addresses()? {
            let listener = match listen(SocketAddr::new(ip, check.port)) {
                // A node without IPv6.
                Err(error) if ip.is_ipv6() && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => continue,
                listener => listener?,
            };
            let (name, local, health) = (name.clone(), local.clone(), self.health.clone());
            tasks.spawn(answer(listener, move || {
                let healthy = health.borrow().is_healthy(SystemTime::now());
                of_service(&name, local.load(Ordering::Relaxed), healthy)
            }));
        }
        Ok(Open { port: check.port, local, _tasks: tasks })
    }

    /// Where node ports answer, since that is where load balancers look.
    fn addresses(&self) -> io::Result<Vec<IpAddr>> {
        if self.nodeport_addresses.is_empty() {
            return Ok(vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()]);
        }
        let own = namespace::addresses()?.into_iter().map(|address| address.ip);
        Ok(own.filter(|ip| self.nodeport_addresses.iter().any(|net| net.contains(ip))).collect())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_service_without_endpoints_here_is_unavailable() {
        let name = ServiceName::new("ns", "web");
        for (local, healthy, status) in [(2, true, 200), (0, true, 503), (2, false, 503)] {
            let page = of_service(&name, local, healthy);
            assert_eq!(page.status(), status);
            assert_eq!(page.headers()[WEIGHT], local.to_string());
            let body: Value = serde_json::from_str(page.body()).unwrap();
            let expected = json!({"service": {"namespace": "ns", "name": "web"}, "localEndpoints": local, "serviceProxyHealthy": healthy});
            assert_eq!(body, expected);
        }
    }
}
