//! Matching a node against selectors and a pod's requirements (pure).
use k8s_openapi::api::core::v1::{Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, PodSpec};

use crate::objects::{labels, name};

fn requirement_matches(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = || requirement.values.iter().flatten();
    match requirement.operator.as_str() {
        "In" => value.is_some_and(|value| values().any(|entry| entry == value)),
        "NotIn" => value.is_none_or(|value| !values().any(|entry| entry == value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        operator @ ("Gt" | "Lt") => {
            let (Some(left), Some(right)) =
                (value.and_then(|value| value.parse::<i64>().ok()), values().next().and_then(|value| value.parse::<i64>().ok()))
            else {
                return false;
            };
            if operator == "Gt" { left > right } else { left < right }
        }
        _ => false,
    }
}

/// A term without any requirement matches nothing.
pub fn term_matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let expressions: Vec<_> = term.match_expressions.iter().flatten().collect();
    let fields: Vec<_> = term.match_fields.iter().flatten().collect();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    expressions.iter().all(|requirement| requirement_matches(requirement, labels(&node.metadata).get(&requirement.key).map(String::as_str)))
        && fields
            .iter()
            .all(|requirement| requirement.key == "metadata.name" && requirement_matches(requirement, Some(name(&node.metadata))))
}

pub fn selector_matches(selector: &NodeSelector, node: &Node) -> bool {
    selector.node_selector_terms.iter().any(|term| term_matches(term, node))
}

/// nodeSelector and required node affinity together.
pub fn required_matches(spec: &PodSpec, node: &Node) -> bool {
    let plain = spec.node_selector.iter().flatten().all(|(key, value)| labels(&node.metadata).get(key) == Some(value));
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    plain && required.is_none_or(|selector| selector_matches(selector, node))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(pairs: &[(&str, &str)]) -> Node {
        let mut node = Node::default();
        node.metadata.name = Some("n1".into());
        node.metadata.labels = Some(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect());
        node
    }

    fn term(key: &str, operator: &str, values: &[&str]) -> NodeSelectorTerm {
        NodeSelectorTerm {
            match_expressions: Some(vec![NodeSelectorRequirement {
                key: key.into(),
                operator: operator.into(),
                values: Some(values.iter().map(|value| (*value).to_owned()).collect()),
            }]),
            match_fields: None,
        }
    }

    #[test]
    fn terms_compare_as_their_operator_says() {
        let node = node(&[("disk", "ssd"), ("cores", "8")]);
        let cases = [
            (term("disk", "In", &["ssd", "hdd"]), true),
            (term("disk", "NotIn", &["ssd"]), false),
            (term("gpu", "NotIn", &["x"]), true),
            (term("cores", "Gt", &["4"]), true),
            (term("cores", "Lt", &["4"]), false),
            (term("disk", "Gt", &["4"]), false),
            (term("gpu", "DoesNotExist", &[]), true),
            (NodeSelectorTerm::default(), false),
        ];
        for (term, expected) in cases {
            assert_eq!(term_matches(&term, &node), expected, "{term:?}");
        }
    }
}
