//! Watched objects in, what this node's Service path should look like out. No I/O.
//!
//! [`state::State`] is the inert copy of what was watched, with one mutator; [`table::Table`] is what the kernel should do about it;
//! [`diff::Delta`] is the step from one table to the next; [`trace`] answers where a packet would go.
pub mod diff;
pub mod names;
mod plan;
pub mod policy;
pub mod state;
pub mod table;
pub mod trace;

pub use diff::{Delta, Gone, Removal, Upsert, diff};
pub use names::{Family, Owner, Protocol, ServiceName, ServicePortName};
pub use state::{Change, State, Touched, Watched};
pub use table::{Address, Balancing, Endpoint, Entry, Frontend, HealthCheck, Kind, Masquerade, NoEndpoints, Table};
