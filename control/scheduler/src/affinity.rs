//! Matching nodes and pods against a pod's selectors and affinity terms (pure).
use k8s_openapi::api::core::v1::{Node, Pod, PodAffinityTerm, PreferredSchedulingTerm};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use outrigger_controllers::nodes::selection;
pub use outrigger_controllers::nodes::selection::selector_matches as node_selector_matches;
use outrigger_controllers::objects::{Labels, labels, namespace, selects};

/// A pod's nodeSelector and required node affinity together.
pub fn required_node_matches(pod: &Pod, node: &Node) -> bool {
    pod.spec.as_ref().is_none_or(|spec| selection::required_matches(spec, node))
}

/// The sum of the weights of the preferences that `node` meets; an empty preference is met by all.
pub fn preference(terms: &[PreferredSchedulingTerm], node: &Node) -> i64 {
    let met = |term: &&PreferredSchedulingTerm| {
        let empty = term.preference.match_expressions.as_ref().is_none_or(Vec::is_empty)
            && term.preference.match_fields.as_ref().is_none_or(Vec::is_empty);
        !empty && selection::term_matches(&term.preference, node)
    };
    terms.iter().filter(met).map(|term| i64::from(term.weight)).sum()
}

/// One (anti-)affinity term of a pod, with everything that the pod itself adds to it.
#[derive(Clone, Debug, Default)]
pub struct Term {
    pub topology_key: String,
    pub weight: i64,
    selector: Option<LabelSelector>,
    namespaces: Vec<String>,
    namespace_selector: Option<LabelSelector>,
}

impl Term {
    fn new(pod: &Pod, term: &PodAffinityTerm, weight: i64) -> Self {
        let mut selector = term.label_selector.clone();
        if let Some(selector) = &mut selector {
            add_label_keys(selector, labels(&pod.metadata), term.match_label_keys.as_deref(), term.mismatch_label_keys.as_deref());
        }
        let mut namespaces = term.namespaces.clone().unwrap_or_default();
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.push(namespace(&pod.metadata).to_owned());
        }
        Self { topology_key: term.topology_key.clone(), weight, selector, namespaces, namespace_selector: term.namespace_selector.clone() }
    }

    pub fn matches(&self, pod: &Pod, namespace_labels: impl Fn(&str) -> Labels) -> bool {
        let space = namespace(&pod.metadata);
        let in_space = self.namespaces.iter().any(|entry| entry == space)
            || self.namespace_selector.as_ref().is_some_and(|selector| selects(Some(selector), &namespace_labels(space)));
        in_space && selects(self.selector.as_ref(), labels(&pod.metadata))
    }
}

/// matchLabelKeys and mismatchLabelKeys: the pod's own values become part of the selector, unless the API
/// server has merged them in already (then they say the same twice).
fn add_label_keys(selector: &mut LabelSelector, own: &Labels, same: Option<&[String]>, different: Option<&[String]>) {
    let mut add = |key: &String, operator: &str| {
        if let Some(value) = own.get(key) {
            selector.match_expressions.get_or_insert_default().push(
                k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelectorRequirement {
                    key: key.clone(),
                    operator: operator.into(),
                    values: Some(vec![value.clone()]),
                },
            );
        }
    };
    same.iter().flat_map(|keys| keys.iter()).for_each(|key| add(key, "In"));
    different.iter().flat_map(|keys| keys.iter()).for_each(|key| add(key, "NotIn"));
}

/// A pod's affinity to other pods, ready for matching.
#[derive(Clone, Debug, Default)]
pub struct PodTerms {
    pub affinity: Vec<Term>,
    pub anti_affinity: Vec<Term>,
    pub preferred: Vec<Term>,
    pub anti_preferred: Vec<Term>,
}

impl PodTerms {
    /// None for a pod without any, which most are.
    pub fn of(pod: &Pod) -> Option<Box<Self>> {
        let affinity = pod.spec.as_ref()?.affinity.as_ref()?;
        let mut terms = Self::default();
        if let Some(near) = &affinity.pod_affinity {
            terms
                .affinity
                .extend(near.required_during_scheduling_ignored_during_execution.iter().flatten().map(|term| Term::new(pod, term, 0)));
            let preferred = near.preferred_during_scheduling_ignored_during_execution.iter().flatten();
            terms.preferred.extend(preferred.map(|term| Term::new(pod, &term.pod_affinity_term, i64::from(term.weight))));
        }
        if let Some(far) = &affinity.pod_anti_affinity {
            terms
                .anti_affinity
                .extend(far.required_during_scheduling_ignored_during_execution.iter().flatten().map(|term| Term::new(pod, term, 0)));
            let preferred = far.preferred_during_scheduling_ignored_during_execution.iter().flatten();
            terms.anti_preferred.extend(preferred.map(|term| Term::new(pod, &term.pod_affinity_term, i64::from(term.weight))));
        }
        let empty =
            terms.affinity.is_empty() && terms.anti_affinity.is_empty() && terms.preferred.is_empty() && terms.anti_preferred.is_empty();
        (!empty).then(|| Box::new(terms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_without_namespaces_means_the_pods_own() {
        let mut pod = Pod::default();
        pod.metadata.namespace = Some("a".into());
        pod.metadata.labels = Some([("app".to_owned(), "web".to_owned())].into());
        let plain = PodAffinityTerm { label_selector: Some(LabelSelector::default()), ..Default::default() };
        let own = Term::new(&pod, &plain, 0);
        let mut other = pod.clone();
        other.metadata.namespace = Some("b".into());
        let nothing = |_: &str| Labels::new();
        assert!(own.matches(&pod, nothing) && !own.matches(&other, nothing));
        let everywhere = Term::new(&pod, &PodAffinityTerm { namespace_selector: Some(LabelSelector::default()), ..plain }, 0);
        assert!(everywhere.matches(&other, nothing));
    }
}
