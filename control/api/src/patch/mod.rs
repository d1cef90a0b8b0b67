//! The three client-side patches.
mod strategic;

use json_patch::PatchOperation;
use serde_json::{Value, json};

use crate::meta;
use crate::resource::Resource;
use crate::status::Status;

/// Operations a JSON patch may have.
const MAX_OPERATIONS: usize = 10_000;
/// What all copies of a JSON patch may add, as JSON text.
const MAX_COPIED: usize = 3 * 1024 * 1024;

/// RFC 6902. Bad patches are 400, failed tests and missing paths 422.
pub fn json(object: &mut Value, patch: &Value) -> Result<(), Status> {
    let operations: json_patch::Patch =
        serde_json::from_value(patch.clone()).map_err(|error| Status::bad_request(format!("error decoding patch: {error}")))?;
    let count = operations.0.len();
    if count > MAX_OPERATIONS {
        let message = format!("The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {count}");
        return Err(Status::request_too_large(message));
    }
    let mut copied = 0;
    for (index, operation) in operations.0.iter().enumerate() {
        check_growth(object, operation, &mut copied)?;
        json_patch::patch(object, std::slice::from_ref(operation)).map_err(|mut error| {
            error.operation = index;
            unprocessable(error.to_string())
        })?;
    }
    Ok(())
}

/// A few copies of the object into itself would fill the memory, a few more moves the stack.
fn check_growth(object: &Value, operation: &PatchOperation, copied: &mut usize) -> Result<(), Status> {
    let level = |path: &str| path.matches('/').count();
    let path = operation.path().as_str();
    let placed = match operation {
        PatchOperation::Add(add) => Some(&add.value),
        PatchOperation::Replace(replace) => Some(&replace.value),
        PatchOperation::Copy(copy) => {
            let source = object.pointer(copy.from.as_str());
            *copied += source.map_or(0, |value| value.to_string().len());
            source
        }
        PatchOperation::Move(from) if level(path) > level(from.from.as_str()) => object.pointer(from.from.as_str()),
        _ => None,
    };
    if *copied > MAX_COPIED {
        let message =
            format!("Unable to complete the copy, the accumulated size increase of copy is {copied}, exceeding the limit {MAX_COPIED}");
        return Err(unprocessable(message));
    }
    if placed.is_some_and(|value| level(path) > meta::MAX_DEPTH || meta::deeper_than(value, meta::MAX_DEPTH - level(path))) {
        return Err(unprocessable("exceeded max depth".to_string()));
    }
    Ok(())
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
    fn json_patches_cannot_grow_an_object_without_bound() {
        let cause = |patch: Value| {
            let mut object = json!({"text": "x".repeat(1024)});
            let error = json(&mut object, &patch).expect_err("too much");
            assert_eq!(error.code, 422);
            error.to_value()["details"]["causes"][0]["message"].as_str().unwrap_or_default().to_string()
        };
        let doubling = (0..20).map(|number| json!({"op": "copy", "from": "", "path": format!("/k{number}")})).collect();
        assert!(cause(doubling).contains("accumulated size increase of copy"));
        let nested = |levels: usize| (1..levels).fold(json!({}), |inner, _| json!({"x": inner}));
        let path = format!("/e{}", "/x".repeat(40));
        assert_eq!(
            cause(json!([
                {"op": "add", "path": "/d", "value": nested(100)},
                {"op": "add", "path": "/e", "value": nested(40)},
                {"op": "move", "from": "/d", "path": path},
            ])),
            "exceeded max depth"
        );
        assert!(!meta::deeper_than(&nested(100), 100) && meta::deeper_than(&nested(101), 100));
    }

    #[test]
    fn merge_patches_delete_by_null() {
        let mut object = json!({"a": 1, "b": {"c": 1}});
        merge(&mut object, &json!({"a": null, "b": {"d": [1]}}));
        assert_eq!(object, json!({"b": {"c": 1, "d": [1]}}));
    }
}
