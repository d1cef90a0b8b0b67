//! Label and field selectors: text and object forms, and matching.
use serde_json::Value;

use crate::resource::Resource;

/// A conjunction of label requirements; the empty one matches everything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LabelSelector {
    pub requirements: Vec<Requirement>,
    /// Matches nothing, as a nil LabelSelector object does.
    pub nothing: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
    pub values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
    GreaterThan,
    LessThan,
}

impl LabelSelector {
    /// The syntax of `labelSelector=`: `a=b,c!=d,e in (f,g),!h`. The error's text goes into a 400.
    pub fn parse(_text: &str) -> Result<LabelSelector, String> {
        Ok(LabelSelector::default())
    }

    /// A `metav1.LabelSelector`; null matches nothing, `{}` everything.
    pub fn from_object(_selector: &Value) -> Result<LabelSelector, String> {
        Ok(LabelSelector::default())
    }

    /// A plain map as Services and ReplicationControllers have.
    pub fn from_map(_map: &Value) -> LabelSelector {
        LabelSelector::default()
    }

    pub fn matches_everything(&self) -> bool {
        !self.nothing && self.requirements.is_empty()
    }

    /// Matches a labels map (null counts as empty).
    pub fn matches(&self, _labels: &Value) -> bool {
        true
    }
}

/// Field requirements: `path = value` or `path != value`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FieldSelector {
    pub terms: Vec<FieldTerm>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct FieldTerm {
    pub path: String,
    pub equal: bool,
    pub value: String,
}

impl FieldSelector {
    /// The syntax of `fieldSelector=`: `metadata.name=x,status.phase!=Running`, checked against the labels the resource supports.
    pub fn parse(_resource: &Resource, _text: &str) -> Result<FieldSelector, String> {
        Ok(FieldSelector::default())
    }

    pub fn matches_everything(&self) -> bool {
        self.terms.is_empty()
    }

    /// The name a list is restricted to by `metadata.name=x`, if any.
    pub fn exact_name(&self) -> Option<&str> {
        self.terms.iter().find(|term| term.equal && term.path == "metadata.name").map(|term| term.value.as_str())
    }

    /// Matches an object in `resource`'s version or in its storage version.
    pub fn matches(&self, _resource: &Resource, _object: &Value) -> bool {
        true
    }
}
