//! The HTTPS front: bound listeners in, HTTP/1.1 and HTTP/2 by ALPN, client certificates verified against the cluster's CA when given.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use crate::body::{ReqBody, boxed};
use crate::engine::Engine;
use crate::error::StartError;

/// What the connection itself says about its peer; put into each request's extensions.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    pub addr: Option<SocketAddr>,
    /// The client's certificate chain (DER), verified against the CA; empty when none was sent.
    pub certificates: Vec<CertificateDer<'static>>,
}

/// TLS with the server's own certificate; `clients` decides which client certificates may be shown.
pub fn tls_config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    clients: Arc<dyn ClientCertVerifier>,
) -> Result<Arc<ServerConfig>, StartError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Serves until `stop` turns true, then lets requests under way end (watches are cut after a short grace).
pub async fn serve(engine: Arc<Engine>, tls: Arc<ServerConfig>, listeners: Vec<TcpListener>, stop: watch::Receiver<bool>) {
    let graceful = Arc::new(GracefulShutdown::new());
    let mut accepting = tokio::task::JoinSet::new();
    for listener in listeners {
        accepting.spawn(accept(listener, engine.clone(), TlsAcceptor::from(tls.clone()), graceful.clone(), stop.clone()));
    }
    while accepting.join_next().await.is_some() {}
    if let Some(graceful) = Arc::into_inner(graceful) {
        tokio::select! {
            () = graceful.shutdown() => {}
            () = tokio::time::sleep(Duration::from_secs(2)) => {}
        }
    }
}

async fn accept(
    listener: TcpListener,
    engine: Arc<Engine>,
    acceptor: TlsAcceptor,
    graceful: Arc<GracefulShutdown>,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = async { drop(stop.wait_for(|stopped| *stopped).await) } => return,
        };
        match accepted {
            Ok((stream, addr)) => {
                let watcher = graceful.watcher();
                tokio::spawn(connection(stream, addr, acceptor.clone(), engine.clone(), watcher));
            }
            Err(error) => {
                // Out of file descriptors or an aborted handshake: neither may end the listener.
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(
    stream: TcpStream,
    addr: SocketAddr,
    acceptor: TlsAcceptor,
    engine: Arc<Engine>,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(Duration::from_secs(10), acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%addr, %error, "TLS handshake failed"),
        Err(_) => return tracing::debug!(%addr, "TLS handshake timed out"),
    };
    let certificates =
        stream.get_ref().1.peer_certificates().map(|chain| chain.iter().map(|c| c.clone().into_owned()).collect()).unwrap_or_default();
    let peer = Arc::new(Peer { addr: Some(addr), certificates });
    let service = hyper::service::service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
        let engine = engine.clone();
        request.extensions_mut().insert(peer.clone());
        async move { Ok::<_, std::convert::Infallible>(engine.handle(request.map(|b| -> ReqBody { boxed(b) })).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new());
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(1000).keep_alive_interval(Some(Duration::from_secs(30)));
    let served = watcher.watch(builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned());
    if let Err(error) = served.await {
        tracing::debug!(%addr, %error, "connection ended");
    }
}
