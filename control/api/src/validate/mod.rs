//! Validation of objects before they are stored.
use serde_json::Value;

use crate::field_error::FieldError;
use crate::resource::Resource;

/// Findings for a new object that is defaulted and prepared.
pub fn create(_resource: &Resource, _object: &Value) -> Vec<FieldError> {
    Vec::new()
}

/// Findings for a changed object; `subresource` as in the URL (`status`, `scale`, …).
pub fn update(_resource: &Resource, _subresource: Option<&str>, _new: &Value, _old: &Value) -> Vec<FieldError> {
    Vec::new()
}
