//! The kubelet's HTTPS API: logs, exec, attach, port-forward, stats, metrics and health of this node.
//!
//! Every request is authenticated (a certificate of the cluster's CA, or a token that the API server knows) and
//! authorized by the API server as a verb on `nodes/<subresource>`.
mod auth;
mod configz;
mod containers;
mod exec;
mod files;
mod forward;
mod log_file;
mod logs;
mod metrics;
mod route;
pub(crate) mod stats;
mod summary;
mod tls;

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use outrigger_cluster::access::Reviews;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};

use crate::Kubelet;
use crate::cri::Cri;

const HANDSHAKE: Duration = Duration::from_secs(10);
/// A request's headers have to arrive within this time.
const HEADERS: Duration = Duration::from_secs(32);
const RETRY: Duration = Duration::from_secs(1);

pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

#[derive(Clone, Debug)]
pub struct Config {
    pub node_name: String,
    /// Where to listen; the unspecified address for everywhere.
    pub address: IpAddr,
    pub port: u16,
    /// Names in the serving certificate, besides the node's name.
    pub node_ips: Vec<IpAddr>,
    /// The serving certificate is kept in `pki/` below it.
    pub data_dir: PathBuf,
    /// The CAs (DER) whose client certificates are trusted; none means tokens only.
    pub client_cas: Vec<Vec<u8>>,
    /// What `/logs/` shows.
    pub log_dir: PathBuf,
}

/// What the handlers share.
pub(crate) struct Context {
    pub config: Config,
    pub kubelet: Kubelet,
    pub cri: Cri,
    /// Other parts' metrics, in Prometheus' text format.
    pub more_metrics: Box<dyn Fn() -> String + Send + Sync>,
    pub gate: auth::Gate,
    pub rates: stats::Rates,
}

/// Starts the API; the returned task runs until it is aborted. `more_metrics` is added to `/metrics`.
pub fn start(
    config: Config,
    kubelet: Kubelet,
    reviews: Reviews,
    more_metrics: impl Fn() -> String + Send + Sync + 'static,
) -> Result<JoinHandle<()>, tls::Error> {
    let acceptor = TlsAcceptor::from(Arc::new(tls::server_config(&config)?));
    let gate = auth::Gate::new(reviews, config.node_name.clone());
    let cri = kubelet.cri().clone();
    let context = Arc::new(Context { config, kubelet, cri, more_metrics: Box::new(more_metrics), gate, rates: stats::Rates::default() });
    Ok(tokio::spawn(listen(acceptor, context)))
}

async fn listen(acceptor: TlsAcceptor, context: Arc<Context>) {
    let address = (context.config.address, context.config.port);
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => warn!(port = context.config.port, %error, "the kubelet API can't listen; trying again"),
        }
        tokio::time::sleep(RETRY).await;
    };
    info!(port = context.config.port, "kubelet API served");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve(acceptor.clone(), stream, context.clone()));
            }
            Err(error) => {
                warn!(%error, "accepting a client of the kubelet API failed");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn serve(acceptor: TlsAcceptor, stream: TcpStream, context: Arc<Context>) {
    // Without it small writes of interactive commands wait for acknowledgements.
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return debug!(%error, "TLS handshake failed"),
        Err(_) => return debug!("TLS handshake took too long"),
    };
    let peer = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).and_then(|certificate| auth::user_of(certificate));
    let service = service_fn(move |request: Request<Incoming>| {
        let (context, peer) = (context.clone(), peer.clone());
        async move { Ok::<_, Infallible>(route::handle(&context, peer, request).await) }
    });
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS);
    if let Err(error) = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await {
        debug!(%error, "connection to the kubelet API ended");
    }
}

pub(crate) fn body(content: impl Into<Bytes>) -> Body {
    Full::new(content.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A plain text answer, as most of the kubelet's are.
pub(crate) fn text(status: StatusCode, content: impl Into<String>) -> Response<Body> {
    answer(status, "text/plain; charset=utf-8", content.into())
}

pub(crate) fn answer(status: StatusCode, content_type: &'static str, content: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(body(content));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

pub(crate) fn json(content: &impl serde::Serialize) -> Response<Body> {
    match serde_json::to_vec(content) {
        Ok(content) => answer(StatusCode::OK, "application/json", content),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}
