//! Admission: what must hold, and what is filled in, beyond a kind's own rules. Mutating plugins run first, validating ones see the result.

mod certificate;
mod defaults;
mod derived;
mod expressions;
mod limits;
mod matching;
mod namespace;
mod node;
mod pod;
pub mod policy;
mod priority;
mod quota;
mod rbac;
mod service_account;
mod webhook;

use std::sync::Arc;

use outrigger_api::{GroupVersionKind, Resource, Status};
use serde_json::{Value, json};

use crate::call::Call;
use crate::engine::Engine;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Create,
    Update,
    Delete,
    Connect,
}

impl Operation {
    /// As rules and reviews name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "CREATE",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Connect => "CONNECT",
        }
    }
}

/// What is about to happen.
pub struct Attributes<'a> {
    pub call: &'a Call,
    pub operation: Operation,
    pub resource: &'a Arc<Resource>,
    pub subresource: &'a str,
    /// Of a Namespace: its own name.
    pub namespace: &'a str,
    pub name: &'a str,
    /// The stored object, for updates and deletions.
    pub old: Option<&'a Value>,
    pub dry_run: bool,
    /// The request's options when they came with its body.
    pub options: Option<&'a Value>,
}

impl<'a> Attributes<'a> {
    pub fn new(call: &'a Call, operation: Operation, name: &'a str) -> Self {
        let namespace = if call.resource.is("", "Namespace") { name } else { call.namespace() };
        Self {
            call,
            operation,
            resource: &call.resource,
            subresource: &call.info.subresource,
            namespace,
            name,
            old: None,
            dry_run: call.dry_run,
            options: None,
        }
    }

    /// Whether this is about the core or group kind itself, not one of its subresources.
    pub fn is(&self, group: &str, kind: &str) -> bool {
        self.subresource.is_empty() && self.resource.is(group, kind)
    }

    pub fn creates(&self, group: &str, kind: &str) -> bool {
        self.operation == Operation::Create && self.is(group, kind)
    }

    /// The kind of the object, which subresources may have of their own, in the version of `resource`.
    pub fn kind_in(&self, resource: &Resource) -> GroupVersionKind {
        resource.subresource(self.subresource).map_or_else(|| resource.gvk(), |known| known.body.clone())
    }

    /// The operation's options as upstream's handlers have them.
    pub fn options(&self) -> Value {
        if let Some(options) = self.options {
            return options.clone();
        }
        let kind = match (self.operation, self.call.info.verb.as_str()) {
            (Operation::Create, _) => "CreateOptions",
            (Operation::Update, "patch") => "PatchOptions",
            (Operation::Update, _) => "UpdateOptions",
            (Operation::Delete, _) => "DeleteOptions",
            (Operation::Connect, _) => return Value::Null,
        };
        let mut options = json!({"kind": kind, "apiVersion": "meta.k8s.io/v1"});
        if self.dry_run {
            options["dryRun"] = json!(["All"]);
        }
        for key in ["fieldManager", "fieldValidation"] {
            if let Some(value) = self.call.query.get(key).filter(|value| !value.is_empty()) {
                options[key] = value.into();
            }
        }
        if kind == "PatchOptions" && self.call.query.get("force").is_some() {
            options["force"] = self.call.query.flag("force").into();
        }
        options
    }

    pub fn forbidden(&self, why: impl AsRef<str>) -> Status {
        Status::forbidden(&self.resource.group, &self.resource.plural, self.name, why.as_ref())
    }
}

/// One plugin that decides by itself. Both phases read the caches, which are fresh when they are called.
pub trait Plugin: Send + Sync {
    fn mutate(&self, _engine: &Engine, _attributes: &Attributes<'_>, _object: &mut Value) -> Result<(), Status> {
        Ok(())
    }

    fn validate(&self, _engine: &Engine, _attributes: &Attributes<'_>, _object: Option<&Value>) -> Result<(), Status> {
        Ok(())
    }
}

/// The plugins in upstream's order; behind them what users configure, which may have to wait for others, and the quotas.
pub struct Chain {
    plugins: Vec<Box<dyn Plugin>>,
    policies: policy::Policies,
    webhooks: webhook::Webhooks,
}

impl Default for Chain {
    fn default() -> Self {
        let plugins: Vec<Box<dyn Plugin>> = vec![
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
            Box::new(certificate::CertificateSubjectRestriction),
            Box::new(rbac::Escalation),
            Box::new(node::NodeRestriction),
        ];
        Self { plugins, policies: policy::Policies::default(), webhooks: webhook::Webhooks::default() }
    }
}

impl Chain {
    /// Fills in and changes the object; deletions have none. What policies and webhooks changed is shown once more to all that may react to it.
    pub async fn mutate(&self, engine: &Engine, attributes: &Attributes<'_>, mut object: Option<&mut Value>) -> Result<(), Status> {
        let (mut policies, mut webhooks) = (webhook::Rounds::default(), webhook::Rounds::default());
        loop {
            if let Some(object) = object.as_deref_mut() {
                for plugin in &self.plugins {
                    plugin.mutate(engine, attributes, object)?;
                }
            }
            self.policies.mutate(engine, attributes, object.as_deref_mut(), &mut policies).await?;
            self.webhooks.mutate(engine, attributes, object.as_deref_mut(), &mut webhooks).await?;
            let (by_policies, by_webhooks) = (policies.again(), webhooks.again());
            if !by_policies && !by_webhooks {
                return Ok(());
            }
        }
    }

    pub async fn validate(&self, engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        for plugin in &self.plugins {
            plugin.validate(engine, attributes, object)?;
        }
        self.policies.validate(engine, attributes, object).await?;
        self.webhooks.validate(engine, attributes, object).await?;
        // Last, since it counts what all others have let through.
        quota::charge(engine, attributes, object).await
    }

    /// Both phases for an object that is not stored: the body of a subresource's request.
    pub async fn admit(&self, engine: &Engine, attributes: &Attributes<'_>, object: &mut Value) -> Result<(), Status> {
        self.mutate(engine, attributes, Some(object)).await?;
        self.validate(engine, attributes, Some(object)).await
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
