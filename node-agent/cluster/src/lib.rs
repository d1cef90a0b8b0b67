//! What the agent knows of the cluster: [`watch`], [`peers`] and [`lookup`] are the only places that read the API, [`status`] the only one that
//! writes it; [`access`] asks it who may use the node's own API.
pub mod access;
pub mod lookup;
pub mod mirror;
pub mod peers;
pub mod status;
pub mod watch;

pub use lookup::Lookup;
pub use mirror::{Delta, Key, Mirror, Object, Subscription};
pub use status::Writer;
