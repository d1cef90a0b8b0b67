//! Work inside another process's network namespace.
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

/// Runs `work` on a thread of its own that has entered the network namespace at `path` (such as `/proc/1/ns/net`).
/// Sockets that `work` opens stay in that namespace wherever they are used later.
pub fn within<T: Send>(path: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = File::open(path).with_context(|| format!("open the network namespace {}", path.display()))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
