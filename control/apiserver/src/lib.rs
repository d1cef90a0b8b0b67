//! The API server: one engine for all kinds, driven by the resource table.
//!
//! A request passes [`engine`] (identity, permission), is understood by [`request`] and [`negotiate`], is carried out by [`registry`]
//! behind [`admission`], and answered by [`reply`]. Reads come from [`cache`], which [`feed`] keeps in step with the store.
#![allow(clippy::result_large_err, reason = "only a start that fails returns the large error, and it ends the process")]

pub mod admission;
pub mod aggregator;
pub mod body;
pub mod bootstrap;
pub mod cache;
pub mod call;
pub mod config;
pub mod discovery;
pub mod engine;
pub mod error;
pub mod feed;
pub mod metrics;
pub mod negotiate;
pub mod openapi;
pub mod protobuf;
pub mod proxy;
pub mod registry;
pub mod reply;
pub mod request;
pub mod server;
mod start;
pub mod webhook;

pub use config::Config;
pub use engine::Engine;
pub use error::StartError;
pub use start::ApiServer;
