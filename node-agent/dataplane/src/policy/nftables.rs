//! Policies by an nftables table, where eBPF can't do it. It judges what is forwarded, after Services are translated; conntrack tells
//! answers from what opens a connection.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;
use std::sync::Arc;

use outrigger_desired::policy::PolicyTable;
use serde_json::Value;

use super::render::{Model, TABLE, skeleton};
use super::{Applied, Dropped, Enforcer, ebpf};
use crate::backend::{BackendError, Result};
use crate::config::{Config, PodInterfaces};
use crate::ebpf::attach::Pins;
use crate::namespace::Namespace;
use crate::nftables::apply::nft;

/// Deletes the table, when there is one.
pub(super) fn remove() -> Result<()> {
    // Without the program nobody has made one.
    if crate::nftables::missing().is_some() {
        return Ok(());
    }
    nft(&format!("add table inet {TABLE}\ndelete table inet {TABLE}\n"))
}

pub(super) struct Nftables {
    pins: Pins,
    /// How interfaces of pods begin, also of those that aren't known yet.
    prefix: Option<String>,
    /// `None` before the first apply and after a failure: the next one replaces the table as a whole.
    model: Option<Model>,
}

impl Nftables {
    pub fn open(config: &Config) -> Result<Self> {
        let prefix = match &config.pod_interfaces {
            Some(PodInterfaces::Prefix(prefix)) => Some(prefix.clone()),
            _ => None,
        };
        Ok(Self { pins: Pins::at(&config.pin_dir), prefix, model: None })
    }

    /// What another enforcer left has held until here.
    fn remove_former(&self) -> Result<()> {
        let node = Namespace::current().map_err(|error| BackendError::kernel("open the node's network namespace", error))?;
        ebpf::remove(&self.pins, &node)
    }
}

/// Names are part of the text.
fn check(table: &PolicyTable) -> Result<()> {
    let is_plain = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '"' | '*' | '\\'));
    match table.pods.values().find(|pod| !is_plain(&pod.interface)) {
        Some(pod) => Err(BackendError::failed("enforce network policies", format!("the interface name {:?} can't be used", pod.interface))),
        None => Ok(()),
    }
}

impl Enforcer for Nftables {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn apply<'a>(&'a mut self, table: &'a PolicyTable, _: &'a [IpAddr]) -> Result<Applied> {
        check(table)?;
        let (first, mut model) = match self.model.take() {
            Some(model) => (false, model),
            None => (true, Model::default()),
        };
        let changes = model.apply(table);
        let text = if first { skeleton(self.prefix.as_deref()) + &changes } else { changes };
        if !text.is_empty() {
            nft(&text)?;
        }
        if first {
            self.remove_former()?;
        }
        let applied = Applied { pods: model.isolated().count(), rules: model.rule_sets(), absent: Vec::new() };
        self.model = Some(model);
        Ok(applied)
    }

    fn dropped(&self) -> Result<BTreeMap<Arc<str>, Dropped>> {
        let Some(model) = &self.model else { return Ok(BTreeMap::new()) };
        let counters = counters()?;
        let count = |number: u32, word: &str| counters.get(&format!("drops-{number}-{word}")).copied().unwrap_or_default();
        let of =
            |(sandbox, number): (&Arc<str>, u32)| (sandbox.clone(), Dropped { ingress: count(number, "in"), egress: count(number, "out") });
        Ok(model.isolated().map(of).collect())
    }

    fn teardown(&mut self) -> Result<()> {
        self.model = None;
        remove()
    }
}

/// Packets by counter.
fn counters() -> Result<BTreeMap<String, u64>> {
    let failed = |message: &dyn std::fmt::Display| BackendError::failed("read the nftables counters of network policies", message);
    let output = Command::new("nft").args(["-j", "list", "counters", "table", "inet", TABLE]).output().map_err(|error| failed(&error))?;
    if !output.status.success() {
        return Err(failed(&String::from_utf8_lossy(&output.stderr).trim()));
    }
    let listed: Value = serde_json::from_slice(&output.stdout).map_err(|error| failed(&error))?;
    let counters = listed["nftables"].as_array().into_iter().flatten().map(|object| &object["counter"]);
    Ok(counters.filter_map(|counter| Some((counter["name"].as_str()?.to_owned(), counter["packets"].as_u64()?))).collect())
}
