//! Work inside another network namespace, on a thread of its own.
//!
//! `setns` changes the calling thread only, so each task gets a fresh thread that ends in the foreign namespace
//! and never goes back to a pool.
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};

/// Runs `work` in the network namespace bound at `path`.
pub fn within<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(path)?;
    within_file(&namespace, work)
}

/// Runs `work` in the network namespace that `namespace` stands for.
pub fn within_file<T: Send>(namespace: &File, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
            work()
        })?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the network namespace panicked")))
    })
}

/// Drives `future` to its end on a single-threaded runtime made for it.
pub fn block_on<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    Ok(runtime.block_on(future))
}

/// Connects to `address` from inside the namespace at `path`; the connection outlives the thread, since a socket
/// stays in the namespace that it was made in.
pub async fn connect(path: PathBuf, address: std::net::SocketAddr) -> io::Result<tokio::net::TcpStream> {
    let stream = tokio::task::spawn_blocking(move || within(&path, || std::net::TcpStream::connect(address)))
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))?;
    stream.set_nonblocking(true)?;
    tokio::net::TcpStream::from_std(stream)
}
