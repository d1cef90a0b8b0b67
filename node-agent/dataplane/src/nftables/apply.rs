//! Transactions into the kernel.
use std::io::Write;
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use netlink_sys::constants::NETLINK_NETFILTER;
use outrigger_desired::{Delta, Frontend, Table};

use super::Surroundings;
use super::inspect;
use super::ops::{Op, TABLE};
use super::plan::Model;
use super::render;
use super::wire::Batch;
use crate::backend::{Applied, BackendError, Result};
use crate::conntrack;
use crate::netlink::Connection;

/// Steps per transaction while a table is filled that isn't in use yet.
const PART: usize = 20_000;

pub(super) struct Kernel {
    around: Surroundings,
    model: Model,
    connection: Connection,
    conntrack: Connection,
    /// The table in use.
    table: String,
}

impl Kernel {
    pub fn open(around: Surroundings) -> Result<Self> {
        let connection = Connection::open(NETLINK_NETFILTER)
            .and_then(|connection| connection.allow_large_messages().map(|()| connection))
            .map_err(|error| BackendError::kernel("open a netlink socket for nftables", error))?;
        Ok(Self { around, model: Model::default(), connection, conntrack: open_conntrack()?, table: String::new() })
    }

    pub fn apply(&mut self, table: &Table, delta: &Delta) -> Result<Applied> {
        if delta.full {
            self.rebuild(table, delta)?;
        } else {
            let ops = self.model.plan(table, delta, &self.around.node_ips);
            self.transact(&self.table, &ops)?;
        }
        // After the rules: what is translated anew meets the new ones.
        let swept = conntrack::sweep(&self.conntrack, table, delta);
        if swept.is_err() {
            // Answers to what failed may still be on their way.
            self.conntrack = open_conntrack()?;
        }
        let ended = swept.map_err(|error| BackendError::kernel("end tracked connections to gone backends", error))?;
        Ok(Applied { upserted: delta.upserts.len(), removed: delta.removals.len(), ended })
    }

    /// Fills a new table beside the one in use, then lets it take that one's place in one step. Established connections live on in
    /// conntrack.
    fn rebuild(&mut self, table: &Table, delta: &Delta) -> Result<()> {
        let others = existing()?;
        let last = others.iter().filter_map(|name| name.rsplit('-').next()?.parse::<u64>().ok()).max();
        let name = format!("{TABLE}-{}", last.unwrap_or(0) + 1);
        self.model = Model::default();
        nft(&render::skeleton(&name, &self.around))?;
        let ops = self.model.plan(table, delta, &self.around.node_ips);
        for part in ops.chunks(PART) {
            self.transact(&name, part)?;
        }
        let mut batch = Batch::new(&name);
        batch.wake();
        others.iter().for_each(|other| batch.delete_table(other));
        self.connection.batch(&batch.finish()).map_err(|error| BackendError::kernel("put the new nftables table in use", error))?;
        self.table = name;
        Ok(())
    }

    pub fn lookup(&self, frontend: Frontend, outside: bool) -> Result<Option<Vec<SocketAddr>>> {
        inspect::lookup(&self.table, self.model.rules(), frontend, outside)
    }

    /// Lets `read` ask about the table in use.
    pub fn count<T: Default>(&self, read: impl FnOnce(&Connection, &str) -> std::io::Result<T>) -> Result<T> {
        if self.table.is_empty() {
            return Ok(T::default());
        }
        read(&self.connection, &self.table).map_err(|error| BackendError::kernel("read the nftables counters", error))
    }

    fn transact(&self, table: &str, ops: &[Op]) -> Result<()> {
        if ops.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new(table);
        batch.push(ops);
        self.connection.batch(&batch.finish()).map_err(|error| {
            let steps: String = ops.iter().take(20).map(|op| format!("{op}; ")).collect();
            tracing::debug!(table, %error, steps, of = ops.len(), "nftables transaction refused");
            BackendError::kernel(format!("apply an nftables transaction of {} steps", ops.len()), error)
        })
    }
}

fn open_conntrack() -> Result<Connection> {
    Connection::open(NETLINK_NETFILTER).map_err(|error| BackendError::kernel("open a netlink socket for connection tracking", error))
}

/// The names of our tables, whoever made them. Only names are listed.
pub(super) fn existing() -> Result<Vec<String>> {
    let output = Command::new("nft").args(["list", "tables", "inet"]).output();
    let output = output.map_err(|error| BackendError::kernel("run nft", error))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let names = text.lines().filter_map(|line| line.strip_prefix("table inet "));
    let own = names.filter(|name| name.strip_prefix(TABLE).is_some_and(|rest| rest.is_empty() || rest.starts_with('-')));
    Ok(own.map(Into::into).collect())
}

/// Deletes our tables, and makes the one that `text` describes in the same step.
pub(super) fn replace_all(text: &str) -> Result<()> {
    let deletes: String = existing()?.iter().map(|name| format!("delete table inet {name}\n")).collect();
    nft(&format!("{deletes}{text}"))
}

/// Runs one transaction given as text.
pub(crate) fn nft(text: &str) -> Result<()> {
    let failed = |error: std::io::Error| BackendError::kernel("run nft", error);
    let mut child =
        Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes()).map_err(failed)?;
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    Err(BackendError::failed("apply an nftables transaction", message.lines().take(6).collect::<Vec<_>>().join(" | ")))
}
