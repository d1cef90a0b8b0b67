//! Versions of one kind: from and to the stored one.
use serde_json::Value;

use crate::resource::Resource;

/// Turns an object of `resource`'s version into the stored version, `apiVersion` and `kind` included.
pub fn to_storage(resource: &Resource, object: &mut Value) {
    crate::meta::set_type(
        object,
        &crate::resource::api_version(&resource.storage.group, &resource.storage.version),
        &resource.storage.kind,
    );
}

/// Turns a stored object into `resource`'s version. Custom resources with a webhook are the caller's business.
pub fn to_version(resource: &Resource, object: &mut Value) {
    crate::meta::set_type(object, &resource.api_version(), &resource.kind);
}

/// Whether the stored bytes can be served as they are.
pub fn is_identity(resource: &Resource) -> bool {
    resource.group == resource.storage.group && resource.version == resource.storage.version
}
