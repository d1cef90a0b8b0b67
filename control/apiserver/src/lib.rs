//! The API server: one engine for all kinds, driven by the resource table.
//!
//! A request passes [`engine`] (identity, permission), is understood by [`request`] and [`negotiate`], is carried out by [`registry`]
//! behind [`admission`], and answered by [`reply`]. Reads come from [`cache`], which [`feed`] keeps in step with the store.

pub mod server;
pub mod request;
pub mod negotiate;
pub mod body;
pub mod reply;
pub mod call;
pub mod engine;
pub mod discovery;
pub mod openapi;
pub mod admission;
pub mod registry;
pub mod protobuf;
pub mod proxy;
pub mod cache;
pub mod feed;
pub mod bootstrap;
pub mod config;
pub mod metrics;
pub mod error;
mod start;

pub use config::Config;
pub use engine::Engine;
pub use error::StartError;
pub use start::ApiServer;
