//! Service traffic by nftables: one table, verdict maps, delta transactions. The table is never listed to learn its state.
mod apply;
mod inspect;
mod ops;
mod render;

use std::net::SocketAddr;
use std::time::Duration;

use outrigger_desired::{Delta, Frontend, Table};

use crate::backend::{Applied, Backend, BackendError, Live, Parting, Pending, Restored, Result};
use crate::config::{Config, Mode};
use crate::conntrack;
use apply::Kernel;

/// Linux before 5.13 lacks what the table is made of (and its nft may choke on it).
const MIN_KERNEL: (u32, u32) = (5, 13);
/// How long an emptied chain may still be referenced; see `render::Model`.
const CHAIN_REST: Duration = Duration::from_secs(1);

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

/// Whether the kernel has a table that translates new connections.
pub fn is_left() -> bool {
    let services = format!("list chain inet {} services", ops::TABLE);
    std::process::Command::new("nft").arg(services).output().is_ok_and(|output| output.status.success())
}

pub fn open(config: &Config) -> Result<Box<dyn Backend>> {
    let around = render::Surroundings {
        cluster_cidrs: config.cluster_cidrs.clone(),
        pod_interfaces: config.pod_interfaces.clone(),
        masquerade_all: config.masquerade_all,
        nodeport_addresses: config.nodeport_addresses.clone(),
    };
    Ok(Box::new(Nftables { kernel: Kernel::new(around) }))
}

struct Nftables {
    kernel: Kernel,
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

    fn tidy(&mut self) -> Pending<'_, Option<Duration>> {
        Box::pin(async move { tokio::task::block_in_place(|| self.kernel.tidy()).then_some(CHAIN_REST) })
    }

    fn lookup(&self, frontend: &Frontend, outside: bool) -> Result<Option<Vec<SocketAddr>>> {
        inspect::lookup(*frontend, outside)
    }

    fn live(&self, table: &Table) -> Result<Vec<Live>> {
        conntrack::live(table).map_err(|error| BackendError::kernel("read tracked connections", error))
    }

    fn teardown(&mut self, parting: Parting) -> Pending<'_, Result<()>> {
        let text = match parting {
            Parting::Handover => render::handover(),
            Parting::Final => format!("add table inet {0}\ndelete table inet {0}\n", ops::TABLE),
        };
        Box::pin(async move { apply::nft(&text).map_err(|error| BackendError::failed("take the nftables table down", error)) })
    }
}
