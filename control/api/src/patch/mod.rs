//! The three client-side patches.
mod strategic;

use serde_json::{Value, json};

use crate::resource::Resource;
use crate::status::Status;

/// Operations a JSON patch may have.
const MAX_OPERATIONS: usize = 10_000;

/// RFC 6902. Bad patches are 400, failed tests and missing paths 422.
pub fn json(object: &mut Value, patch: &Value) -> Result<(), Status> {
    let operations: json_patch::Patch =
        serde_json::from_value(patch.clone()).map_err(|error| Status::bad_request(format!("error decoding patch: {error}")))?;
    let count = operations.0.len();
    if count > MAX_OPERATIONS {
        let message = format!("The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {count}");
        return Err(Status::request_too_large(message));
    }
    json_patch::patch(object, &operations).map_err(|error| unprocessable(error.to_string()))
}

/// RFC 7386.
pub fn merge(object: &mut Value, patch: &Value) {
    json_patch::merge(object, patch);
}

/// Kubernetes' strategic merge patch; 415 for custom resources.
pub fn strategic(resource: &Resource, object: &mut Value, patch: &Value) -> Result<(), Status> {
    let Some(root) = crate::types::by_kind(&resource.group, &resource.version, &resource.kind).filter(|_| resource.custom.is_none()) else {
        return Err(Status::unsupported_media_type(
            "application/strategic-merge-patch+json",
            &["application/json-patch+json", "application/merge-patch+json", "application/apply-patch+yaml"],
        ));
    };
    strategic::apply(root.id, object, patch)
}

/// The patch is well-formed and does not fit the object.
fn unprocessable(cause: String) -> Status {
    Status::new(422, "Invalid", "the server rejected our request due to an error in our request")
        .with_details(json!({"causes": [{"reason": "UnexpectedServerResponse", "message": cause}]}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_patches_apply_or_explain() {
        let object = json!({"a": {"b": [1, 2]}});
        for (patch, expected) in [
            (json!([{"op": "add", "path": "/a/b/-", "value": 3}]), Ok(json!({"a": {"b": [1, 2, 3]}}))),
            (json!([{"op": "test", "path": "/a/b/0", "value": 9}]), Err(422)),
            (json!([{"op": "remove", "path": "/x"}]), Err(422)),
            (json!([{"op": "nonsense"}]), Err(400)),
            (json!({"a": 1}), Err(400)),
        ] {
            let mut target = object.clone();
            let outcome = json(&mut target, &patch).map(|()| target).map_err(|status| status.code);
            assert_eq!(outcome, expected, "{patch}");
        }
    }

    #[test]
    fn merge_patches_delete_by_null() {
        let mut object = json!({"a": 1, "b": {"c": 1}});
        merge(&mut object, &json!({"a": null, "b": {"d": [1]}}));
        assert_eq!(object, json!({"b": {"c": 1, "d": [1]}}));
    }
}
