//! Which requests a webhook or policy is about: its rules, in any version of the requested resource, and its selectors.

use std::sync::Arc;

use outrigger_api::rules::{Target, covers};
use outrigger_api::selector::LabelSelector;
use outrigger_api::{Resource, Status, meta};
use serde_json::Value;

use super::{Attributes, Operation, lookup};
use crate::engine::Engine;
use crate::registry::versions::between;

/// The kinds by which admission is configured, which nobody may get in the way of.
pub fn is_exempt(attributes: &Attributes<'_>) -> bool {
    attributes.resource.group == "admissionregistration.k8s.io"
}

pub struct Scope {
    rules: Vec<Value>,
    excluded: Vec<Value>,
    /// Requests in other versions of a resource are meant, too.
    equivalent: bool,
    namespaces: LabelSelector,
    objects: LabelSelector,
}

impl Scope {
    /// Of a webhook: what it has no rules for it isn't called for.
    pub fn of_webhook(webhook: &Value) -> Self {
        Self::of(webhook, meta::items(webhook, "rules").to_vec())
    }

    /// Of a policy's or binding's MatchResources: without rules it is about everything.
    pub fn of_resources(resources: &Value) -> Self {
        let rules = meta::items(resources, "resourceRules").to_vec();
        let everything = serde_json::json!({"operations": ["*"], "apiGroups": ["*"], "apiVersions": ["*"], "resources": ["*/*"]});
        Self::of(resources, if rules.is_empty() { vec![everything] } else { rules })
    }

    fn of(object: &Value, rules: Vec<Value>) -> Self {
        // Validation lets no bad selector through; an absent one selects everything.
        let selector = |field: &str| LabelSelector::from_object(object.get(field).unwrap_or(&serde_json::json!({}))).unwrap_or_default();
        Self {
            rules,
            excluded: meta::items(object, "excludeResourceRules").to_vec(),
            equivalent: meta::text(object, "matchPolicy") != "Exact",
            namespaces: selector("namespaceSelector"),
            objects: selector("objectSelector"),
        }
    }

    /// The resource, in the version that the rules name, as which the request is covered; none if it isn't.
    pub fn find(&self, engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<Option<Arc<Resource>>, Status> {
        if self.covered(engine, attributes, &self.excluded).is_some() {
            return Ok(None);
        }
        let Some(found) = self.covered(engine, attributes, &self.rules) else { return Ok(None) };
        let selected = self.selects_namespace(engine, attributes, object)? && self.selects_object(attributes, object);
        Ok(selected.then_some(found))
    }

    fn covered(&self, engine: &Engine, attributes: &Attributes<'_>, rules: &[Value]) -> Option<Arc<Resource>> {
        let by_rules = |resource: &Resource| {
            let target = target(attributes, resource);
            rules.iter().any(|rule| covers(rule, &target))
        };
        if rules.is_empty() {
            return None;
        }
        if by_rules(attributes.resource) {
            return Some(attributes.resource.clone());
        }
        if !self.equivalent {
            return None;
        }
        let same = |other: &&Arc<Resource>| {
            other.storage_prefix == attributes.resource.storage_prefix
                && other.gvr() != attributes.resource.gvr()
                && (attributes.subresource.is_empty() || other.subresource(attributes.subresource).is_some())
        };
        engine.catalog().all().filter(same).find(|other| by_rules(other)).cloned()
    }

    fn selects_namespace(&self, engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<bool, Status> {
        if self.namespaces.matches_everything() || attributes.namespace.is_empty() {
            return Ok(true);
        }
        let own = attributes.is("", "Namespace") && matches!(attributes.operation, Operation::Create | Operation::Update);
        if let Some(object) = object.filter(|_| own) {
            return Ok(self.namespaces.matches(meta::get(object, "metadata.labels")));
        }
        let namespace = lookup(engine, "", "namespaces", "", attributes.namespace)
            .ok_or_else(|| Status::not_found("", "namespaces", attributes.namespace))?;
        Ok(self.namespaces.matches(meta::get(&namespace, "metadata.labels")))
    }

    /// The new or the old object; bodies without metadata have no labels to be selected by.
    fn selects_object(&self, attributes: &Attributes<'_>, object: Option<&Value>) -> bool {
        if self.objects.matches_everything() {
            return true;
        }
        let labelled = |object: &Value| object["metadata"].is_object() && self.objects.matches(meta::get(object, "metadata.labels"));
        [object, attributes.old].into_iter().flatten().any(labelled)
    }
}

/// The request as one webhook or policy sees it: in the version that its rules name.
pub struct View {
    pub seen: Arc<Resource>,
    pub object: Option<Value>,
    pub old: Option<Value>,
}

impl View {
    pub async fn new(engine: &Engine, attributes: &Attributes<'_>, seen: Arc<Resource>, object: Option<&Value>) -> Result<Self, Status> {
        // Subresources with a kind of their own have it in every version.
        let same = attributes.kind_in(&seen) == attributes.kind_in(attributes.resource);
        let mut converted = [None, None];
        for (slot, object) in converted.iter_mut().zip([object, attributes.old]) {
            *slot = match object {
                Some(object) if !same => Some(between(engine, attributes.resource, &seen, object.clone()).await?),
                object => object.cloned(),
            };
        }
        let [object, old] = converted;
        Ok(Self { seen, object, old })
    }
}

/// A patched object as if it had come with the request: unknown fields dropped, defaults filled in.
pub fn refit(attributes: &Attributes<'_>, seen: &Resource, object: &mut Value) -> Result<(), Status> {
    let kind = attributes.kind_in(seen);
    if kind == seen.gvk() {
        crate::registry::fitted(seen, object)?;
        outrigger_api::default::apply(seen, object);
        Ok(())
    } else {
        outrigger_api::default::apply_as(&kind.group, &kind.version, &kind.kind, object);
        Ok(())
    }
}

fn target<'a>(attributes: &Attributes<'a>, resource: &'a Resource) -> Target<'a> {
    Target {
        group: &resource.group,
        version: &resource.version,
        resource: &resource.plural,
        subresource: attributes.subresource,
        operation: attributes.operation.name(),
        name: attributes.name,
        namespaced: !attributes.namespace.is_empty() && !attributes.resource.is("", "Namespace"),
    }
}
