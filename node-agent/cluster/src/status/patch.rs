//! The smallest strategic merge patch that turns one status into another.
use serde_json::{Map, Value, json};

/// A list that the API server merges by key instead of replacing it.
#[derive(Clone, Copy, Debug)]
pub struct MergedList {
    pub field: &'static str,
    pub key: &'static str,
}

/// The merged lists of a PodStatus; all its other lists are replaced as a whole.
pub const POD_STATUS: &[MergedList] = &[
    MergedList { field: "conditions", key: "type" },
    MergedList { field: "podIPs", key: "ip" },
    MergedList { field: "hostIPs", key: "ip" },
    MergedList { field: "resourceClaimStatuses", key: "name" },
];

/// The merged lists of a NodeStatus.
pub const NODE_STATUS: &[MergedList] = &[MergedList { field: "conditions", key: "type" }, MergedList { field: "addresses", key: "type" }];

/// `None` when there is nothing to change. Both values are objects; `lists` says which of their fields are merged by key.
pub fn difference(old: &Value, new: &Value, lists: &[MergedList]) -> Option<Value> {
    let empty = Map::new();
    let old = old.as_object().unwrap_or(&empty);
    let new = new.as_object().unwrap_or(&empty);
    let mut patch = Map::new();
    for (field, value) in new {
        let before = old.get(field);
        if before == Some(value) {
            continue;
        }
        let change = match (lists.iter().find(|list| list.field == field), before, value) {
            (Some(list), Some(Value::Array(before)), Value::Array(after)) => merged_list(before, after, list.key).map(Value::Array),
            (None, Some(before @ Value::Object(_)), Value::Object(_)) => difference(before, value, &[]),
            _ => Some(value.clone()),
        };
        if let Some(change) = change {
            if let (Some(list), Value::Array(after)) = (lists.iter().find(|list| list.field == field), value) {
                // Keeps the order of the list as a whole, not only of the entries sent.
                let order: Vec<&Value> = after.iter().filter_map(|entry| entry.get(list.key)).collect();
                patch.insert(
                    format!("$setElementOrder/{field}"),
                    json!(order.iter().map(|key| json!({ list.key: key })).collect::<Vec<_>>()),
                );
            }
            patch.insert(field.clone(), change);
        }
    }
    for field in old.keys().filter(|field| !new.contains_key(*field)) {
        patch.insert(field.clone(), Value::Null);
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

fn merged_list(before: &[Value], after: &[Value], key: &str) -> Option<Vec<Value>> {
    let mut patch = Vec::new();
    for entry in after {
        let same = before.iter().find(|old| old.get(key) == entry.get(key));
        match same {
            Some(old) if old == entry => {}
            // Fields that went away need a null, or the merge would keep them.
            Some(old) => {
                let mut change = difference(old, entry, &[]).unwrap_or_else(|| json!({}));
                if let (Some(change), Some(name)) = (change.as_object_mut(), entry.get(key)) {
                    change.insert(key.to_owned(), name.clone());
                }
                patch.push(change);
            }
            None => patch.push(entry.clone()),
        }
    }
    for old in before.iter().filter(|old| !after.iter().any(|entry| entry.get(key) == old.get(key))) {
        patch.push(json!({ "$patch": "delete", key: old.get(key) }));
    }
    let moved = || before.iter().map(|entry| entry.get(key)).ne(after.iter().map(|entry| entry.get(key)));
    (!patch.is_empty() || moved()).then_some(patch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_sent() {
        let old = json!({"phase": "Pending", "conditions": [{"type": "Ready", "status": "False", "reason": "X"}, {"type": "Other", "status": "True"}], "podIPs": [{"ip": "10.0.0.1"}]});
        let new = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}, {"type": "Other", "status": "True"}], "podIPs": [{"ip": "10.0.0.2"}]});
        let patch = difference(&old, &new, POD_STATUS).unwrap();
        assert_eq!(
            patch,
            json!({
                "phase": "Running",
                "$setElementOrder/conditions": [{"type": "Ready"}, {"type": "Other"}],
                "conditions": [{"status": "True", "reason": null, "type": "Ready"}],
                "$setElementOrder/podIPs": [{"ip": "10.0.0.2"}],
                "podIPs": [{"ip": "10.0.0.2"}, {"$patch": "delete", "ip": "10.0.0.1"}],
            })
        );
    }

    #[test]
    fn equal_statuses_need_no_write() {
        let status = json!({"phase": "Running", "containerStatuses": [{"name": "a"}]});
        assert_eq!(difference(&status, &status, POD_STATUS), None);
    }

    #[test]
    fn plain_lists_are_replaced_and_lost_fields_nulled() {
        let old = json!({"reason": "Evicted", "containerStatuses": [{"name": "a", "ready": false}]});
        let new = json!({"containerStatuses": [{"name": "a", "ready": true}]});
        let patch = difference(&old, &new, POD_STATUS).unwrap();
        assert_eq!(patch, json!({"containerStatuses": [{"name": "a", "ready": true}], "reason": null}));
    }
}
