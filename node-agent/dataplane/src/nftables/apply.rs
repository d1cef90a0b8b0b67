//! Transactions into the kernel.
use std::io::Write;
use std::process::{Command, Stdio};

use outrigger_desired::{Delta, Table};

use super::render::{self, Model, Surroundings};
use crate::backend::{Applied, BackendError, Result};
use crate::conntrack;

#[derive(Debug)]
pub(super) struct Kernel {
    around: Surroundings,
    model: Model,
}

impl Kernel {
    pub fn new(around: Surroundings) -> Self {
        Self { around, model: Model::default() }
    }

    pub fn apply(&mut self, table: &Table, delta: &Delta) -> Result<Applied> {
        let mut text = String::new();
        if delta.full {
            self.model = Model::default();
            text = render::skeleton(&self.around);
        }
        for op in self.model.plan(table, delta) {
            text.push_str(&op.to_string());
            text.push('\n');
        }
        if !text.is_empty() {
            nft(&text)?;
        }
        // After the rules: what is translated anew meets the new ones.
        let ended =
            conntrack::sweep(table, delta).map_err(|error| BackendError::kernel("end tracked connections to gone backends", error))?;
        Ok(Applied { upserted: delta.upserts.len(), removed: delta.removals.len(), ended })
    }

    /// True when chains are left that couldn't be deleted yet.
    pub fn tidy(&mut self) -> bool {
        let ops = self.model.leftovers();
        if ops.is_empty() {
            return false;
        }
        let text: String = ops.iter().map(|op| format!("{op}\n")).collect();
        match nft(&text) {
            Ok(()) => {
                self.model.tidied();
                false
            }
            Err(error) => {
                tracing::debug!(%error, "emptied chains can't be deleted yet");
                true
            }
        }
    }
}

/// Runs one transaction given as text.
pub(super) fn nft(text: &str) -> Result<()> {
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
