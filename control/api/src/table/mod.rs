//! `kubectl get`: columns and cells per kind.
use jiff::Timestamp;
use serde_json::Value;

use crate::resource::Resource;

/// What a row carries besides its cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum IncludeObject {
    None,
    #[default]
    Metadata,
    Object,
}

/// `columnDefinitions` of the resource.
pub fn columns(_resource: &Resource) -> Vec<Value> {
    Vec::new()
}

/// One row: `cells` and, as asked, `object`.
pub fn row(_resource: &Resource, _object: &Value, _include: IncludeObject, _now: Timestamp) -> Value {
    Value::Null
}

/// A whole `meta.k8s.io/v1 Table`; `list_metadata` is the list's (resourceVersion, continue, remainingItemCount).
pub fn render<'a>(
    resource: &Resource,
    list_metadata: Value,
    objects: impl IntoIterator<Item = &'a Value>,
    include: IncludeObject,
    now: Timestamp,
) -> Value {
    let rows: Vec<Value> = objects.into_iter().map(|object| row(resource, object, include, now)).collect();
    serde_json::json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": list_metadata, "columnDefinitions": columns(resource), "rows": rows})
}
