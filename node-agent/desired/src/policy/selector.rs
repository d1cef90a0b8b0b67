//! Label selectors, and the labels that they are asked about.
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::state::Interner;

/// An object's labels, sorted by key; equal ones of many objects share their texts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Labels(Arc<[(Arc<str>, Arc<str>)]>);

impl Labels {
    pub fn read(labels: &BTreeMap<String, String>, interner: &mut Interner) -> Self {
        Self(labels.iter().map(|(key, value)| (interner.intern(key), interner.intern(value))).collect())
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.binary_search_by(|(known, _)| (**known).cmp(key)).ok().map(|at| &*self.0[at].1)
    }
}

/// All of its requirements have to hold; without any it selects everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Selector(Box<[Requirement]>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
    /// An operator that this release doesn't know, which the API server doesn't let through: what can't be judged isn't let in.
    Never,
}

impl Selector {
    pub fn read(selector: &LabelSelector) -> Self {
        let labels = selector.match_labels.iter().flatten();
        let equals = labels.map(|(key, value)| Requirement { key: key.clone(), test: Test::In(vec![value.clone()]) });
        let expressions = selector.match_expressions.iter().flatten().map(|expression| {
            let values = || expression.values.clone().unwrap_or_default();
            let test = match expression.operator.as_str() {
                "In" => Test::In(values()),
                "NotIn" => Test::NotIn(values()),
                "Exists" => Test::Exists,
                "DoesNotExist" => Test::DoesNotExist,
                _ => Test::Never,
            };
            Requirement { key: expression.key.clone(), test }
        });
        Self(equals.chain(expressions).collect())
    }

    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| {
            let value = labels.get(&requirement.key);
            let is_in = |values: &[String]| value.is_some_and(|value| values.iter().any(|wanted| wanted == value));
            match &requirement.test {
                Test::In(values) => is_in(values),
                Test::NotIn(values) => !is_in(values),
                Test::Exists => value.is_some(),
                Test::DoesNotExist => value.is_none(),
                Test::Never => false,
            }
        })
    }
}
