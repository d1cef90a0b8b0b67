//! Port-forward: the agent itself dials inside the pod's network namespace.
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use outrigger_network::netns;
use outrigger_streaming::portforward::{self, Forward};
use tokio::net::TcpStream;
use tracing::debug;

use super::exec::rejected;
use super::route::Query;
use super::{Body, Context, body, containers, text};

const DIAL: Duration = Duration::from_secs(30);

pub async fn serve(
    context: &Arc<Context>,
    namespace: &str,
    name: &str,
    uid: Option<&str>,
    mut request: Request<Incoming>,
) -> Response<Body> {
    let pod = context.kubelet.pod(namespace, name).filter(|pod| uid.is_none_or(|uid| pod.metadata.uid.as_deref() == Some(uid)));
    let Some(pod) = pod else { return text(StatusCode::NOT_FOUND, "pod does not exist") };
    let network = match containers::network(&context.cri, &pod).await {
        Ok(Some(network)) => network,
        Ok(None) => return text(StatusCode::INTERNAL_SERVER_ERROR, format!("failed to find sandbox for pod {name:?}")),
        Err(error) => return text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    };
    let parameters = Query::of(request.uri()).all("port");
    let (dialect, upgrade) = match portforward::negotiate(&mut request) {
        Ok(agreed) => agreed,
        Err(rejection) => return rejected(&rejection),
    };
    let ports =
        if portforward::is_by_channels(dialect, upgrade.protocol) { portforward::channel_ports(&parameters) } else { Ok(Vec::new()) };
    let ports = match ports {
        Ok(ports) => ports,
        Err(rejection) => return rejected(&rejection),
    };
    tokio::spawn(async move {
        match portforward::accept(dialect, upgrade.protocol, upgrade.connection, &ports).await {
            Ok(mut forwards) => {
                while let Some(forward) = forwards.next().await {
                    tokio::spawn(carry(forward, network.sandbox_id.clone(), network.namespace.clone()));
                }
            }
            Err(error) => debug!(%error, "port-forward broke off"),
        }
    });
    upgrade.response.map(|()| body(""))
}

async fn carry(forward: Forward, sandbox: String, namespace: Option<PathBuf>) {
    let port = forward.port;
    let result = match dial(port, namespace.as_ref()).await {
        Ok(stream) => forward.splice(stream).await,
        Err(reason) => forward.fail(format!("error forwarding port {port} to pod {sandbox}, uid : {reason}")).await,
    };
    if let Err(error) = result {
        debug!(port, sandbox, %error, "a forwarded connection broke off");
    }
}

/// As upstream's runtimes do: first by v4, then by v6.
async fn dial(port: u16, namespace: Option<&PathBuf>) -> Result<TcpStream, String> {
    let mut reasons = Vec::new();
    for (family, address) in [("IPv4", Ipv4Addr::LOCALHOST.into()), ("IPv6", Ipv6Addr::LOCALHOST.into())] {
        let address = SocketAddr::new(address, port);
        let attempt = async {
            match namespace {
                Some(namespace) => netns::connect(namespace.clone(), address).await,
                None => TcpStream::connect(address).await,
            }
        };
        match tokio::time::timeout(DIAL, attempt).await {
            Ok(Ok(stream)) => {
                // Small replies must not wait for more.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => reasons.push(format!("{family}: dial tcp {address}: {error}")),
            Err(_) => reasons.push(format!("{family}: dial tcp {address}: i/o timeout")),
        }
    }
    let place = namespace.map_or_else(|| "host".to_owned(), |namespace| namespace.display().to_string());
    Err(format!(
        "failed to execute portforward in network namespace {place:?}: failed to connect to localhost:{port} inside namespace, {}",
        reasons.join(" ")
    ))
}
