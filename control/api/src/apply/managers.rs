//! `metadata.managedFields`: one entry per manager, operation and subresource (and version, for updates).
use serde_json::{Map, Value, json};

use super::set::{Element, FieldSet, path_text};
use crate::meta;
use crate::status::Status;

/// Entries of updates beyond this number are put together, the oldest first.
const MOST_UPDATERS: usize = 10;
const ANCIENT: &str = "ancient-changes";

#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub manager: String,
    pub applied: bool,
    pub api_version: String,
    pub subresource: String,
    /// RFC 3339, to the second.
    pub time: Option<String>,
    pub fields: FieldSet,
}

impl Entry {
    /// Whether this is the entry that the other one's manager would write to.
    pub fn is_same(&self, other: &Entry) -> bool {
        self.manager == other.manager
            && self.applied == other.applied
            && self.subresource == other.subresource
            && (self.applied || self.api_version == other.api_version)
    }

    fn read(value: &Value) -> Option<Entry> {
        let text = |key: &str| meta::text(value, key).to_string();
        let applied = match meta::text(value, "operation") {
            "Apply" => true,
            "Update" => false,
            _ => return None,
        };
        if text("apiVersion").is_empty() || text("fieldsType") != "FieldsV1" {
            return None;
        }
        let fields = match &value["fieldsV1"] {
            Value::Null => FieldSet::default(),
            fields => FieldSet::read(fields)?,
        };
        Some(Entry {
            manager: text("manager"),
            applied,
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: value["time"].as_str().map(String::from),
            fields,
        })
    }

    fn to_value(&self) -> Value {
        let mut map = Map::new();
        let mut put = |key: &str, text: &str| {
            if !text.is_empty() {
                map.insert(key.into(), text.into());
            }
        };
        put("manager", &self.manager);
        put("operation", if self.applied { "Apply" } else { "Update" });
        put("apiVersion", &self.api_version);
        put("time", self.time.as_deref().unwrap_or_default());
        put("fieldsType", "FieldsV1");
        map.insert("fieldsV1".into(), self.fields.to_value());
        if !self.subresource.is_empty() {
            map.insert("subresource".into(), self.subresource.as_str().into());
        }
        Value::Object(map)
    }

    /// How conflicts name the entry.
    fn describe(&self) -> String {
        let mut text = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            text.push_str(&format!(" with subresource {:?}", self.subresource));
        }
        if !self.applied {
            text.push_str(&format!(" using {}", self.api_version));
        }
        text
    }
}

/// The entries of an object; none if one is malformed.
pub fn read(object: &Value) -> Option<Vec<Entry>> {
    meta::items(object, "metadata.managedFields").iter().map(Entry::read).collect()
}

/// Whether a request asks for a fresh start: an empty list, or one empty entry.
pub fn is_reset(object: &Value) -> bool {
    match meta::get(object, "metadata.managedFields").as_array().map(Vec::as_slice) {
        Some([]) => true,
        Some([one]) => one.as_object().is_some_and(Map::is_empty),
        _ => false,
    }
}

/// Writes the entries in upstream's order: by operation, time, manager, version, subresource.
pub fn write(object: &mut Value, mut entries: Vec<Entry>) {
    entries.retain(|entry| !entry.fields.is_empty());
    if entries.is_empty() {
        meta::remove(object, "metadata.managedFields");
        return;
    }
    let key =
        |entry: &Entry| (!entry.applied, entry.time.clone(), entry.manager.clone(), entry.api_version.clone(), entry.subresource.clone());
    entries.sort_by_key(key);
    let list: Vec<Value> = entries.iter().map(Entry::to_value).collect();
    meta::child_mut(object, "metadata").insert("managedFields".into(), list.into());
}

/// Puts the oldest entries of updates together until there are not too many.
pub fn cap(entries: &mut Vec<Entry>) {
    let mut updaters: Vec<Entry> = entries.extract_if(.., |entry| !entry.applied).collect();
    updaters.sort_by(|left, right| (&left.time, &left.manager).cmp(&(&right.time, &right.manager)));
    let mut place = 0;
    while updaters.len() > MOST_UPDATERS && place < updaters.len() {
        let later = updaters[place + 1..].iter().position(|entry| entry.api_version == updaters[place].api_version);
        let Some(later) = later.map(|offset| place + 1 + offset) else {
            place += 1;
            continue;
        };
        let merged = updaters.remove(later);
        let bucket = &mut updaters[place];
        bucket.manager = ANCIENT.into();
        bucket.subresource = String::new();
        bucket.fields = bucket.fields.union(&merged.fields);
        bucket.time = merged.time;
    }
    entries.extend(updaters);
}

/// Takes over the old times where nothing but times differs, so that such a write is none.
pub fn keep_times(new: &mut Value, old: &Value) {
    let timeless = |object: &Value| -> Vec<Value> {
        let mut list = meta::items(object, "metadata.managedFields").to_vec();
        list.iter_mut().filter_map(Value::as_object_mut).for_each(|entry| drop(entry.shift_remove("time")));
        list
    };
    let (before, after) = (timeless(old), timeless(new));
    if before.len() == after.len() && after.iter().all(|entry| before.contains(entry)) && !before.is_empty() {
        meta::set(new, "metadata.managedFields", meta::get(old, "metadata.managedFields").clone());
    }
}

/// One field that another manager has with another value.
#[derive(Clone, Debug)]
pub struct Conflict {
    pub entry: Entry,
    pub path: Vec<Element>,
}

/// 409 with a cause per field.
pub fn refusal(mut conflicts: Vec<Conflict>) -> Status {
    conflicts.sort_by_key(|conflict| conflict.entry.describe());
    let causes: Vec<Value> = conflicts
        .iter()
        .map(|conflict| {
            let message = format!("conflict with {}", conflict.entry.describe());
            json!({"reason": "FieldManagerConflict", "message": message, "field": path_text(&conflict.path)})
        })
        .collect();
    let message = match conflicts.as_slice() {
        [one] => format!("Apply failed with 1 conflict: conflict with {}: {}", one.entry.describe(), path_text(&one.path)),
        many => {
            let mut lines = Vec::new();
            let mut last = String::new();
            for conflict in many {
                let name = conflict.entry.describe();
                if name != last {
                    lines.push(format!("conflicts with {name}:"));
                    last = name;
                }
                lines.push(format!("- {}", path_text(&conflict.path)));
            }
            format!("Apply failed with {} conflicts: {}", many.len(), lines.join("\n"))
        }
    };
    Status::new(409, "Conflict", message).with_details(json!({"causes": causes}))
}
