//! The registry strategies: what the server sets, keeps and drops on create and update.
use jiff::Timestamp;
use serde_json::Value;

use crate::resource::Resource;

/// After [`crate::meta::stamp_new`] and defaulting, before validation: resets status, sets generation and the kind's own server-side fields.
pub fn create(_resource: &Resource, _object: &mut Value, _now: Timestamp) {}

/// Before validation: carries over what the request may not change (uid, creationTimestamp, deletion, generation; status, or all but
/// status for the `status` subresource), and bumps the generation when the spec changed.
pub fn update(_resource: &Resource, _subresource: Option<&str>, _new: &mut Value, _old: &Value, _now: Timestamp) {}
