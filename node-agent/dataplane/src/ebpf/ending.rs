//! Ends what still points at gone backends: flows at once, sockets in every network namespace of the node. That takes as long as the node
//! has flows and pods, so changes don't wait for it: it goes on a thread of its own, many gone backends at a time.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use foldhash::HashMap;
use outrigger_abi as abi;

use super::maps::Shared;
use super::sockets;
use crate::backend::{BackendError, Result};
use crate::namespace::{self, Namespace};

/// A backend that a frontend no longer has.
pub type Lost = (abi::FrontendKey, SocketAddr);

/// Where connections are.
pub struct Reach {
    pub maps: Arc<Shared>,
    pub node: Namespace,
    pub cgroup_path: PathBuf,
}

impl Reach {
    /// Ends the connections that `is_doomed`; how many there were.
    pub fn end(&self, is_doomed: &(impl Fn(&abi::Peer) -> bool + Sync)) -> usize {
        self.end_flows(is_doomed) + self.end_sockets(is_doomed)
    }

    /// Packets of an ended TCP flow reach the node itself, which answers them by a reset.
    fn end_flows(&self, is_doomed: &impl Fn(&abi::Peer) -> bool) -> usize {
        let flows = match self.maps.flows.entries() {
            Ok(flows) => flows,
            Err(error) => {
                tracing::warn!(%error, "flows to gone backends are left to time out");
                return 0;
            }
        };
        let opens = flows.iter().filter(|(_, flow)| flow.flags & abi::flow_flags::REPLY == 0);
        let mut ended = 0;
        for (tuple, flow) in opens {
            let peer = abi::Peer {
                frontend: abi::Endpoint::new(tuple.dst, tuple.dport),
                backend: abi::Endpoint::new(flow.to.dst, flow.to.dport),
                protocol: tuple.protocol.into(),
                ..abi::Peer::default()
            };
            if is_doomed(&peer) {
                // Each may have been evicted meanwhile.
                let gone = self.maps.flows.delete(tuple).and_then(|gone| Ok(self.maps.flows.delete(&flow.to.reversed())? | gone));
                ended += usize::from(gone.unwrap_or(false));
            }
        }
        ended
    }

    fn end_sockets(&self, is_doomed: &(impl Fn(&abi::Peer) -> bool + Sync)) -> usize {
        let namespaces = match namespace::below(&self.cgroup_path, &self.node) {
            Ok(namespaces) => namespaces,
            Err(error) => {
                tracing::warn!(%error, cgroup = %self.cgroup_path.display(), "sockets of gone backends are left to time out");
                return 0;
            }
        };
        let (ended, error) = sockets::end(&namespaces, &self.maps, is_doomed);
        if let Some(error) = error {
            tracing::warn!(%error, "some sockets of gone backends are left to time out");
        }
        ended
    }
}

/// What the peer would be called in a list of lost backends: by the address that was dialled, or as a port of the node.
pub fn names_of(peer: &abi::Peer) -> [Lost; 2] {
    let backend = SocketAddr::new(peer.backend.addr.ip(), peer.backend.port.host());
    let exact = abi::FrontendKey::new(peer.frontend.addr, peer.frontend.port, peer.protocol as u8);
    [(exact, backend), (abi::FrontendKey { addr: exact.addr.node(), ..exact }, backend)]
}

#[derive(Default)]
struct Work {
    /// With the first round that looks for it from its beginning.
    doomed: HashMap<Lost, u64>,
    round: u64,
    ended: usize,
    over: bool,
}

#[derive(Default)]
struct Desk {
    work: Mutex<Work>,
    changed: Condvar,
}

impl Desk {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, work: MutexGuard<'a, Work>, until: impl Fn(&Work) -> bool) -> MutexGuard<'a, Work> {
        self.changed.wait_while(work, |work| !until(work)).unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, reach: &Reach) {
        loop {
            let mut work = self.wait(self.work(), |work| work.over || !work.doomed.is_empty());
            if work.over {
                return;
            }
            work.round += 1;
            let round = work.round;
            drop(work);
            // Asked of each connection after it was found: one that was opened since its backend came back isn't doomed.
            let ended = reach.end(&|peer: &abi::Peer| {
                let names = names_of(peer);
                let work = self.work();
                names.iter().any(|name| work.doomed.contains_key(name))
            });
            let mut work = self.work();
            work.doomed.retain(|_, first| *first > round);
            work.ended += ended;
            self.changed.notify_all();
        }
    }
}

/// Dropping it waits until the round at hand is over.
pub struct Ender {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

impl Ender {
    pub fn start(reach: Arc<Reach>) -> Result<Self> {
        let desk = Arc::new(Desk::default());
        let own = desk.clone();
        let thread = std::thread::Builder::new().name("ender".into()).spawn(move || own.run(&reach));
        let thread = thread.map_err(|error| BackendError::kernel("start a thread that ends connections of gone backends", error))?;
        Ok(Self { desk, thread: Some(thread) })
    }

    /// Once new connections are no longer led there.
    pub fn doom(&self, lost: impl IntoIterator<Item = Lost>) {
        let mut work = self.desk.work();
        let next = work.round + 1;
        work.doomed.extend(lost.into_iter().map(|lost| (lost, next)));
        self.desk.changed.notify_all();
    }

    /// Before new connections are led there again.
    pub fn spare<I: IntoIterator<Item = Lost>>(&self, alive: impl FnOnce() -> I) {
        let mut work = self.desk.work();
        if !work.doomed.is_empty() {
            alive().into_iter().for_each(|lost| _ = work.doomed.remove(&lost));
        }
    }

    /// How many connections were ended since this was last asked.
    pub fn ended(&self) -> usize {
        std::mem::take(&mut self.desk.work().ended)
    }

    /// Waits until all that is doomed has been looked for.
    pub fn finish(&self) {
        drop(self.desk.wait(self.desk.work(), |work| work.doomed.is_empty()));
    }
}

impl Drop for Ender {
    fn drop(&mut self) {
        self.desk.work().over = true;
        self.desk.changed.notify_all();
        // A panic over there has been reported by itself.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
