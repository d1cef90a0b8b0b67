//! Priority: a pod's class becomes a number, and at most one class is the default.

use outrigger_api::{Status, meta};
use serde_json::Value;

use super::{Attributes, Operation, Plugin, all, lookup};
use crate::engine::Engine;

pub struct Priority;

impl Plugin for Priority {
    fn mutate(&self, engine: &Engine, attributes: &Attributes<'_>, pod: &mut Value) -> Result<(), Status> {
        if !attributes.is("", "Pod") {
            return Ok(());
        }
        if let (Operation::Update, Some(old)) = (attributes.operation, attributes.old) {
            for field in ["spec.priority", "spec.preemptionPolicy"] {
                if meta::get(pod, field).is_null() && !meta::get(old, field).is_null() {
                    meta::set(pod, field, meta::get(old, field).clone());
                }
            }
            return Ok(());
        }
        let (name, value, policy) = class_of(engine, attributes, pod)?;
        let said = meta::get(pod, "spec.priority").as_i64();
        if said.is_some_and(|said| said != value) {
            return Err(attributes.forbidden(format!(
                "the integer value of priority ({}) must not be provided in pod spec; priority admission controller computed {value} from the given PriorityClass name",
                said.unwrap_or_default()
            )));
        }
        if !name.is_empty() {
            meta::set(pod, "spec.priorityClassName", name);
        }
        meta::set(pod, "spec.priority", value);
        if let Some(said) = meta::get(pod, "spec.preemptionPolicy").as_str()
            && said != policy
        {
            return Err(attributes.forbidden(format!(
                "the string value of PreemptionPolicy ({said}) must not be provided in pod spec; priority admission controller computed {policy} from the given PriorityClass name"
            )));
        }
        meta::set(pod, "spec.preemptionPolicy", policy);
        Ok(())
    }

    fn validate(&self, engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        let Some(class) = object.filter(|o| attributes.is("scheduling.k8s.io", "PriorityClass") && o["globalDefault"] == true) else {
            return Ok(());
        };
        let other = all(engine, "scheduling.k8s.io", "priorityclasses", "")
            .into_iter()
            .find(|known| known["globalDefault"] == true && meta::name(known) != meta::name(class));
        match other {
            Some(other) => Err(attributes
                .forbidden(format!("PriorityClass {} is already marked as default. Only one default can exist", meta::name(&other)))),
            None => Ok(()),
        }
    }
}

/// Name, value and preemption policy that the pod gets.
fn class_of(engine: &Engine, attributes: &Attributes<'_>, pod: &Value) -> Result<(String, i64, String), Status> {
    let name = meta::text(pod, "spec.priorityClassName");
    let class = if name.is_empty() {
        let defaults = all(engine, "scheduling.k8s.io", "priorityclasses", "").into_iter().filter(|c| c["globalDefault"] == true);
        defaults.min_by_key(|c| c["value"].as_i64().unwrap_or_default())
    } else {
        let class = lookup(engine, "scheduling.k8s.io", "priorityclasses", "", name);
        Some(class.ok_or_else(|| attributes.forbidden(format!("no PriorityClass with name {name} was found")))?)
    };
    Ok(match class {
        None => (String::new(), 0, "PreemptLowerPriority".into()),
        Some(class) => {
            let policy = class["preemptionPolicy"].as_str().unwrap_or("PreemptLowerPriority").to_string();
            (meta::name(&class).into(), class["value"].as_i64().unwrap_or_default(), policy)
        }
    })
}
