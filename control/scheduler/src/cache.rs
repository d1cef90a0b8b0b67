//! The nodes and what runs on them, kept up to date by watches, with pods whose binding is under way counted in.
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use outrigger_controllers::objects::{Labels, name, pod_node, uid};

use crate::snapshot::{NodeInfo, PodInfo, Snapshot};

#[derive(Default)]
pub struct Cache {
    nodes: BTreeMap<String, Arc<NodeInfo>>,
    /// Every assigned pod by uid, also on nodes that aren't known (yet).
    pods: HashMap<String, (String, Arc<PodInfo>)>,
    assumed: HashSet<String>,
    namespaces: Arc<HashMap<String, Labels>>,
    nominated: Arc<HashMap<String, Vec<Arc<PodInfo>>>>,
}

impl Cache {
    pub fn snapshot(&self) -> Snapshot {
        Snapshot { nodes: self.nodes.values().cloned().collect(), namespaces: self.namespaces.clone(), nominated: self.nominated.clone() }
    }

    pub fn set_node(&mut self, node: Arc<Node>) {
        let title = name(&node.metadata).to_owned();
        match self.nodes.get_mut(&title) {
            Some(info) => Arc::make_mut(info).set_node(node),
            None => {
                let mut info = NodeInfo::new(node);
                for (_, pod) in self.pods.values().filter(|(on, _)| *on == title) {
                    info.add(pod.clone());
                }
                self.nodes.insert(title, Arc::new(info));
            }
        }
    }

    pub fn remove_node(&mut self, title: &str) {
        self.nodes.remove(title);
    }

    /// Takes in a pod that the API server shows on a node.
    pub fn set_pod(&mut self, pod: Arc<Pod>) {
        self.assumed.remove(uid(&pod.metadata));
        self.insert(pod_node(&pod).to_owned(), Arc::new(PodInfo::new(pod)));
    }

    /// Counts a pod on its node before the API server shows it there.
    pub fn assume(&mut self, pod: Arc<PodInfo>, node: &str) {
        self.assumed.insert(pod.uid().to_owned());
        self.insert(node.to_owned(), pod);
    }

    pub fn is_assumed(&self, uid: &str) -> bool {
        self.assumed.contains(uid)
    }

    /// The binding failed: the pod isn't there after all.
    pub fn forget(&mut self, uid: &str) {
        if self.assumed.remove(uid) {
            self.remove_pod(uid);
        }
    }

    fn insert(&mut self, node: String, pod: Arc<PodInfo>) {
        let id = pod.uid().to_owned();
        self.take_out(&id);
        self.drop_nomination(&id);
        if let Some(info) = self.nodes.get_mut(&node) {
            Arc::make_mut(info).add(pod.clone());
        }
        self.pods.insert(id, (node, pod));
    }

    pub fn remove_pod(&mut self, uid: &str) {
        self.assumed.remove(uid);
        self.take_out(uid);
        self.drop_nomination(uid);
    }

    fn take_out(&mut self, uid: &str) {
        if let Some((node, _)) = self.pods.remove(uid)
            && let Some(info) = self.nodes.get_mut(&node)
        {
            Arc::make_mut(info).remove(uid);
        }
    }

    pub fn nominate(&mut self, pod: Arc<PodInfo>, node: &str) {
        self.drop_nomination(pod.uid());
        Arc::make_mut(&mut self.nominated).entry(node.to_owned()).or_default().push(pod);
    }

    pub fn drop_nomination(&mut self, uid: &str) {
        if self.nominated.values().any(|pods| pods.iter().any(|pod| pod.uid() == uid)) {
            let nominated = Arc::make_mut(&mut self.nominated);
            nominated.values_mut().for_each(|pods| pods.retain(|pod| pod.uid() != uid));
            nominated.retain(|_, pods| !pods.is_empty());
        }
    }

    /// Less important pods that were promised this node must look again.
    pub fn lesser_nominees(&self, node: &str, priority: i32) -> Vec<Arc<PodInfo>> {
        self.nominated.get(node).into_iter().flatten().filter(|pod| pod.priority() < priority).cloned().collect()
    }

    pub fn set_namespace(&mut self, namespace: &str, labels: Option<Labels>) {
        let namespaces = Arc::make_mut(&mut self.namespaces);
        match labels {
            Some(labels) => drop(namespaces.insert(namespace.to_owned(), labels)),
            None => drop(namespaces.remove(namespace)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str, node: &str) -> Arc<Pod> {
        let mut pod = Pod::default();
        pod.metadata.uid = Some(id.into());
        pod.spec.get_or_insert_default().node_name = (!node.is_empty()).then(|| node.into());
        Arc::new(pod)
    }

    fn node(title: &str) -> Arc<Node> {
        let mut node = Node::default();
        node.metadata.name = Some(title.into());
        Arc::new(node)
    }

    #[test]
    fn a_pod_counts_once_from_assumption_to_its_end() {
        let mut cache = Cache::default();
        let on_node = |cache: &Cache| cache.snapshot().node("n").map_or(0, |info| info.pods.len());
        cache.set_node(node("n"));
        cache.assume(Arc::new(PodInfo::new(pod("a", ""))), "n");
        assert_eq!(on_node(&cache), 1);
        cache.set_pod(pod("a", "n"));
        assert_eq!(on_node(&cache), 1);
        cache.forget("a");
        assert_eq!(on_node(&cache), 1, "a confirmed pod isn't forgotten");
        cache.remove_pod("a");
        assert_eq!(on_node(&cache), 0);
    }

    #[test]
    fn a_node_that_comes_late_finds_its_pods_and_snapshots_stay_as_they_were() {
        let mut cache = Cache::default();
        cache.set_pod(pod("a", "n"));
        cache.set_node(node("n"));
        let before = cache.snapshot();
        cache.set_pod(pod("b", "n"));
        assert_eq!((before.nodes[0].pods.len(), cache.snapshot().nodes[0].pods.len()), (1, 2));
    }
}
