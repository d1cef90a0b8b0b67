//! Service traffic by nftables: one table of maps, changed by delta transactions and never listed to learn its state.
//!
//! What belongs to a Service is elements of maps, never a chain, a set or a rule of its own: the kernel goes through all of those at
//! each transaction. [`render`] is what doesn't depend on Services, [`plan`] says which elements they are (pure), [`rules`] and
//! [`wire`] put them in the kernel's words, [`apply`] carries them over, [`inspect`] reads single ones back, [`count`] what the kernel
//! has counted.
pub(crate) mod apply;
mod count;
mod inspect;
mod ops;
mod plan;
mod render;
mod rules;
mod wire;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use ipnet::IpNet;
use outrigger_desired::{Delta, Frontend, Table};

use crate::backend::{Applied, Backend, BackendError, Live, Parting, Pending, Restored, Result};
use crate::config::{Config, Mode, PodInterfaces};
use crate::conntrack;
use crate::sight::{Counts, Event};
use apply::Kernel;

/// Linux before 5.13 lacks what the table is made of (and its nft may choke on it).
const MIN_KERNEL: (u32, u32) = (5, 13);

/// What of the node shapes the table.
#[derive(Clone, Debug, Default)]
struct Surroundings {
    cluster_cidrs: Vec<IpNet>,
    nodeport_addresses: Vec<IpNet>,
    node_ips: Vec<IpAddr>,
    pod_interfaces: Option<PodInterfaces>,
    masquerade_all: bool,
}

/// The first thing that this node lacks, or `None` when nftables can carry Service traffic here.
pub fn missing() -> Option<String> {
    let release = nix::sys::utsname::uname().ok().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    if kernel_version(&release).is_some_and(|version| version < MIN_KERNEL) {
        return Some(format!("Linux {release} is older than {}.{}", MIN_KERNEL.0, MIN_KERNEL.1));
    }
    match std::process::Command::new("nft").args(["list", "tables"]).output() {
        Err(error) => Some(format!("the nft program can't be run ({error})")),
        Ok(output) if !output.status.success() => Some(format!("nft: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Ok(_) => None,
    }
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// Whether the kernel has a table that translates new connections; the one that is left after a handover has no number.
pub fn is_left() -> bool {
    apply::existing().is_ok_and(|names| names.iter().any(|name| name != ops::TABLE))
}

pub fn open(config: &Config) -> Result<Box<dyn Backend>> {
    let around = Surroundings {
        cluster_cidrs: config.cluster_cidrs.clone(),
        nodeport_addresses: config.nodeport_addresses.clone(),
        node_ips: config.node_ips.clone(),
        pod_interfaces: config.pod_interfaces.clone(),
        masquerade_all: config.masquerade_all,
    };
    Ok(Box::new(Nftables { kernel: Kernel::open(around)?, watch: Mutex::default() }))
}

struct Nftables {
    kernel: Kernel,
    watch: Mutex<Option<Watch>>,
}

/// What a watcher is told from.
struct Watch {
    tracked: conntrack::Listener,
    /// What had come to nothing when it was looked last.
    refused: count::Refused,
}

impl Backend for Nftables {
    fn mode(&self) -> Mode {
        Mode::Nftables
    }

    /// What a former agent left carries on until the first transaction replaces it as a whole.
    fn restore(&mut self) -> Pending<'_, Result<Restored>> {
        Box::pin(async { Ok(Restored::default()) })
    }

    fn apply<'a>(&'a mut self, table: &'a Table, delta: &'a Delta) -> Pending<'a, Result<Applied>> {
        Box::pin(async move { tokio::task::block_in_place(|| self.kernel.apply(table, delta)) })
    }

    fn lookup(&self, frontend: &Frontend, outside: bool) -> Result<Option<Vec<SocketAddr>>> {
        self.kernel.lookup(*frontend, outside)
    }

    fn counted(&self, table: &Table) -> Result<Counts> {
        self.kernel.count(|connection, name| count::counts(connection, name, table))
    }

    /// Connections as conntrack tells of them; of what came to nothing only how often it did, from the counters.
    fn events(&self, table: &Table) -> Result<Vec<Event>> {
        let failed = |error| BackendError::kernel("listen to connection tracking", error);
        let refused = self.kernel.count(count::refused)?;
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *watch {
            None => {
                *watch = Some(Watch { tracked: conntrack::Listener::open().map_err(failed)?, refused });
                Ok(Vec::new())
            }
            Some(watch) => {
                let mut events = watch.tracked.events(table).map_err(failed)?;
                events.extend(count::more(&watch.refused, &refused, table));
                watch.refused = refused;
                Ok(events)
            }
        }
    }

    fn quiet(&self) {
        *self.watch.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn live(&self, table: &Table) -> Result<Vec<Live>> {
        conntrack::live(table).map_err(|error| BackendError::kernel("read tracked connections", error))
    }

    fn teardown(&mut self, parting: Parting) -> Pending<'_, Result<()>> {
        let text = match parting {
            Parting::Handover => render::handover(ops::TABLE),
            Parting::Final => String::new(),
        };
        Box::pin(async move { apply::replace_all(&text).map_err(|error| BackendError::failed("take the nftables table down", error)) })
    }
}
