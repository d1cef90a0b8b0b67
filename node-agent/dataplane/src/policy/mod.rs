//! TEMPORARY: only what the agent compiles against, until the enforcers are merged. Not for release.
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

    /// Takes the kernel to `table`.
    fn apply<'a>(&'a mut self, table: &'a PolicyTable, node: &'a [IpAddr]) -> Result<Applied>;

    /// By sandbox; those that aren't isolated have none.
    fn dropped(&self) -> Result<BTreeMap<Arc<str>, Dropped>>;

    /// Leaves every pod open.
    fn teardown(&mut self) -> Result<()>;
}

pub fn open_beside(_: &Config, _: Mode) -> Result<Box<dyn Enforcer>> {
    Err(BackendError::failed("enforce network policies", "the enforcers aren't merged yet"))
}
