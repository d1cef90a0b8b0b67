//! Pods: the tolerations every pod has, and what its RuntimeClass asks for.

use outrigger_api::{Status, meta};
use serde_json::{Value, json};

use super::{Attributes, Operation, Plugin, lookup};
use crate::engine::Engine;

/// DefaultTolerationSeconds: 300 s on a node that is not ready or unreachable.
pub struct DefaultTolerationSeconds;

const DEFAULT_SECONDS: i64 = 300;

impl Plugin for DefaultTolerationSeconds {
    fn mutate(&self, _engine: &Engine, attributes: &Attributes<'_>, pod: &mut Value) -> Result<(), Status> {
        let applies = attributes.is("", "Pod") && attributes.operation != Operation::Delete;
        if !applies {
            return Ok(());
        }
        let mut tolerations = meta::items(pod, "spec.tolerations").to_vec();
        let before = tolerations.len();
        for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
            let tolerated = |t: &Value| {
                let (said, effect) = (t["key"].as_str().unwrap_or_default(), t["effect"].as_str().unwrap_or_default());
                (said == key || said.is_empty()) && matches!(effect, "NoExecute" | "")
            };
            if !tolerations.iter().any(tolerated) {
                tolerations.push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": DEFAULT_SECONDS}));
            }
        }
        if tolerations.len() > before {
            meta::set(pod, "spec.tolerations", tolerations);
        }
        Ok(())
    }
}

/// RuntimeClass: overhead, node selector and tolerations of the class.
pub struct RuntimeClass;

impl Plugin for RuntimeClass {
    fn mutate(&self, engine: &Engine, attributes: &Attributes<'_>, pod: &mut Value) -> Result<(), Status> {
        let name = meta::text(pod, "spec.runtimeClassName").to_string();
        if !attributes.creates("", "Pod") || name.is_empty() {
            return Ok(());
        }
        let Some(class) = lookup(engine, "node.k8s.io", "runtimeclasses", "", &name) else {
            return Err(attributes.forbidden(format!("pod rejected: RuntimeClass {name:?} not found")));
        };
        let overhead = meta::get(&class, "overhead.podFixed");
        if !overhead.is_null() {
            let said = meta::get(pod, "spec.overhead");
            if !said.is_null() && said != overhead {
                let why = "pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead";
                return Err(attributes.forbidden(why));
            }
            meta::set(pod, "spec.overhead", overhead.clone());
        }
        for (key, value) in meta::string_entries(meta::get(&class, "scheduling.nodeSelector")) {
            let selector = meta::map_mut(meta::child_mut(pod, "spec").entry("nodeSelector").or_insert(Value::Null));
            if selector.get(key).is_some_and(|said| said != value) {
                let why = format!("pod rejected: conflict: runtimeClass.scheduling.nodeSelector[{key}] = {value}");
                return Err(attributes.forbidden(why));
            }
            selector.insert(key.into(), value.into());
        }
        let mut tolerations = meta::items(pod, "spec.tolerations").to_vec();
        for toleration in meta::items(&class, "scheduling.tolerations") {
            if !tolerations.contains(toleration) {
                tolerations.push(toleration.clone());
            }
        }
        if !tolerations.is_empty() {
            meta::set(pod, "spec.tolerations", tolerations);
        }
        Ok(())
    }

    fn validate(&self, _engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        let Some(pod) = object.filter(|_| attributes.creates("", "Pod")) else { return Ok(()) };
        if meta::text(pod, "spec.runtimeClassName").is_empty() && !meta::is_empty(meta::get(pod, "spec.overhead")) {
            return Err(attributes.forbidden("pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead"));
        }
        Ok(())
    }
}
