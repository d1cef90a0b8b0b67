//! The agent's own socket, for root on this node: what the running parts know, for `outrigger-node status` and its relatives.
mod client;
mod server;
mod sight;

pub use client::{Mode, Monitor, Services, Socket, Trace, mode, monitor, services, status, trace};
pub use server::{Sources, serve};

use std::path::{Path, PathBuf};

/// Where the agent with this data directory listens.
pub fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("agent.sock")
}
