//! What was watched of policies, namespaces and pods, in little memory, and the table that follows from it.
//!
//! Pods with the same labels are one group, so that selectors are asked once for all of a Deployment's pods.
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::networking::v1::NetworkPolicy;

use super::compile::compile;
use super::read::{Direction, Peer, Policy, Rule};
use super::selector::{Labels, Selector};
use super::{PodPolicy, PolicyTable, Rules};
use crate::names::{Protocol, ServiceName};
use crate::state::{Interner, Watched, name_of};

/// A pod of the cluster, as far as policies see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub name: ServiceName,
    pub labels: BTreeMap<String, String>,
    pub addresses: Vec<IpAddr>,
    /// Its addresses are its node's: no pod selector speaks of them.
    pub host_network: bool,
    /// Succeeded or Failed: its addresses may be another's by now.
    pub over: bool,
    pub ports: Vec<NamedPort>,
}

/// A container's port that has a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamedPort {
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub number: u16,
}

/// A pod's network on this node, as the CNI plugin made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPod {
    pub sandbox: Arc<str>,
    /// `None` where an older release made the network and didn't note whose it is: then its address tells.
    pub pod: Option<ServiceName>,
    pub addresses: Vec<IpAddr>,
    /// The node's end of the pod's link.
    pub interface: String,
}

/// One change of anything that policies depend on.
#[derive(Clone, Debug)]
pub enum Change {
    Policy(Watched<NetworkPolicy>),
    Namespace(Watched<Namespace>),
    /// All pods of the cluster, this node's too.
    Pod(Watched<Pod>),
    /// All of this node's pods that have a network of their own.
    Local(Vec<LocalPod>),
}

/// What is kept of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Known {
    namespace: Arc<str>,
    labels: Labels,
    /// Those at which a policy may mean it.
    pub addresses: Box<[IpAddr]>,
    pub ports: Arc<[NamedPort]>,
}

impl Known {
    fn is_at(&self, addresses: &[IpAddr]) -> bool {
        self.addresses.iter().any(|address| addresses.contains(address))
    }
}

/// Everybody whom a rule can name.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    namespaces: HashMap<Arc<str>, Labels>,
    pods: HashMap<ServiceName, Known>,
    /// The pods of each namespace, by their labels.
    groups: HashMap<Arc<str>, HashMap<Labels, HashSet<ServiceName>>>,
}

impl Cluster {
    /// A namespace that isn't known yet can't be judged, so no selector means it.
    fn selects(&self, own: &str, namespaces: Option<&Selector>, namespace: &str) -> bool {
        match namespaces {
            None => namespace == own,
            Some(selector) => self.namespaces.get(namespace).is_some_and(|labels| selector.matches(labels)),
        }
    }

    pub fn for_each_selected(&self, own: &str, namespaces: Option<&Selector>, pods: &Selector, mut then: impl FnMut(&Known)) {
        let groups = self.groups.iter().filter(|(namespace, _)| self.selects(own, namespaces, namespace));
        for (_, members) in groups.flat_map(|(_, groups)| groups).filter(|(labels, _)| pods.matches(labels)) {
            members.iter().filter_map(|name| self.pods.get(name)).for_each(&mut then);
        }
    }

    pub fn for_each_address(&self, mut then: impl FnMut(IpAddr, &Known)) {
        for pod in self.pods.values() {
            pod.addresses.iter().for_each(|address| then(*address, pod));
        }
    }

    /// Whether the rule says something of this pod.
    fn concerns(&self, key: &Key, rule: &Rule, pod: &Known) -> bool {
        let has_address = !pod.addresses.is_empty();
        has_address
            && rule.peers.iter().any(|peer| match peer {
                Peer::Pods { namespaces, pods } => {
                    self.selects(&key.namespace, namespaces.as_ref(), &pod.namespace) && pods.matches(&pod.labels)
                }
                Peer::Block(block) => {
                    let by_name = key.direction == Direction::Egress && !rule.named.is_empty();
                    by_name && pod.addresses.iter().any(|address| block.contains(&IpNet::from(*address)))
                }
            })
    }

    fn set_pod(&mut self, name: ServiceName, pod: Option<Known>) -> Option<Known> {
        let old = self.pods.remove(&name);
        if let Some(old) = &old
            && let Some(groups) = self.groups.get_mut(&old.namespace)
            && let Some(members) = groups.get_mut(&old.labels)
        {
            members.remove(&name);
            if members.is_empty() {
                groups.remove(&old.labels);
            }
            if groups.is_empty() {
                self.groups.remove(&old.namespace);
            }
        }
        if let Some(pod) = pod {
            self.groups.entry(pod.namespace.clone()).or_default().entry(pod.labels.clone()).or_default().insert(name.clone());
            self.pods.insert(name, pod);
        }
        old
    }
}

/// Which policies judge one direction of a pod's traffic. Pods that have this in common share their rules.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    namespace: Arc<str>,
    direction: Direction,
    policies: Arc<[Arc<str>]>,
    /// The pod's own, where a rule speaks of ports by name.
    ports: Arc<[NamedPort]>,
}

/// How one direction of a pod's traffic is judged.
#[derive(Clone, Debug)]
enum Judged {
    Open,
    /// Nothing is known of the pod yet.
    Closed,
    By(Key),
}

/// Everything watched that decides which traffic this node's pods may have: an inert value with one mutator, [`Policies::apply`].
#[derive(Debug, Default)]
pub struct Policies {
    interner: Interner,
    cluster: Cluster,
    policies: HashMap<Arc<str>, BTreeMap<Arc<str>, Policy>>,
    local: BTreeMap<Arc<str>, LocalPod>,
    judged: HashMap<Arc<str>, [Judged; 2]>,
    compiled: HashMap<Key, Arc<Rules>>,
    table: PolicyTable,
}

impl Policies {
    /// What this node's pods may do, as of the last [`Policies::update`].
    pub fn table(&self) -> &PolicyTable {
        &self.table
    }

    /// Whether the pod of a sandbox is known, so that its policies are.
    pub fn knows(&self, sandbox: &str) -> bool {
        self.local.get(sandbox).is_some_and(|local| self.pod_of(local).is_some())
    }

    /// Takes a change in, and notes what has to be compiled again because of it.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Policy(Watched::Applied(object)) => self.set_policy(&name_of(&object.metadata), Policy::read(object)),
            Change::Policy(Watched::Deleted(object)) => self.set_policy(&name_of(&object.metadata), None),
            Change::Policy(Watched::Replaced(all)) => {
                let kept: HashSet<ServiceName> = all.iter().map(|policy| name_of(&policy.metadata)).collect();
                let known = self.policies.iter().flat_map(|(namespace, all)| all.keys().map(|name| ServiceName::new(namespace, name)));
                let gone: Vec<_> = known.filter(|name| !kept.contains(name)).collect();
                gone.iter().for_each(|name| self.set_policy(name, None));
                all.iter().for_each(|object| self.set_policy(&name_of(&object.metadata), Policy::read(object)));
            }
            Change::Namespace(Watched::Applied(object)) => self.set_namespace(object, true),
            Change::Namespace(Watched::Deleted(object)) => self.set_namespace(object, false),
            Change::Namespace(Watched::Replaced(all)) => {
                let kept: HashSet<&str> = all.iter().filter_map(|namespace| namespace.metadata.name.as_deref()).collect();
                let gone: Vec<_> = self.cluster.namespaces.keys().filter(|name| !kept.contains(&***name)).cloned().collect();
                gone.iter().for_each(|name| self.set_labels(name, None));
                all.iter().for_each(|object| self.set_namespace(object, true));
            }
            Change::Pod(Watched::Applied(pod)) => self.set_pod(pod),
            Change::Pod(Watched::Deleted(pod)) => self.replace_pod(&pod.name, None),
            Change::Pod(Watched::Replaced(all)) => {
                let kept: HashSet<&ServiceName> = all.iter().map(|pod| &pod.name).collect();
                let gone: Vec<_> = self.cluster.pods.keys().filter(|name| !kept.contains(name)).cloned().collect();
                gone.iter().for_each(|name| self.replace_pod(name, None));
                all.iter().for_each(|pod| self.set_pod(pod));
            }
            Change::Local(all) => self.set_local(all),
        }
    }

    /// Brings the table up to date with what was applied; says whether it is different now.
    pub fn update(&mut self) -> bool {
        let mut changed = false;
        let local = std::mem::take(&mut self.local);
        for (sandbox, local) in &local {
            let judged = match self.judged.get(sandbox) {
                Some(judged) => judged.clone(),
                None => self.judge(local),
            };
            let [ingress, egress] = judged.each_ref().map(|judged| match judged {
                Judged::Open => None,
                Judged::Closed => Some(Arc::default()),
                Judged::By(key) => Some(self.compiled.get(key).cloned().unwrap_or_else(|| self.share(self.compile(key)))),
            });
            for (judged, rules) in judged.iter().zip([&ingress, &egress]) {
                if let (Judged::By(key), Some(rules)) = (judged, rules) {
                    self.compiled.insert(key.clone(), rules.clone());
                }
            }
            self.judged.insert(sandbox.clone(), judged);
            let policy = PodPolicy { addresses: local.addresses.clone(), interface: local.interface.clone(), ingress, egress };
            if self.table.pods.get(sandbox) != Some(&policy) {
                self.table.pods.insert(sandbox.clone(), policy);
                changed = true;
            }
        }
        self.local = local;
        let before = self.table.pods.len();
        self.table.pods.retain(|sandbox, _| self.local.contains_key(sandbox));
        self.judged.retain(|sandbox, _| self.local.contains_key(sandbox));
        let used: HashSet<&Key> = self.judged.values().flatten().filter_map(Judged::key).collect();
        self.compiled.retain(|key, _| used.contains(key));
        changed || self.table.pods.len() != before
    }

    fn compile(&self, key: &Key) -> Rules {
        compile(&self.cluster, &key.namespace, key.direction, &key.ports, self.rules(key))
    }

    fn rules(&self, key: &Key) -> impl Iterator<Item = &Rule> {
        let policies = self.policies.get(&key.namespace);
        let named = key.policies.iter().filter_map(move |name| policies?.get(name));
        named.filter_map(|policy| policy.rules(key.direction)).flatten()
    }

    /// The same rules as one value, whichever policies they come from.
    fn share(&self, rules: Rules) -> Arc<Rules> {
        let in_table = self.table.pods.values().flat_map(|pod| [&pod.ingress, &pod.egress]).flatten();
        let known = self.compiled.values().chain(in_table).find(|known| ***known == rules);
        known.cloned().unwrap_or_else(|| Arc::new(rules))
    }

    fn pod_of(&self, local: &LocalPod) -> Option<&Known> {
        match &local.pod {
            Some(name) => self.cluster.pods.get(name),
            None => self.cluster.pods.values().find(|pod| pod.is_at(&local.addresses)),
        }
    }

    fn judge(&self, local: &LocalPod) -> [Judged; 2] {
        let Some(pod) = self.pod_of(local) else { return [Judged::Closed, Judged::Closed] };
        let all = self.policies.get(&pod.namespace);
        let selecting: Vec<_> = all.into_iter().flatten().filter(|(_, policy)| policy.pods.matches(&pod.labels)).collect();
        [Direction::Ingress, Direction::Egress].map(|direction| {
            let judging = selecting.iter().filter_map(|(name, policy)| Some((*name, policy.rules(direction)?)));
            let policies: Arc<[_]> = judging.clone().map(|(name, _)| name.clone()).collect();
            if policies.is_empty() {
                return Judged::Open;
            }
            let by_name = direction == Direction::Ingress && judging.flat_map(|(_, rules)| rules).any(|rule| !rule.named.is_empty());
            let ports = if by_name { pod.ports.clone() } else { Arc::default() };
            Judged::By(Key { namespace: pod.namespace.clone(), direction, policies, ports })
        })
    }

    fn set_policy(&mut self, name: &ServiceName, policy: Option<Policy>) {
        let (namespace, own) = (self.interner.intern(name.namespace()), self.interner.intern(name.name()));
        let all = self.policies.entry(namespace.clone()).or_default();
        if all.get(&own) == policy.as_ref() {
            return;
        }
        match policy {
            Some(policy) => all.insert(own.clone(), policy),
            None => all.remove(&own),
        };
        if all.is_empty() {
            self.policies.remove(&namespace);
        }
        self.compiled.retain(|key, _| key.namespace != namespace || !key.policies.contains(&own));
        // Whom it selects may be different too.
        let is_here = |local: &&LocalPod| self.pod_of(local).is_some_and(|pod| pod.namespace == namespace);
        let here: Vec<_> = self.local.values().filter(is_here).map(|local| local.sandbox.clone()).collect();
        here.iter().for_each(|sandbox| _ = self.judged.remove(sandbox));
    }

    fn set_namespace(&mut self, object: &Namespace, exists: bool) {
        let name = self.interner.intern(object.metadata.name.as_deref().unwrap_or_default());
        let none = BTreeMap::new();
        let labels = exists.then(|| Labels::read(object.metadata.labels.as_ref().unwrap_or(&none), &mut self.interner));
        self.set_labels(&name, labels);
    }

    fn set_labels(&mut self, name: &Arc<str>, labels: Option<Labels>) {
        let old = self.cluster.namespaces.get(name).cloned();
        if old == labels {
            return;
        }
        let matches = |selector: &Selector, labels: &Option<Labels>| labels.as_ref().is_some_and(|labels| selector.matches(labels));
        let stale = self.affected(|_, rule| {
            rule.peers.iter().any(|peer| match peer {
                Peer::Pods { namespaces: Some(selector), .. } => matches(selector, &old) != matches(selector, &labels),
                _ => false,
            })
        });
        self.forget(&stale);
        match labels {
            Some(labels) => self.cluster.namespaces.insert(name.clone(), labels),
            None => self.cluster.namespaces.remove(name),
        };
    }

    fn set_pod(&mut self, pod: &Pod) {
        let is_peer = !pod.host_network && !pod.over;
        let ports: BTreeSet<NamedPort> =
            pod.ports.iter().map(|port| NamedPort { name: self.interner.intern(&port.name), ..port.clone() }).collect();
        let known = Known {
            namespace: self.interner.intern(pod.name.namespace()),
            labels: Labels::read(&pod.labels, &mut self.interner),
            addresses: if is_peer { pod.addresses.clone().into() } else { Box::default() },
            ports: ports.into_iter().collect(),
        };
        self.replace_pod(&pod.name, Some(known));
    }

    fn replace_pod(&mut self, name: &ServiceName, pod: Option<Known>) {
        if self.cluster.pods.get(name) == pod.as_ref() {
            return;
        }
        let after = pod.clone();
        let before = self.cluster.set_pod(name.clone(), pod);
        let states: Vec<&Known> = [&before, &after].into_iter().flatten().collect();
        let stale = self.affected(|key, rule| states.iter().any(|pod| self.cluster.concerns(key, rule, pod)));
        self.forget(&stale);
        for local in self.local.values() {
            let is_it = match &local.pod {
                Some(own) => own == name,
                None => states.iter().any(|pod| pod.is_at(&local.addresses)),
            };
            if is_it {
                self.judged.remove(&local.sandbox);
            }
        }
    }

    fn set_local(&mut self, all: &[LocalPod]) {
        let local: BTreeMap<Arc<str>, LocalPod> = all.iter().map(|local| (local.sandbox.clone(), local.clone())).collect();
        self.judged.retain(|sandbox, _| local.get(sandbox) == self.local.get(sandbox));
        self.local = local;
    }

    /// The compiled sets of rules of which a rule is meant.
    fn affected(&self, is_meant: impl Fn(&Key, &Rule) -> bool) -> Vec<Key> {
        self.compiled.keys().filter(|key| self.rules(key).any(|rule| is_meant(key, rule))).cloned().collect()
    }

    /// They are compiled again in the next update.
    fn forget(&mut self, stale: &[Key]) {
        stale.iter().for_each(|key| _ = self.compiled.remove(key));
    }
}

impl Judged {
    fn key(&self) -> Option<&Key> {
        match self {
            Self::By(key) => Some(key),
            Self::Open | Self::Closed => None,
        }
    }
}
