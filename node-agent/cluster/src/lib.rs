//! What the agent knows of the cluster: [`watch`] is the only place that reads the API, [`status`] the only one that writes it.
pub mod mirror;
pub mod status;
pub mod watch;

pub use mirror::{Delta, Mirror, Object, Subscription};
