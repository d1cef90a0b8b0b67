//! What the forwarder counts and tells: it sees every connection itself.
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outrigger_desired::{ServicePortName, Table};
use outrigger_logic::sight::bucket;

use crate::sight::{Counted, Counts, Event, Reason, Traffic, What};

/// A listener that doesn't come for them loses the events beyond these.
const MAX_EVENTS: usize = 1 << 14;

/// The bytes that a flow has moved.
#[derive(Debug, Default)]
pub(super) struct Moved {
    /// Towards the backend.
    pub sent: AtomicU64,
    pub received: AtomicU64,
}

/// Who talks to whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parties {
    pub protocol: u8,
    pub client: SocketAddr,
    pub frontend: SocketAddr,
}

#[derive(Default)]
pub(super) struct Sight {
    counted: Mutex<HashMap<ServicePortName, Counted>>,
    /// `None` while nobody listens.
    events: Mutex<Option<Vec<Event>>>,
}

impl Sight {
    pub fn opened(&self, service: &ServicePortName, parties: Parties, backend: SocketAddr, took: Option<Duration>) {
        self.count(service, |counted| {
            counted.connections += 1;
            counted.backend(backend).connections += 1;
            if let Some(took) = took {
                let (nanoseconds, latency) = (took.as_nanos() as u64, counted.connect.get_or_insert_default());
                latency.nanoseconds += nanoseconds;
                latency.buckets[bucket(nanoseconds)] += 1;
            }
        });
        self.tell(service, What::Opened, parties, Some(backend), None, took);
    }

    /// The backend refused, or didn't answer in time. Its client may get another.
    pub fn failed(&self, service: &ServicePortName, backend: SocketAddr) {
        self.count(service, |counted| *counted.backend(backend).failed.get_or_insert_default() += 1);
    }

    pub fn refused(&self, service: &ServicePortName, parties: Parties, reason: Reason) {
        self.count(service, |counted| *counted.drops.entry(reason).or_default() += 1);
        self.tell(service, What::Refused(reason), parties, None, None, None);
    }

    pub fn closed(&self, service: &ServicePortName, parties: Parties, backend: SocketAddr, moved: &Moved, lived: Duration) {
        let bytes = (moved.sent.load(Ordering::Relaxed), moved.received.load(Ordering::Relaxed));
        self.count(service, |counted| {
            let (sent, received) = counted.backend(backend).bytes.get_or_insert_default();
            *sent += bytes.0;
            *received += bytes.1;
        });
        self.tell(service, What::Closed, parties, Some(backend), Some(bytes), Some(lived));
    }

    /// Of the table's Service ports, and of those backends that are theirs or may still have connections.
    pub fn counts(&self, table: &Table) -> Counts {
        let known: HashSet<&ServicePortName> = table.iter().map(|(_, entry)| &entry.service).collect();
        let alive: HashSet<(&ServicePortName, SocketAddr)> =
            table.iter().flat_map(|(_, entry)| entry.alive().map(|endpoint| (&entry.service, endpoint.socket()))).collect();
        let mut counted = lock(&self.counted);
        counted.retain(|name, _| known.contains(name));
        counted.iter_mut().for_each(|(name, counted)| counted.backends.retain(|backend, _| alive.contains(&(name, *backend))));
        Counts { services: counted.clone(), ..Counts::default() }
    }

    /// What happened since the last call.
    pub fn events(&self) -> Vec<Event> {
        lock(&self.events).replace(Vec::new()).unwrap_or_default()
    }

    pub fn quiet(&self) {
        *lock(&self.events) = None;
    }

    fn count(&self, service: &ServicePortName, change: impl FnOnce(&mut Counted)) {
        let mut counted = lock(&self.counted);
        match counted.get_mut(service) {
            Some(counted) => change(counted),
            None => change(counted.entry(service.clone()).or_default()),
        }
    }

    fn tell(
        &self,
        service: &ServicePortName,
        what: What,
        parties: Parties,
        backend: Option<SocketAddr>,
        bytes: Option<(u64, u64)>,
        took: Option<Duration>,
    ) {
        if let Some(events) = &mut *lock(&self.events)
            && events.len() < MAX_EVENTS
        {
            let Parties { protocol, client, frontend } = parties;
            let (service, source, frontend) = (Some(service.clone()), Some(client), Some(frontend));
            events.push(Event { what, count: 1, service, protocol, source, frontend, backend, bytes, took });
        }
    }
}

impl Counted {
    fn backend(&mut self, backend: SocketAddr) -> &mut Traffic {
        self.backends.entry(backend).or_default()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
