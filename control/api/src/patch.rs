//! The three client-side patches.
use serde_json::Value;

use crate::resource::Resource;
use crate::status::Status;

/// RFC 6902. Bad patches are 400, failed tests and missing paths 422.
pub fn json(_object: &mut Value, _patch: &Value) -> Result<(), Status> {
    Ok(())
}

/// RFC 7386.
pub fn merge(_object: &mut Value, _patch: &Value) {}

/// Kubernetes' strategic merge patch; 415 for custom resources.
pub fn strategic(_resource: &Resource, _object: &mut Value, _patch: &Value) -> Result<(), Status> {
    Ok(())
}
