//! Where a pod's volumes let it go (pure; the facts are gathered in `facts`).
use k8s_openapi::api::core::v1::{Node, NodeSelector, TopologySelectorTerm};

use crate::filter::Rejection;
use crate::snapshot::NodeInfo;

/// A claim that is bound only once its pod's node is known.
#[derive(Clone, Debug, Default)]
pub struct Delayed {
    pub claim: String,
    /// Free volumes that would do, smallest first, with where they can be used.
    pub candidates: Vec<(String, Option<NodeSelector>)>,
    /// Where a new volume can be made: None if nobody makes one, empty for everywhere.
    pub provision: Option<Vec<TopologySelectorTerm>>,
}

/// What a scheduling cycle must know of a pod's claims.
#[derive(Clone, Debug, Default)]
pub struct Volumes {
    /// Why the pod can't be placed anywhere (yet).
    pub obstacle: Option<String>,
    /// Where the bound volumes can be used; None inside for a volume that isn't there.
    pub bound: Vec<Option<NodeSelector>>,
    pub delayed: Vec<Delayed>,
}

/// What to do about a delayed claim once the node is chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Binding {
    Volume { claim: String, volume: String },
    Provision { claim: String },
}

impl Volumes {
    pub fn check(&self, info: &NodeInfo, matches: impl Fn(&NodeSelector, &Node) -> bool + Copy) -> Result<(), Rejection> {
        if self.bound.iter().any(Option::is_none) {
            return Err(Rejection::final_("node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)"));
        }
        if !self.bound.iter().flatten().all(|selector| selector.node_selector_terms.is_empty() || matches(selector, &info.node)) {
            return Err(Rejection::final_("node(s) didn't match PersistentVolume's node affinity"));
        }
        match self.bindings(info, matches) {
            Some(_) => Ok(()),
            None => Err(Rejection::final_("node(s) didn't find available persistent volumes to bind")),
        }
    }

    /// One volume for every delayed claim on this node, existing ones first; None when a claim gets none.
    pub fn bindings(&self, info: &NodeInfo, matches: impl Fn(&NodeSelector, &Node) -> bool + Copy) -> Option<Vec<Binding>> {
        let mut taken: Vec<&str> = Vec::new();
        let mut bindings = Vec::with_capacity(self.delayed.len());
        for delayed in &self.delayed {
            let usable = |(name, selector): &&(String, Option<NodeSelector>)| {
                !taken.contains(&name.as_str()) && selector.as_ref().is_none_or(|selector| matches(selector, &info.node))
            };
            if let Some((volume, _)) = delayed.candidates.iter().find(usable) {
                taken.push(volume);
                bindings.push(Binding::Volume { claim: delayed.claim.clone(), volume: volume.clone() });
            } else if delayed.provision.as_ref().is_some_and(|terms| terms.is_empty() || terms.iter().any(|term| allows(term, info))) {
                bindings.push(Binding::Provision { claim: delayed.claim.clone() });
            } else {
                return None;
            }
        }
        Some(bindings)
    }
}

fn allows(term: &TopologySelectorTerm, info: &NodeInfo) -> bool {
    let requirements = term.match_label_expressions.iter().flatten();
    requirements
        .into_iter()
        .all(|requirement| info.label(&requirement.key).is_some_and(|value| requirement.values.iter().any(|entry| entry == value)))
}
