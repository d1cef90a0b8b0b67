//! What a request wants to do, and the chain of authorizers that answers.

use std::sync::Arc;

use crate::user::UserInfo;

/// One requirement of a request's field selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldRequirement {
    pub field: String,
    /// `field=value` when true, `field!=value` otherwise.
    pub equals: bool,
    pub value: String,
}

/// A request as authorizers see it. Empty strings mean "not set".
#[derive(Debug, Clone, Copy)]
pub struct Attributes<'a> {
    pub user: &'a UserInfo,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`, `bind`, ..., or the lower-case HTTP method for paths.
    pub verb: &'a str,
    pub namespace: &'a str,
    pub api_group: &'a str,
    pub api_version: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    pub name: &'a str,
    /// False for paths such as `/healthz`.
    pub is_resource: bool,
    /// Only for requests that are not for a resource.
    pub path: &'a str,
    /// Requirements of the field selector, all of which hold; empty for none.
    pub field_selector: &'a [FieldRequirement],
}

impl<'a> Attributes<'a> {
    /// A resource request without name, namespace and subresource; set those by the fields.
    pub fn resource(user: &'a UserInfo, verb: &'a str, api_group: &'a str, resource: &'a str) -> Self {
        Self {
            user,
            verb,
            namespace: "",
            api_group,
            api_version: "",
            resource,
            subresource: "",
            name: "",
            is_resource: true,
            path: "",
            field_selector: &[],
        }
    }

    /// A request for a path outside of the resources.
    pub fn path(user: &'a UserInfo, verb: &'a str, path: &'a str) -> Self {
        Self { is_resource: false, path, ..Self::resource(user, verb, "", "") }
    }

    pub fn is_read_only(&self) -> bool {
        matches!(self.verb, "get" | "list" | "watch")
    }
}

/// An authorizer's answer, with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Allow(String),
    /// Not allowed by this one; the next may allow. At the end of the chain it means no.
    NoOpinion(String),
    /// Refused, whatever others say.
    Deny(String),
}

impl Decision {
    pub fn allowed(&self) -> bool {
        matches!(self, Self::Allow(_))
    }

    pub fn reason(&self) -> &str {
        match self {
            Self::Allow(reason) | Self::NoOpinion(reason) | Self::Deny(reason) => reason,
        }
    }
}

/// A user's permissions on resources: one entry of `SelfSubjectRulesReview`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResourceRules {
    pub verbs: Vec<String>,
    pub api_groups: Vec<String>,
    pub resources: Vec<String>,
    pub resource_names: Vec<String>,
}

/// What a user may do in a namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RulesReview {
    pub resources: Vec<ResourceRules>,
    /// (verbs, paths)
    pub paths: Vec<(Vec<String>, Vec<String>)>,
    /// Some authorizer can't list its rules.
    pub incomplete: bool,
    pub error: String,
}

/// Answers from memory; never blocks.
pub trait Authorizer: Send + Sync {
    fn authorize(&self, attributes: &Attributes<'_>) -> Decision;

    /// Adds what this authorizer allows the user in `namespace` to the review.
    fn rules(&self, user: &UserInfo, namespace: &str, review: &mut RulesReview);
}

/// Asks authorizers in order; the first that allows or denies decides. The chain is Node, then RBAC.
pub struct Union(pub Vec<Arc<dyn Authorizer>>);

impl Authorizer for Union {
    fn authorize(&self, attributes: &Attributes<'_>) -> Decision {
        let mut reasons = Vec::new();
        for authorizer in &self.0 {
            match authorizer.authorize(attributes) {
                Decision::NoOpinion(reason) if reason.is_empty() => {}
                Decision::NoOpinion(reason) => reasons.push(reason),
                decided => return decided,
            }
        }
        Decision::NoOpinion(reasons.join("\n"))
    }

    fn rules(&self, user: &UserInfo, namespace: &str, review: &mut RulesReview) {
        for authorizer in &self.0 {
            authorizer.rules(user, namespace, review);
        }
    }
}
