//! What a way of carrying Service traffic has to do, however it does it.
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use outrigger_desired::{Delta, Frontend, Table};

use crate::config::Mode;
use crate::sight::{Counts, Event};

/// A boxed future, so that the backend in use can be swapped while running.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error("{mode} can't run here: {missing}")]
    Unsupported { mode: Mode, missing: String },
    /// Names what was being done and to what; the source says why it failed.
    #[error("{operation}: {source}")]
    Kernel {
        operation: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{operation}: {message}")]
    Failed { operation: String, message: String },
}

impl BackendError {
    pub fn kernel(operation: impl Into<String>, source: std::io::Error) -> Self {
        Self::Kernel { operation: operation.into(), source }
    }

    pub fn failed(operation: impl Into<String>, message: impl ToString) -> Self {
        Self::Failed { operation: operation.into(), message: message.to_string() }
    }
}

pub type Result<T> = std::result::Result<T, BackendError>;

/// What was found in the kernel at start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Frontends that a former agent left there and that carry on working meanwhile.
    pub frontends: usize,
}

/// What one apply did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    pub upserted: usize,
    pub removed: usize,
    /// Sockets and conntrack entries of gone backends that were ended; see also [`Backend::ended`].
    pub ended: usize,
}

/// A connection or flow that lives through a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Live {
    pub protocol: u8,
    /// Unknown where only the agent's own socket could tell.
    pub source: Option<SocketAddr>,
    pub frontend: SocketAddr,
    pub backend: SocketAddr,
}

/// How a backend leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// Another backend has taken over: no new connections come here, but those that live go on.
    Handover,
    /// Nothing of it may stay.
    Final,
}

/// One way to carry Service traffic. Calls never overlap. A backend that is dropped without `teardown` leaves the kernel as it is:
/// that is what an agent's restart looks like.
pub trait Backend: Send {
    fn mode(&self) -> Mode;

    /// Reads the kernel back, before the first `apply`. Changes nothing that traffic sees.
    fn restore(&mut self) -> Pending<'_, Result<Restored>>;

    /// Makes the kernel do what `table` says; `delta` is the difference to the last applied table, or full. When it fails the next
    /// delta is full.
    fn apply<'a>(&'a mut self, table: &'a Table, delta: &'a Delta) -> Pending<'a, Result<Applied>>;

    /// Work that was put off: called when nothing else is to do, at the latest after the time that it last asked for.
    /// `None` when nothing is left.
    fn tidy(&mut self) -> Pending<'_, Option<Duration>> {
        Box::pin(async { None })
    }

    /// What was ended by work that goes on beside the calls, since this was last asked.
    fn ended(&mut self) -> usize {
        0
    }

    /// Waits for that work.
    fn finish(&mut self) -> Pending<'_, ()> {
        Box::pin(async {})
    }

    /// Where a new connection to the frontend may be led, read back from where it will be decided; `None` when nothing is known of
    /// it there. `outside` says whether the client is neither this node nor a pod.
    fn lookup(&self, frontend: &Frontend, outside: bool) -> Result<Option<Vec<SocketAddr>>>;

    /// The one of those that a client outside gets, where its address and port decide. Affinity may know of another.
    fn choice(&self, _frontend: &Frontend, _client: SocketAddr) -> Result<Option<SocketAddr>> {
        Ok(None)
    }

    /// What was counted of the table's Service ports.
    fn counted(&self, table: &Table) -> Result<Counts>;

    /// What happened since the last call; the first call begins to listen.
    fn events(&self, table: &Table) -> Result<Vec<Event>>;

    /// Nobody asks for events any more.
    fn quiet(&self);

    fn live(&self, table: &Table) -> Result<Vec<Live>>;

    fn teardown(&mut self, parting: Parting) -> Pending<'_, Result<()>>;
}
