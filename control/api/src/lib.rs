//! What the API server knows about kinds, as pure functions over `serde_json::Value`.
//!
//! The order of a write: [`decode::decode`] (or [`schema::prune`] for custom resources) → [`default::apply`] → [`prepare::create`] or
//! [`prepare::update`] → [`validate::create`] or [`validate::update`] → [`convert::to_storage`]. A read is [`convert::to_version`] and, on
//! request, [`table::render`].
pub mod meta;
pub mod names;
pub mod quantity;
pub mod quota;
pub mod time;

pub mod jsonpath;

pub mod field_error;
pub mod status;

pub mod builtin;
pub mod custom;
pub mod decode;
pub mod resource;
pub mod rules;
pub mod schema;
pub mod types;

pub mod apply;
pub mod cel;
pub mod convert;
pub mod default;
pub mod patch;
pub mod prepare;
pub mod scale;
pub mod selector;
pub mod table;
pub mod validate;

pub use field_error::FieldError;
pub use resource::{Catalog, GroupVersionKind, GroupVersionResource, Resource, Subresource};
pub use status::Status;
