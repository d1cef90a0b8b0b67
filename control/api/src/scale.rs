//! `autoscaling/v1 Scale` of the kinds that have it.
use serde_json::{Value, json};

use crate::jsonpath::JsonPath;
use crate::meta;
use crate::resource::{CustomFacts, Resource};
use crate::selector::LabelSelector;
use crate::status::Status;

/// The Scale of an object; none for kinds without one.
pub fn read(resource: &Resource, object: &Value) -> Option<Value> {
    resource.subresource("scale")?;
    let (wanted, current, selector) = match &resource.custom {
        Some(custom) => custom_counts(custom, object)?,
        None => {
            let selector = meta::get(object, "spec.selector");
            let selector = if resource.kind == "ReplicationController" {
                LabelSelector::from_map(selector).to_string()
            } else {
                LabelSelector::from_object(selector).map(|selector| selector.to_string()).unwrap_or_default()
            };
            let count = |path: &str| meta::get(object, path).as_i64().unwrap_or_default();
            (count("spec.replicas"), count("status.replicas"), selector)
        }
    };
    let mut scale = json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {},
        "spec": {},
        "status": {"replicas": current},
    });
    for key in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        let value = &object["metadata"][key];
        if !value.is_null() {
            scale["metadata"][key] = value.clone();
        }
    }
    if wanted != 0 {
        scale["spec"]["replicas"] = wanted.into();
    }
    if !selector.is_empty() {
        scale["status"]["selector"] = selector.into();
    }
    Some(scale)
}

/// Wanted and current replicas and the selector's text; none if the object has no wanted count to scale from.
fn custom_counts(custom: &CustomFacts, object: &Value) -> Option<(i64, i64, String)> {
    let paths = custom.scale.as_ref()?;
    let at = |path: &str| JsonPath::parse(path).ok().and_then(|path| path.find(object).first().copied().cloned()).unwrap_or_default();
    let selector = paths.label_selector.as_deref().map(|path| at(path).as_str().unwrap_or_default().to_string()).unwrap_or_default();
    Some((at(&paths.spec_replicas).as_i64().unwrap_or_default(), at(&paths.status_replicas).as_i64().unwrap_or_default(), selector))
}

/// Puts `scale.spec.replicas` onto the object; the Scale's resourceVersion, if given, becomes the object's precondition.
pub fn write(resource: &Resource, object: &mut Value, scale: &Value) -> Result<(), Status> {
    let name = meta::name(scale);
    let replicas = meta::get(scale, "spec.replicas").as_i64().unwrap_or_default();
    if replicas < 0 {
        let error = crate::FieldError::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
        return Err(Status::invalid("autoscaling", "Scale", name, &[error]));
    }
    let path = match &resource.custom {
        Some(custom) => custom.scale.as_ref().map(|paths| paths.spec_replicas.trim_start_matches('.').to_string()),
        None => Some("spec.replicas".to_string()),
    };
    let Some(path) = path else { return Err(Status::path_not_found()) };
    meta::set(object, &path, replicas);
    let version = meta::resource_version(scale);
    if !version.is_empty() {
        meta::set_resource_version(object, version);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deployments_scale() {
        let deployments = crate::builtin::by_kind("apps", "v1", "Deployment").expect("built in");
        let mut object = json!({"metadata": {"name": "a", "namespace": "b", "resourceVersion": "7", "labels": {"x": "y"}},
            "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "a"}}}, "status": {"replicas": 2}});
        let mut scale = read(deployments, &object).expect("has scale");
        assert_eq!(scale["spec"], json!({"replicas": 3}));
        assert_eq!(scale["status"], json!({"replicas": 2, "selector": "app=a"}));
        assert_eq!(scale["metadata"], json!({"name": "a", "namespace": "b", "resourceVersion": "7"}));
        scale["spec"]["replicas"] = 5.into();
        write(deployments, &mut object, &scale).expect("valid");
        assert_eq!(object["spec"]["replicas"], 5);
        scale["spec"]["replicas"] = (-1).into();
        assert_eq!(write(deployments, &mut object, &scale).map_err(|status| status.code), Err(422));
    }
}
