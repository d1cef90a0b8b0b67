//! TCP: accept, connect to an endpoint (the next one when that fails), and let bytes, ends and resets through.
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::SockType;
use tokio::net::{TcpSocket, TcpStream};

use super::forward::{Listener, Service};
use super::{socket, splice, table};
use crate::sight::Reason;

const BACKLOG: u32 = 4096;
/// How long each attempt to reach an endpoint may take; the last one repeats.
const ATTEMPTS: [Duration; 4] = [Duration::from_millis(250), Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2)];
/// A pause when accepting fails for lack of something (file descriptors, memory).
const BREATH: Duration = Duration::from_millis(50);

pub(super) fn listen(service: &Arc<Service>, address: SocketAddr) -> io::Result<Listener> {
    let listener = TcpSocket::from_std_stream(socket::bound(address, SockType::Stream)?.into()).listen(BACKLOG)?;
    // The task must not keep its own Service alive: dropping that is what closes the listener.
    let service = Arc::downgrade(service);
    let task = tokio::spawn(async move {
        loop {
            let accepted = listener.accept().await;
            let Some(service) = service.upgrade() else { return };
            match accepted {
                Ok((client, peer)) => {
                    tokio::spawn(serve(service, client, peer));
                }
                Err(error) => {
                    tracing::debug!(%address, %error, "a connection was not accepted");
                    tokio::time::sleep(BREATH).await;
                }
            }
        }
    });
    Ok(Listener { task, front: None })
}

async fn serve(service: Arc<Service>, client: TcpStream, peer: SocketAddr) {
    // A connection without addresses is over already.
    let Ok(dialled) = client.local_addr() else { return };
    let ip = table::client(peer.ip(), dialled.ip());
    let parties = service.parties(peer, dialled);
    if !service.admits(ip) {
        service.refused(parties, Reason::SourceRange);
        return splice::reset(client);
    }
    let (backend, endpoint, took) = match connect(&service, ip).await {
        Ok(connected) => connected,
        Err(reason) => {
            service.refused(parties, reason);
            return splice::reset(client);
        }
    };
    let flow = service.begin(ip, parties, endpoint, Some(took));
    drop(service);
    // Small messages shouldn't wait for each other; the ends have decided on that themselves.
    for stream in [&client, &backend] {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY not set");
        }
    }
    let broken = tokio::select! {
        moved = splice::both_ways(&client, &backend, &flow.moved) => moved.is_err(),
        () = flow.end.comes() => true,
    };
    if broken {
        splice::reset(client);
        splice::reset(backend);
    }
}

/// The first endpoint that answers, and how long that one took to. A client isn't told of those that don't.
async fn connect(service: &Service, client: IpAddr) -> Result<(TcpStream, SocketAddr, Duration), Reason> {
    let mut outcome = Reason::LocalPolicy;
    for (attempt, endpoint) in service.order(client).into_iter().enumerate() {
        outcome = Reason::ConnectFailed;
        let (patience, since) = (ATTEMPTS[attempt.min(ATTEMPTS.len() - 1)], Instant::now());
        match tokio::time::timeout(patience, connect_to(endpoint, service.source(client, endpoint))).await {
            Ok(Ok(stream)) => return Ok((stream, endpoint, since.elapsed())),
            Ok(Err(error)) => tracing::debug!(%endpoint, %error, "endpoint not reached; trying the next"),
            Err(_) => tracing::debug!(%endpoint, ?patience, "endpoint doesn't answer; trying the next"),
        }
        service.failed(endpoint);
    }
    Err(outcome)
}

async fn connect_to(endpoint: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
    TcpSocket::from_std_stream(socket::from(source, endpoint, SockType::Stream)?.into()).connect(endpoint).await
}
