//! NetworkPolicies in the kernel: what `outrigger_desired::policy` says of this node's pods, enforced at their interfaces.
//!
//! [`ebpf`] does it by programs at the interfaces of isolated pods, [`nftables`] by a table. Which one depends on where Services are
//! translated: policies speak of the pods behind them.
mod ebpf;
mod nftables;
mod plan;
mod render;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use outrigger_desired::policy::PolicyTable;

use crate::backend::{BackendError, Result};
use crate::config::{Config, Mode};

/// What one apply did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Pods that are isolated in some direction.
    pub pods: usize,
    /// Different sets of rules that they have.
    pub rules: usize,
    /// Sandboxes whose interface isn't there, so that nothing could be done to it.
    pub absent: Vec<Arc<str>>,
}

/// Packets of one pod that were dropped, since this node's kernel first knew it for isolated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    pub ingress: u64,
    pub egress: u64,
}

pub trait Enforcer: Send {
    fn name(&self) -> &'static str;

    /// Takes the kernel to `table`. When this returns, every pod in it is judged by its new rules, those with live connections too.
    /// `node` are the node's own addresses: the node always reaches its pods, and they the node. After an error nothing is more open
    /// than before; the next apply makes up for it.
    fn apply<'a>(&'a mut self, table: &'a PolicyTable, node: &'a [IpAddr]) -> Result<Applied>;

    /// By sandbox; those that aren't isolated have none.
    fn dropped(&self) -> Result<BTreeMap<Arc<str>, Dropped>>;

    /// Leaves every pod open.
    fn teardown(&mut self) -> Result<()>;
}

/// The best enforcer that this kernel can carry beside this way of carrying Services; the error says what each lacks. To be called
/// again when Services are carried in another way.
pub fn open_beside(config: &Config, services: Mode) -> Result<Box<dyn Enforcer>> {
    let no_ebpf = match services {
        Mode::Ebpf => match ebpf::open(config) {
            Ok(enforcer) => return Ok(Box::new(enforcer)),
            Err(error) => error.to_string(),
        },
        // Its programs would see the Service's address and not yet the pod's.
        other => format!("Services are translated by {other}, behind the pods' interfaces"),
    };
    match crate::nftables::missing() {
        None => Ok(Box::new(nftables::Nftables::open(config)?)),
        Some(no_nftables) => {
            Err(BackendError::failed("enforce network policies", format!("no ebpf: {no_ebpf}; no nftables: {no_nftables}")))
        }
    }
}
