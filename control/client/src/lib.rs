//! Reading objects as Go's clients do, for every program here that follows the API.
//!
//! The API takes `null` where Go's types have their zero value, but `k8s-openapi` demands a time in each
//! `metav1.Condition`. One such object must not blind a program to all others of its kind, so lists and watches are
//! decoded object by object: repaired where that is possible, else kept by their metadata alone.
use std::borrow::Cow;
use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;
use tracing::warn;

/// An object of a list or a watch.
#[derive(Clone, Debug)]
pub enum Decoded<K> {
    Whole(K),
    Unreadable(Box<Unreadable>),
}

/// What is left of an object that isn't what its kind demands.
#[derive(Clone, Debug)]
pub struct Unreadable {
    pub metadata: ObjectMeta,
    pub error: String,
}

impl<K> Decoded<K> {
    /// The object; or, for the caller's log, why there is none.
    pub fn whole(self) -> Result<K, Box<Unreadable>> {
        match self {
            Self::Whole(object) => Ok(object),
            Self::Unreadable(unreadable) => Err(unreadable),
        }
    }
}

impl<K: Resource<DynamicType: Default>> Decoded<K> {
    /// The object; one that isn't what its kind demands is left out, with a word in the log, and hides nothing else.
    pub fn readable(self) -> Option<K> {
        let kind = K::kind(&K::DynamicType::default()).into_owned();
        self.whole().inspect_err(|error| warn!(kind, %error, "can't read an object; it is left out")).ok()
    }
}

impl<K: Clone> Decoded<K> {
    /// The last state of an object that is gone: as the watch tells it, else as it was held.
    pub fn last_state(self, held: impl FnOnce(&ObjectMeta) -> Option<Arc<K>>) -> Option<K> {
        self.whole().map_or_else(|gone| held(&gone.metadata).map(|held| (*held).clone()), Some)
    }
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = self.metadata.name.as_deref().unwrap_or_default();
        match &self.metadata.namespace {
            Some(namespace) => write!(f, "{namespace}/{name}: {}", self.error),
            None => write!(f, "{name}: {}", self.error),
        }
    }
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Decoded<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Named {
            metadata: ObjectMeta,
        }
        let raw = <&RawValue>::deserialize(deserializer)?.get();
        if let Ok(object) = serde_json::from_str(raw) {
            return Ok(Self::Whole(object));
        }
        let mut value: Value = serde_json::from_str(raw).map_err(D::Error::custom)?;
        set_zero_times(&mut value);
        match K::deserialize(&value) {
            Ok(object) => Ok(Self::Whole(object)),
            Err(error) => {
                let Named { metadata } = Named::deserialize(value).map_err(D::Error::custom)?;
                Ok(Self::Unreadable(Box::new(Unreadable { metadata, error: error.to_string() })))
            }
        }
    }
}

/// Go's zero time where a condition has none.
fn set_zero_times(value: &mut Value) {
    const TIME: &str = "lastTransitionTime";
    match value {
        Value::Array(items) => items.iter_mut().for_each(set_zero_times),
        Value::Object(fields) => {
            let is_condition = fields.contains_key("type") && fields.contains_key("status");
            if is_condition && fields.get(TIME).is_none_or(Value::is_null) {
                fields.insert(TIME.into(), "0001-01-01T00:00:00Z".into());
            }
            fields.values_mut().for_each(set_zero_times);
        }
        _ => {}
    }
}

impl<K: Resource> Resource for Decoded<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(dt)
    }

    fn group(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::group(dt)
    }

    fn version(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::version(dt)
    }

    fn plural(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        match self {
            Self::Whole(object) => object.meta(),
            Self::Unreadable(unreadable) => &unreadable.metadata,
        }
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Whole(object) => object.meta_mut(),
            Self::Unreadable(unreadable) => &mut unreadable.metadata,
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;
    use kube::api::WatchEvent;
    use kube::core::ObjectList;

    use super::*;

    const NO_TIME: &str = r#"{"metadata":{"name":"a","namespace":"n","resourceVersion":"7"},
        "status":{"conditions":[{"type":"T","status":"True","reason":"R","message":"m","lastTransitionTime":null}]}}"#;
    const NO_SERVICE: &str = r#"{"metadata":{"name":"b","namespace":"n","resourceVersion":"8"},"spec":{"ports":"none"}}"#;

    #[test]
    fn a_condition_without_a_time_gets_gos_zero_time() {
        let event: WatchEvent<Decoded<Service>> = serde_json::from_str(&format!(r#"{{"type":"ADDED","object":{NO_TIME}}}"#)).unwrap();
        let WatchEvent::Added(object) = event else { panic!("not added: {event:?}") };
        let condition = object.whole().unwrap().status.unwrap().conditions.unwrap().remove(0);
        assert_eq!(condition.last_transition_time.0.to_string(), "0001-01-01T00:00:00Z");
    }

    #[test]
    fn one_unreadable_object_of_a_list_leaves_the_others_readable() {
        let list = format!(r#"{{"kind":"ServiceList","apiVersion":"v1","metadata":{{}},"items":[{NO_SERVICE},{NO_TIME}]}}"#);
        let list: ObjectList<Decoded<Service>> = serde_json::from_str(&list).unwrap();
        let names: Vec<_> = list.items.iter().map(|item| (item.meta().name.clone().unwrap(), item.clone().whole().is_ok())).collect();
        assert_eq!(names, [("b".to_owned(), false), ("a".to_owned(), true)]);
        let error = list.items[0].clone().whole().unwrap_err().to_string();
        assert!(error.starts_with("n/b: invalid type: string \"none\""), "{error}");
    }
}
