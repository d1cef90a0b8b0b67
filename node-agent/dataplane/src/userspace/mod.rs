//! Service traffic by forwarding in this process: for kernels that have neither eBPF nor nftables.
//!
//! Each Service address is made local to the node by a route, so that the kernel delivers its traffic to listeners here, for pods and
//! for the node alike. Backends see the node's address as the client: keeping the client's own needs TPROXY.
mod forward;
mod routes;
mod sight;
mod socket;
mod splice;
mod table;
mod tcp;
mod transparent;
mod udp;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use outrigger_desired::{Address, Delta, Entry, Frontend, Protocol, Table};

use crate::backend::{Applied, Backend, BackendError, Live, Parting, Pending, Restored, Result};
use crate::config::{Config, Mode};
use crate::sight::{Counts, Event};
use forward::{Listener, Service, Shared};
use routes::Routes;
use table::NodeAddresses;

/// How soon a listener that couldn't be opened is tried again.
const REOPEN: Duration = Duration::from_secs(1);
/// How often outdated session affinities are dropped.
const AFFINITY_SWEEP: Duration = Duration::from_secs(60);

/// The first thing that this node lacks, or `None` when traffic can be forwarded here.
pub fn missing() -> Option<String> {
    Routes::open().err().map(|error| format!("routes can't be changed ({error})"))
}

/// Whether Services' addresses are still local, with nobody listening.
pub fn is_left() -> bool {
    Routes::open().and_then(|routes| routes.restore()).is_ok_and(|found| found > 0)
}

pub fn open(config: &Config) -> Result<Box<dyn Backend>> {
    raise_file_limit();
    let routes = Routes::open().map_err(|error| BackendError::kernel("open a netlink socket for routes", error))?;
    let transparent = !config.masquerade_all
        && transparent::enable()
            .inspect_err(|error| tracing::warn!(%error, "endpoints see the node as their client: no transparent sockets"))
            .is_ok();
    Ok(Box::new(Userspace {
        config: config.clone(),
        routes: Arc::new(routes),
        shared: Arc::new(Shared { transparent, ..Shared::default() }),
        open: HashMap::new(),
        closed: Vec::new(),
        closing: Vec::new(),
    }))
}

/// Each connection takes two sockets and, once it carries much, two pipes.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, "the limit of open files stays low");
    }
}

struct Userspace {
    config: Config,
    routes: Arc<Routes>,
    shared: Arc<Shared>,
    open: HashMap<Frontend, Arc<Service>>,
    /// Frontends whose address couldn't be listened on.
    closed: Vec<Frontend>,
    /// Listeners that nobody wants any more.
    closing: Vec<Listener>,
}

impl Userspace {
    fn node_addresses(&self) -> NodeAddresses {
        NodeAddresses::read(&self.config)
    }

    fn retire(&mut self, which: impl Fn(&Frontend) -> bool) {
        let retired = self.open.extract_if(|frontend, _| which(frontend));
        self.closing.extend(retired.flat_map(|(_, service)| service.retire()));
    }

    async fn close(&mut self) {
        for listener in std::mem::take(&mut self.closing) {
            listener.close().await;
        }
    }

    fn upsert(&mut self, frontend: Frontend, entry: &Entry, node: &NodeAddresses) {
        if frontend.protocol == Protocol::Sctp {
            tracing::warn!(%frontend, service = %entry.service, "SCTP isn't forwarded in userspace mode");
            return;
        }
        let service =
            self.open.entry(frontend).or_insert_with(|| Arc::new(Service::new(entry.clone(), frontend.protocol, self.shared.clone())));
        service.update(entry.clone(), node.inside());
        if let Address::Ip(ip) = frontend.address
            && !node.has(ip)
            && let Err(error) = service.hold_route(&self.routes, ip)
        {
            tracing::warn!(%frontend, %error, "the Service's address can't be made local");
        }
        // Without endpoints nothing listens, so the kernel refuses at once; without local ones under policy Local it does so too.
        let wanted = if table::is_served(entry) { node.sockets(frontend, entry.kind) } else { Vec::new() };
        self.closing.extend(service.others(&wanted));
        if let Err((address, error)) = listen(service, &wanted) {
            tracing::warn!(%frontend, service = %entry.service, %address, %error, "can't listen; will try again");
            self.closed.push(frontend);
        }
    }
}

/// Opens what is missing.
fn listen(service: &Arc<Service>, wanted: &[SocketAddr]) -> std::result::Result<(), (SocketAddr, std::io::Error)> {
    for address in wanted {
        if !service.listens(*address) {
            let opened = match service.protocol() {
                Protocol::Udp => udp::listen(service, *address),
                _ => tcp::listen(service, *address),
            };
            service.opened(*address, opened.map_err(|error| (*address, error))?);
        }
    }
    Ok(())
}

impl Backend for Userspace {
    fn mode(&self) -> Mode {
        Mode::Userspace
    }

    /// A former agent's routes; its connections ended with it.
    fn restore(&mut self) -> Pending<'_, Result<Restored>> {
        let found = self.routes.restore().map_err(|error| BackendError::kernel("read the Services' routes back", error));
        Box::pin(async move { found.map(|frontends| Restored { frontends }) })
    }

    fn apply<'a>(&'a mut self, table: &'a Table, delta: &'a Delta) -> Pending<'a, Result<Applied>> {
        Box::pin(async move {
            let node = self.node_addresses();
            if delta.full {
                self.retire(|frontend| table.get(frontend).is_none());
            }
            for removal in &delta.removals {
                if let Some(service) = self.open.remove(&removal.frontend) {
                    self.closing.extend(service.retire());
                }
            }
            for upsert in &delta.upserts {
                if let Some(entry) = table.get(&upsert.frontend) {
                    self.upsert(upsert.frontend, entry, &node);
                }
            }
            if delta.full {
                self.routes.prune().map_err(|error| BackendError::kernel("delete stale Service routes", error))?;
            }
            self.close().await;
            let ended = delta.gone.iter().filter_map(|gone| Some(self.open.get(&gone.frontend)?.end(gone.backend))).sum();
            Ok(Applied { upserted: delta.upserts.len(), removed: delta.removals.len(), ended })
        })
    }

    fn tidy(&mut self) -> Pending<'_, Option<Duration>> {
        Box::pin(async move {
            let node = self.node_addresses();
            for frontend in std::mem::take(&mut self.closed) {
                let Some(service) = self.open.get(&frontend) else { continue };
                if listen(service, &node.sockets(frontend, service.entry().kind)).is_err() {
                    self.closed.push(frontend);
                }
            }
            self.shared.affinities.sweep(std::time::Instant::now());
            if !self.closed.is_empty() { Some(REOPEN) } else { (!self.shared.affinities.is_empty()).then_some(AFFINITY_SWEEP) }
        })
    }

    fn lookup(&self, frontend: &Frontend, outside: bool) -> Result<Option<Vec<SocketAddr>>> {
        let Some(service) = self.open.get(frontend) else { return Ok(None) };
        let entry = service.entry();
        let endpoints = entry.short_circuit.as_ref().filter(|_| !outside).unwrap_or(&entry.backends);
        Ok(Some(endpoints.iter().map(|endpoint| endpoint.socket()).collect()))
    }

    fn counted(&self, table: &Table) -> Result<Counts> {
        Ok(self.shared.sight.counts(table))
    }

    fn events(&self, _: &Table) -> Result<Vec<Event>> {
        Ok(self.shared.sight.events())
    }

    fn quiet(&self) {
        self.shared.sight.quiet();
    }

    fn live(&self, _: &Table) -> Result<Vec<Live>> {
        Ok(self.open.values().flat_map(|service| service.live()).collect())
    }

    /// Listeners close; connections go on, and each keeps its Service's address local for as long as it lives.
    fn teardown(&mut self, parting: Parting) -> Pending<'_, Result<()>> {
        Box::pin(async move {
            if parting == Parting::Final {
                self.open.values().for_each(|service| service.end_all());
            }
            self.retire(|_| true);
            self.closed.clear();
            self.close().await;
            self.routes.prune().map_err(|error| BackendError::kernel("delete stale Service routes", error))?;
            if parting == Parting::Final && self.shared.transparent {
                transparent::disable().map_err(|error| BackendError::kernel("take down what transparent sockets needed", error))?;
            }
            Ok(())
        })
    }
}
