//! The Node authorizer: a kubelet sees what the pods on its node refer to, and nothing else.

use std::sync::Arc;

use crate::attributes::{Attributes, Authorizer, Decision, RulesReview};
use crate::user::UserInfo;

/// Which node's pods refer to which objects; fed from the API server's watches.
#[derive(Default)]
pub struct NodeGraph {
    _p: (),
}

impl NodeGraph {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces an object of `resource`: `pods`, `persistentvolumes`, `volumeattachments`, `resourceslices`, `podcertificaterequests`.
    /// Other resources are ignored.
    pub fn apply(&self, resource: &str, json: &[u8]) -> Result<(), serde_json::Error> {
        let _ = (resource, json);
        todo!()
    }

    pub fn delete(&self, resource: &str, namespace: &str, name: &str) {
        let _ = (resource, namespace, name);
        todo!()
    }
}

pub struct NodeAuthorizer {
    _graph: Arc<NodeGraph>,
}

impl NodeAuthorizer {
    pub fn new(graph: Arc<NodeGraph>) -> Self {
        Self { _graph: graph }
    }
}

impl Authorizer for NodeAuthorizer {
    fn authorize(&self, attributes: &Attributes<'_>) -> Decision {
        let _ = attributes;
        todo!()
    }

    fn rules(&self, user: &UserInfo, namespace: &str, review: &mut RulesReview) {
        let _ = (user, namespace, review);
        todo!()
    }
}
