//! Pods: what they should be (`plan`), how they go (`machine`, `worker`), what is done (`sync`, `start`), how they look (`status`).
mod actuate;
pub mod admission;
pub mod backoff;
mod conditions;
mod container;
pub mod dns;
pub mod env;
mod hooks;
pub mod machine;
pub mod meta;
pub mod plan;
pub mod record;
pub mod resize;
pub mod resources;
mod sandbox;
mod start;
pub mod status;
mod sync;
#[cfg(test)]
pub mod test_data;
pub mod worker;

pub use start::StartError;
