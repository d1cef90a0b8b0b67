//! From the desired table to the kernel: the choice of a backend, the loop that feeds it, and the three backends. Network policies
//! have two of their own.
pub mod backend;
pub mod config;
pub mod conntrack;
pub mod ebpf;
pub mod health;
pub mod metrics;
mod namespace;
mod netlink;
pub mod nftables;
pub mod policy;
pub mod probe;
pub mod proxy;
pub mod sight;
#[cfg(test)]
mod testing;
pub mod userspace;

pub use backend::{Applied, Backend, BackendError, Live, Parting, Pending, Restored};
pub use config::{Config, Mode, ModeChoice, PodInterfaces};
pub use probe::Choice;
pub use proxy::{Health, Proxy, ProxyHandle, View};
pub use sight::{Counted, Counts};
