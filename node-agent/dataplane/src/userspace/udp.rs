//! UDP: a flow per client, each with a socket of its own towards its endpoint, ended by silence.
use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use nix::sys::socket::SockType;
use tokio::net::UdpSocket;

use super::forward::{End, Listener, Service};
use super::sight::Moved;
use super::{socket, table};
use crate::sight::Reason;

/// A flow without a datagram for this long is over; conntrack's time for a flow that had answers.
const SILENCE: Duration = Duration::from_secs(120);
const LARGEST: usize = 65535;

thread_local! {
    /// Datagrams are passed on at once, so one buffer per thread is enough for any number of flows.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; LARGEST].into_boxed_slice());
}

type Flows = Arc<Mutex<HashMap<SocketAddr, Known>>>;

/// What a client's next datagram has to know of its flow.
#[derive(Clone)]
struct Known {
    back: Arc<UdpSocket>,
    moved: Arc<Moved>,
    end: Arc<End>,
}

pub(super) fn listen(service: &Arc<Service>, address: SocketAddr) -> io::Result<Listener> {
    let front = Arc::new(UdpSocket::from_std(socket::bound(address, SockType::Datagram)?.into())?);
    let (service, shared) = (Arc::downgrade(service), front.clone());
    let task = tokio::spawn(async move {
        let flows = Flows::default();
        loop {
            if front.readable().await.is_err() {
                return;
            }
            let Some(service) = service.upgrade() else { return };
            // Errors are ICMP answers of clients that are gone, and wake-ups for nothing.
            while let Ok(()) = pass_on(&service, &front, &flows) {}
        }
    });
    Ok(Listener { task, front: Some(shared) })
}

/// One datagram from a client to its flow's endpoint.
fn pass_on(service: &Arc<Service>, front: &Arc<UdpSocket>, flows: &Flows) -> io::Result<()> {
    BUFFER.with_borrow_mut(|buffer| {
        let (length, client) = front.try_recv_from(buffer)?;
        let datagram = &buffer[..length];
        let known = flows.lock().unwrap_or_else(PoisonError::into_inner).get(&client).cloned();
        let Known { back, moved, .. } = match known {
            Some(known) if !known.end.has_come() => known,
            _ => {
                if let Err(error) = open(service, front, flows, client, datagram) {
                    tracing::debug!(%client, %error, "no UDP flow begun");
                }
                return Ok(());
            }
        };
        // A full socket loses datagrams, as a full queue on the wire would.
        if back.try_send(datagram).is_ok() {
            moved.sent.fetch_add(length as u64, Ordering::Relaxed);
        }
        Ok(())
    })
}

fn open(service: &Arc<Service>, front: &Arc<UdpSocket>, flows: &Flows, client: SocketAddr, datagram: &[u8]) -> io::Result<()> {
    let dialled = front.local_addr()?;
    let (ip, parties) = (table::client(client.ip(), dialled.ip()), service.parties(client, dialled));
    if !service.admits(ip) {
        service.refused(parties, Reason::SourceRange);
        return Ok(());
    }
    let Some(endpoint) = service.order(ip).first().copied() else {
        service.refused(parties, Reason::LocalPolicy);
        return Ok(());
    };
    let socket = std::net::UdpSocket::from(socket::from(service.source(ip, endpoint), endpoint, SockType::Datagram)?);
    socket.connect(endpoint)?;
    // The runtime doesn't know yet that it can be written to.
    socket.send(datagram)?;
    let back = Arc::new(UdpSocket::from_std(socket)?);
    let flow = service.begin(ip, parties, endpoint, None);
    flow.moved.sent.fetch_add(datagram.len() as u64, Ordering::Relaxed);
    let known = Known { back: back.clone(), moved: flow.moved.clone(), end: flow.end.clone() };
    flows.lock().unwrap_or_else(PoisonError::into_inner).insert(client, known);
    // The front is the listener's: when that closes, the kernel has to refuse the client's next datagram.
    let (front, flows) = (Arc::downgrade(front), flows.clone());
    tokio::spawn(async move {
        tokio::select! {
            () = answer(&front, &back, client, &flow.moved) => {}
            () = flow.end.comes() => {}
        }
        let mut flows = flows.lock().unwrap_or_else(PoisonError::into_inner);
        // The client may have begun another meanwhile.
        if flows.get(&client).is_some_and(|other| Arc::ptr_eq(&other.back, &back)) {
            flows.remove(&client);
        }
    });
    Ok(())
}

/// Passes the endpoint's datagrams back to the client until there are none for long, or the endpoint is not there.
async fn answer(front: &Weak<UdpSocket>, back: &UdpSocket, client: SocketAddr, moved: &Moved) {
    loop {
        match tokio::time::timeout(SILENCE, back.readable()).await {
            Err(_) | Ok(Err(_)) => return,
            Ok(Ok(())) => {}
        }
        let Some(front) = front.upgrade() else { return };
        let passed = BUFFER.with_borrow_mut(|buffer| {
            let length = back.try_recv(buffer)?;
            if front.try_send_to(&buffer[..length], client).is_ok() {
                moved.received.fetch_add(length as u64, Ordering::Relaxed);
            }
            Ok::<(), io::Error>(())
        });
        match passed {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
            _ => {}
        }
    }
}
