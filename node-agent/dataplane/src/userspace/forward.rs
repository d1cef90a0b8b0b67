//! One frontend's listeners and live flows, and what they share.
use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outrigger_desired::{Entry, Protocol, ServicePortName};
use tokio::net::UdpSocket;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::routes::{Lease, Routes};
use super::sight::{Moved, Parties, Sight};
use super::table::{self, Inside};
use super::transparent;
use crate::backend::Live;
use crate::sight::Reason;

/// Which endpoint each client had last, by Service port.
#[derive(Default)]
pub(super) struct Affinities(Mutex<HashMap<(ServicePortName, Protocol, IpAddr), Sticky>>);

#[derive(Clone, Copy)]
struct Sticky {
    endpoint: SocketAddr,
    until: Instant,
}

impl Affinities {
    pub fn is_empty(&self) -> bool {
        lock(&self.0).is_empty()
    }

    pub fn sweep(&self, now: Instant) {
        lock(&self.0).retain(|_, sticky| sticky.until > now);
    }
}

/// The task that takes new flows, and the socket that it shares with the flows that live (UDP).
pub(super) struct Listener {
    pub task: JoinHandle<()>,
    pub front: Option<Arc<UdpSocket>>,
}

impl Listener {
    /// Resolves when its socket is closed, so that the kernel refuses what comes then.
    pub async fn close(self) {
        self.task.abort();
        // It was cancelled, which is what was asked for.
        let _ = self.task.await;
    }
}

/// What all Services have in common.
#[derive(Default)]
pub(super) struct Shared {
    pub affinities: Affinities,
    pub sight: Sight,
    /// Endpoints see their clients' addresses.
    pub transparent: bool,
}

pub(super) struct Service {
    protocol: Protocol,
    shared: Arc<Shared>,
    aim: Mutex<Aim>,
    listeners: Mutex<HashMap<SocketAddr, Listener>>,
    /// Fronts of listeners that closed, while their flows still have answers to pass on.
    kept: Mutex<Vec<Arc<UdpSocket>>>,
    route: Mutex<Option<Arc<Lease>>>,
    flows: Mutex<Flows>,
}

/// Where new flows go.
#[derive(Clone)]
struct Aim {
    entry: Arc<Entry>,
    inside: Arc<Inside>,
}

#[derive(Default)]
struct Flows {
    next: u64,
    live: HashMap<u64, (Parties, SocketAddr, Arc<End>)>,
    /// How many of them each endpoint has.
    open: HashMap<SocketAddr, usize>,
}

/// The end of a flow, when it isn't the flow's own.
#[derive(Default)]
pub(super) struct End {
    over: AtomicBool,
    told: Notify,
}

impl End {
    fn come(&self) {
        self.over.store(true, Ordering::Release);
        self.told.notify_one();
    }

    pub fn has_come(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// To be waited for by one task.
    pub async fn comes(&self) {
        self.told.notified().await;
    }
}

/// A live flow's entry in its Service's list; gone with it.
pub(super) struct Flow {
    service: Arc<Service>,
    id: u64,
    name: ServicePortName,
    parties: Parties,
    endpoint: SocketAddr,
    since: Instant,
    pub moved: Arc<Moved>,
    pub end: Arc<End>,
    _route: Option<Arc<Lease>>,
}

impl Drop for Flow {
    fn drop(&mut self) {
        let Self { service, id, name, parties, endpoint, since, moved, .. } = self;
        service.forget(*id, *endpoint);
        service.shared.sight.closed(name, *parties, *endpoint, moved, since.elapsed());
    }
}

impl Service {
    pub fn new(entry: Entry, protocol: Protocol, shared: Arc<Shared>) -> Self {
        let aim = Mutex::new(Aim { entry: Arc::new(entry), inside: Arc::default() });
        Self {
            protocol,
            shared,
            aim,
            listeners: Mutex::default(),
            kept: Mutex::default(),
            route: Mutex::default(),
            flows: Mutex::default(),
        }
    }

    pub fn live(&self) -> Vec<Live> {
        let live = |(parties, backend, _): &(Parties, SocketAddr, Arc<End>)| {
            let Parties { protocol, client, frontend } = *parties;
            Live { protocol, source: Some(client), frontend, backend: *backend }
        };
        lock(&self.flows).live.values().map(live).collect()
    }

    pub fn parties(&self, client: SocketAddr, frontend: SocketAddr) -> Parties {
        Parties { protocol: self.protocol.number(), client, frontend }
    }

    /// A client that gets no endpoint.
    pub fn refused(&self, parties: Parties, reason: Reason) {
        self.shared.sight.refused(&self.entry().service, parties, reason);
    }

    pub fn failed(&self, endpoint: SocketAddr) {
        self.shared.sight.failed(&self.entry().service, endpoint);
    }

    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    pub fn entry(&self) -> Arc<Entry> {
        lock(&self.aim).entry.clone()
    }

    pub fn update(&self, entry: Entry, inside: Arc<Inside>) {
        *lock(&self.aim) = Aim { entry: Arc::new(entry), inside };
    }

    pub fn hold_route(&self, routes: &Arc<Routes>, ip: IpAddr) -> io::Result<()> {
        let mut route = lock(&self.route);
        if route.is_none() {
            *route = Some(Arc::new(routes.hold(ip)?));
        }
        Ok(())
    }

    pub fn listens(&self, address: SocketAddr) -> bool {
        lock(&self.listeners).contains_key(&address)
    }

    pub fn opened(&self, address: SocketAddr, listener: Listener) {
        lock(&self.listeners).insert(address, listener);
    }

    /// The listeners elsewhere than at `wanted`, to be closed.
    pub fn others(&self, wanted: &[SocketAddr]) -> Vec<Listener> {
        lock(&self.listeners).extract_if(|address, _| !wanted.contains(address)).map(|(_, listener)| listener).collect()
    }

    /// Takes no new flows any more; returns the listeners, to be closed. Those flows that live keep this value, and with it the
    /// route, until they end.
    pub fn retire(&self) -> Vec<Listener> {
        let listeners = self.others(&[]);
        *lock(&self.kept) = listeners.iter().filter_map(|listener| listener.front.clone()).collect();
        listeners
    }

    pub fn admits(&self, client: IpAddr) -> bool {
        let Aim { entry, inside } = lock(&self.aim).clone();
        table::admits(&entry, &inside, client)
    }

    /// Whose name to connect to an endpoint in, when not the node's.
    pub fn source(&self, client: IpAddr, endpoint: SocketAddr) -> Option<IpAddr> {
        let Aim { entry, inside } = lock(&self.aim).clone();
        if self.shared.transparent { transparent::source(&entry, &inside, client, endpoint.ip()) } else { None }
    }

    /// The endpoints to try for a new flow, best first.
    pub fn order(&self, client: IpAddr) -> Vec<SocketAddr> {
        let Aim { entry, inside } = lock(&self.aim).clone();
        let sticky = entry.affinity.and_then(|_| {
            let known = lock(&self.shared.affinities.0).get(&(entry.service.clone(), self.protocol, client)).copied();
            known.filter(|sticky| sticky.until > Instant::now()).map(|sticky| sticky.endpoint)
        });
        let flows = lock(&self.flows);
        table::order(&entry, &inside, client, sticky, random(), |endpoint| flows.open.get(endpoint).copied().unwrap_or(0))
    }

    /// A flow has got through to an endpoint, over TCP by a connect that took so long.
    pub fn begin(self: &Arc<Self>, ip: IpAddr, parties: Parties, endpoint: SocketAddr, took: Option<Duration>) -> Flow {
        let entry = self.entry();
        if let Some(timeout) = entry.affinity {
            let sticky = Sticky { endpoint, until: Instant::now() + timeout };
            lock(&self.shared.affinities.0).insert((entry.service.clone(), self.protocol, ip), sticky);
        }
        self.shared.sight.opened(&entry.service, parties, endpoint, took);
        let end = Arc::new(End::default());
        let mut flows = lock(&self.flows);
        let id = flows.next;
        flows.next += 1;
        flows.live.insert(id, (parties, endpoint, end.clone()));
        *flows.open.entry(endpoint).or_default() += 1;
        let (name, since, route) = (entry.service.clone(), Instant::now(), lock(&self.route).clone());
        Flow { service: self.clone(), id, name, parties, endpoint, since, moved: Arc::default(), end, _route: route }
    }

    fn forget(&self, flow: u64, endpoint: SocketAddr) {
        let mut flows = lock(&self.flows);
        flows.live.remove(&flow);
        if let MapEntry::Occupied(mut open) = flows.open.entry(endpoint) {
            *open.get_mut() -= 1;
            if *open.get() == 0 {
                open.remove();
            }
        }
    }

    /// Ends the flows to an endpoint that is gone; returns how many.
    pub fn end(&self, endpoint: SocketAddr) -> usize {
        let flows = lock(&self.flows);
        let dead = flows.live.values().filter(|(_, other, _)| *other == endpoint);
        dead.map(|(_, _, end)| end.come()).count()
    }

    pub fn end_all(&self) {
        lock(&self.flows).live.values().for_each(|(_, _, end)| end.come());
    }
}

/// Fair enough for a choice among endpoints: the hasher is seeded by the system and changes with every use.
fn random() -> usize {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish() as usize
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
