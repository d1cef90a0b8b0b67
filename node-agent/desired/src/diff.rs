//! The step from one table to the next, as the backends apply it.
use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use foldhash::HashSet;

use crate::names::{Protocol, ServicePortName};
use crate::table::{Endpoint, Entry, Frontend, Table};

/// A frontend that is new or different; what it is now stands in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upsert {
    pub frontend: Frontend,
    pub previous: Option<Box<Entry>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    pub frontend: Frontend,
    pub previous: Box<Entry>,
}

/// A backend that live connections through the frontend may still point at, though it is gone: they have to be ended.
/// Terminating and unready endpoints aren't gone (for UDP: unless they no longer serve).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gone {
    pub frontend: Frontend,
    pub service: ServicePortName,
    pub backend: SocketAddr,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// The delta holds the whole table: what the kernel has beyond it is stale and is to be removed.
    pub full: bool,
    pub upserts: Vec<Upsert>,
    pub removals: Vec<Removal>,
    pub gone: Vec<Gone>,
}

impl Delta {
    /// The delta that makes a kernel of unknown content look like `table`.
    pub fn full(table: &Table) -> Self {
        let mut upserts: Vec<_> = table.iter().map(|(frontend, _)| Upsert { frontend: *frontend, previous: None }).collect();
        upserts.sort_unstable_by_key(|upsert| upsert.frontend);
        Self { full: true, upserts, ..Self::default() }
    }

    pub fn is_empty(&self) -> bool {
        !self.full && self.upserts.is_empty() && self.removals.is_empty() && self.gone.is_empty()
    }

    pub(crate) fn push(&mut self, frontend: Frontend, previous: Option<Box<Entry>>, stays: bool, gone: impl FnOnce(&Entry) -> Vec<Gone>) {
        if let Some(previous) = &previous {
            self.gone.extend(gone(previous));
        }
        match previous {
            previous if stays => self.upserts.push(Upsert { frontend, previous }),
            Some(previous) => self.removals.push(Removal { frontend, previous }),
            None => {}
        }
    }
}

/// Which of `previous`'s endpoints are dead now. A Service that is deleted ends its UDP flows (they have no end of their own) and leaves
/// established TCP connections to their endpoints, as kube-proxy does.
pub(crate) fn gone(frontend: Frontend, previous: &Entry, current: Option<&Entry>) -> Vec<Gone> {
    let alive: HashSet<SocketAddr> = match current {
        Some(current) => current.alive().map(Endpoint::socket).collect(),
        None if frontend.protocol == Protocol::Udp => HashSet::default(),
        None => return Vec::new(),
    };
    let dead: BTreeSet<SocketAddr> = previous.alive().map(Endpoint::socket).filter(|endpoint| !alive.contains(endpoint)).collect();
    dead.into_iter().map(|backend| Gone { frontend, service: previous.service.clone(), backend }).collect()
}

/// The step from `old` to `new` by comparing both whole; [`Table::update`] gives the same from what changed.
pub fn diff(old: &Table, new: &Table) -> Delta {
    let mut frontends: Vec<Frontend> = old.iter().chain(new.iter()).map(|(frontend, _)| *frontend).collect();
    frontends.sort();
    frontends.dedup();
    let mut delta = Delta::default();
    for frontend in frontends {
        let (previous, current) = (old.get(&frontend), new.get(&frontend));
        if previous != current {
            delta.push(frontend, previous.cloned().map(Box::new), current.is_some(), |previous| gone(frontend, previous, current));
        }
    }
    delta
}

/// One line per step: `+` new, `~` changed, `-` removed, `x` a backend whose connections end.
impl fmt::Display for Delta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for upsert in &self.upserts {
            writeln!(f, "{} {}", if upsert.previous.is_some() { '~' } else { '+' }, upsert.frontend)?;
        }
        for removal in &self.removals {
            writeln!(f, "- {}", removal.frontend)?;
        }
        for gone in &self.gone {
            writeln!(f, "x {} {}", gone.frontend, gone.backend)?;
        }
        Ok(())
    }
}
