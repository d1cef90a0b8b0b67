//! Admission: what must hold, and what is filled in, beyond a kind's own rules. Mutating plugins run first, validating ones see the result.

mod certificate;
mod defaults;
mod limits;
mod namespace;
mod node;
mod pod;
mod priority;
mod quota;
mod rbac;
mod service_account;

use outrigger_api::{Resource, Status};
use serde_json::Value;

use crate::call::Call;
use crate::engine::Engine;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Create,
    Update,
    Delete,
    Connect,
}

/// What is about to happen.
pub struct Attributes<'a> {
    pub call: &'a Call,
    pub operation: Operation,
    pub resource: &'a Resource,
    pub subresource: &'a str,
    pub namespace: &'a str,
    pub name: &'a str,
    /// The stored object, for updates and deletions.
    pub old: Option<&'a Value>,
}

impl Attributes<'_> {
    /// Whether this is about the core or group kind itself, not one of its subresources.
    pub fn is(&self, group: &str, kind: &str) -> bool {
        self.subresource.is_empty() && self.resource.is(group, kind)
    }

    pub fn creates(&self, group: &str, kind: &str) -> bool {
        self.operation == Operation::Create && self.is(group, kind)
    }

    pub fn forbidden(&self, why: impl AsRef<str>) -> Status {
        Status::forbidden(&self.resource.group, &self.resource.plural, self.name, why.as_ref())
    }
}

/// One plugin. Both phases read the caches, which are fresh when they are called.
pub trait Plugin: Send + Sync {
    fn mutate(&self, _engine: &Engine, _attributes: &Attributes<'_>, _object: &mut Value) -> Result<(), Status> {
        Ok(())
    }

    fn validate(&self, _engine: &Engine, _attributes: &Attributes<'_>, _object: Option<&Value>) -> Result<(), Status> {
        Ok(())
    }
}

/// The plugins in upstream's order.
pub struct Chain(Vec<Box<dyn Plugin>>);

impl Default for Chain {
    fn default() -> Self {
        Self(vec![
            Box::new(namespace::NamespaceLifecycle),
            Box::new(limits::LimitRanger),
            Box::new(service_account::ServiceAccount),
            Box::new(node::TaintByCondition),
            Box::new(priority::Priority),
            Box::new(pod::DefaultTolerationSeconds),
            Box::new(pod::RuntimeClass),
            Box::new(defaults::StorageObjectInUse),
            Box::new(defaults::DefaultClasses),
            Box::new(certificate::CertificateApproval),
            Box::new(rbac::Escalation),
            Box::new(node::NodeRestriction),
        ])
    }
}

impl Chain {
    pub async fn mutate(&self, engine: &Engine, attributes: &Attributes<'_>, object: &mut Value) -> Result<(), Status> {
        for plugin in &self.0 {
            plugin.mutate(engine, attributes, object)?;
        }
        Ok(())
    }

    pub async fn validate(&self, engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        for plugin in &self.0 {
            plugin.validate(engine, attributes, object)?;
        }
        // Last, since it counts what all others have let through.
        quota::charge(engine, attributes, object).await
    }
}

/// The object of a built-in resource, from the caches.
pub fn lookup(engine: &Engine, group: &str, plural: &str, namespace: &str, name: &str) -> Option<Value> {
    let version = "v1";
    let resource = engine.builtin(group, version, plural);
    let key = if resource.namespaced { format!("{namespace}/{name}") } else { name.to_string() };
    engine.hub.cache(&resource.storage_prefix).get(&key).map(|entry| entry.object())
}

/// All objects of a built-in resource, of one namespace or (empty) of all.
pub fn all(engine: &Engine, group: &str, plural: &str, namespace: &str) -> Vec<Value> {
    let resource = engine.builtin(group, "v1", plural);
    let prefix = if namespace.is_empty() { String::new() } else { format!("{namespace}/") };
    engine.hub.cache(&resource.storage_prefix).range(&prefix, None).entries.iter().map(|entry| entry.object()).collect()
}
