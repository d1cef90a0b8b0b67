//! Cycles over small clusters: a pod and nodes in, a node or upstream's words out.
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    Affinity, Container, ContainerPort, Node, NodeSpec, NodeStatus, Pod, PodAffinityTerm, PodAntiAffinity, PodSpec, PodStatus,
    ResourceRequirements, Taint, TopologySpreadConstraint,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use outrigger_controllers::objects::label_selector;

use crate::preempt::preempt;
use crate::schedule::{Facts, schedule};
use crate::snapshot::{NodeInfo, PodInfo, Snapshot};
use crate::volumes::{Delayed, Volumes};

fn node(name: &str, cpu: &str, labels: &[(&str, &str)]) -> Node {
    let amounts = [("cpu", cpu), ("memory", "8Gi"), ("pods", "10")];
    let mut node = Node {
        spec: Some(NodeSpec::default()),
        status: Some(NodeStatus {
            allocatable: Some(amounts.iter().map(|(name, text)| ((*name).to_owned(), Quantity((*text).to_owned()))).collect()),
            ..Default::default()
        }),
        ..Default::default()
    };
    node.metadata.name = Some(name.into());
    node.metadata.labels = Some(labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect());
    node
}

fn pod(name: &str, cpu: &str) -> Pod {
    let mut pod = Pod {
        spec: Some(PodSpec {
            containers: vec![Container {
                name: "c".into(),
                resources: Some(ResourceRequirements {
                    requests: Some([("cpu".to_owned(), Quantity(cpu.into()))].into()),
                    ..Default::default()
                }),
                ..Default::default()
            }],
            ..Default::default()
        }),
        status: Some(PodStatus::default()),
        ..Default::default()
    };
    pod.metadata.name = Some(name.into());
    pod.metadata.uid = Some(name.into());
    pod.metadata.namespace = Some("default".into());
    pod.metadata.labels = Some([("app".to_owned(), "web".to_owned())].into());
    pod
}

fn info(pod: Pod) -> Arc<PodInfo> {
    Arc::new(PodInfo::new(Arc::new(pod)))
}

fn snapshot(nodes: Vec<(Node, Vec<Pod>)>) -> Snapshot {
    let with_pods = |(node, pods): (Node, Vec<Pod>)| {
        let mut node = NodeInfo::new(Arc::new(node));
        pods.into_iter().for_each(|pod| node.add(info(pod)));
        Arc::new(node)
    };
    Snapshot { nodes: nodes.into_iter().map(with_pods).collect(), ..Default::default() }
}

fn place(pod: Pod, snapshot: &Snapshot) -> Result<String, String> {
    schedule(&info(pod), &Facts::default(), snapshot, |_| 0).map(|info| info.name().to_owned()).map_err(|error| error.to_string())
}

#[test]
fn the_emptier_node_wins() {
    let snapshot = snapshot(vec![(node("a", "4", &[]), vec![pod("x", "2")]), (node("b", "4", &[]), vec![])]);
    assert_eq!(place(pod("p", "1"), &snapshot), Ok("b".into()));
}

#[test]
fn reasons_are_counted_and_sorted() {
    let mut cordoned = node("c", "4", &[]);
    cordoned.spec.as_mut().unwrap().unschedulable = Some(true);
    let mut tainted = node("d", "4", &[]);
    tainted.spec.as_mut().unwrap().taints = Some(vec![Taint { key: "k".into(), effect: "NoSchedule".into(), ..Default::default() }]);
    let full = |name| (node(name, "1", &[]), vec![pod(&format!("on-{name}"), "1")]);
    let cluster = snapshot(vec![full("a"), full("b"), (cordoned, vec![]), (tainted, vec![])]);
    assert_eq!(
        place(pod("p", "1"), &cluster),
        Err("0/4 nodes are available: 1 node(s) had untolerated taint(s), 1 node(s) were unschedulable, 2 Insufficient cpu.".into())
    );
    assert_eq!(place(pod("p", "1"), &snapshot(vec![])), Err("no nodes available to schedule pods".into()));
    let mut picky = pod("p", "1");
    picky.spec.as_mut().unwrap().node_selector = Some([("disk".to_owned(), "ssd".to_owned())].into());
    let plain = snapshot(vec![(node("a", "4", &[]), vec![])]);
    assert_eq!(place(picky, &plain), Err("0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.".into()));
}

#[test]
fn host_ports_exclude_each_other_by_address() {
    let with_port = |name: &str, ip: Option<&str>| {
        let mut pod = pod(name, "0");
        pod.spec.as_mut().unwrap().containers[0].ports =
            Some(vec![ContainerPort { host_port: Some(80), container_port: 80, host_ip: ip.map(str::to_owned), ..Default::default() }]);
        pod
    };
    let busy = snapshot(vec![(node("a", "4", &[]), vec![with_port("x", Some("127.0.0.1"))])]);
    assert_eq!(place(with_port("p", Some("127.0.0.2")), &busy), Ok("a".into()));
    let message = "0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports.";
    assert_eq!(place(with_port("p", None), &busy), Err(message.into()));
}

#[test]
fn hard_spread_keeps_domains_even() {
    let zone = |name, zone| node(name, "8", &[("topology.kubernetes.io/zone", zone), ("kubernetes.io/hostname", name)]);
    let mut wanted = pod("p", "1");
    wanted.spec.as_mut().unwrap().topology_spread_constraints = Some(vec![TopologySpreadConstraint {
        max_skew: 1,
        topology_key: "topology.kubernetes.io/zone".into(),
        when_unsatisfiable: "DoNotSchedule".into(),
        label_selector: Some(label_selector([("app".to_owned(), "web".to_owned())].into())),
        ..Default::default()
    }]);
    let uneven = snapshot(vec![(zone("a", "1"), vec![pod("x", "1")]), (zone("b", "2"), vec![pod("y", "1"), pod("z", "1")])]);
    assert_eq!(place(wanted.clone(), &uneven), Ok("a".into()));
    let full = snapshot(vec![(zone("a", "1"), vec![pod("x", "8")]), (zone("b", "2"), vec![pod("y", "1"), pod("z", "1")])]);
    assert_eq!(
        place(wanted, &full),
        Err("0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match pod topology spread constraints.".into())
    );
}

#[test]
fn siblings_are_spread_over_nodes_by_default() {
    let hosts = |name: &'static str| node(name, "8", &[("kubernetes.io/hostname", name)]);
    let cluster = snapshot(vec![(hosts("a"), vec![pod("x", "0")]), (hosts("b"), vec![]), (hosts("c"), vec![pod("y", "0")])]);
    let facts = Facts { siblings: Some(label_selector([("app".to_owned(), "web".to_owned())].into())), ..Default::default() };
    assert_eq!(schedule(&info(pod("p", "0")), &facts, &cluster, |_| 0).unwrap().name(), "b");
}

#[test]
fn anti_affinity_works_from_both_sides() {
    let lonely = |name: &str| {
        let mut pod = pod(name, "0");
        pod.spec.as_mut().unwrap().affinity = Some(Affinity {
            pod_anti_affinity: Some(PodAntiAffinity {
                required_during_scheduling_ignored_during_execution: Some(vec![PodAffinityTerm {
                    topology_key: "kubernetes.io/hostname".into(),
                    label_selector: Some(label_selector([("app".to_owned(), "web".to_owned())].into())),
                    ..Default::default()
                }]),
                ..Default::default()
            }),
            ..Default::default()
        });
        pod
    };
    let host = || node("a", "4", &[("kubernetes.io/hostname", "a")]);
    let words = |reason| Err(format!("0/1 nodes are available: 1 {reason}."));
    let with_plain = snapshot(vec![(host(), vec![pod("x", "0")])]);
    assert_eq!(place(lonely("p"), &with_plain), words("node(s) didn't match pod anti-affinity rules"));
    let with_lonely = snapshot(vec![(host(), vec![lonely("x")])]);
    assert_eq!(place(pod("p", "0"), &with_lonely), words("node(s) didn't satisfy existing pods anti-affinity rules"));
}

#[test]
fn claims_are_given_volumes_of_the_node() {
    let facts = |volumes: Volumes| Facts { volumes, ..Default::default() };
    let cluster = snapshot(vec![(node("a", "4", &[]), vec![])]);
    let missing = Volumes { obstacle: Some("persistentvolumeclaim \"data\" not found".into()), ..Default::default() };
    let error = schedule(&info(pod("p", "0")), &facts(missing), &cluster, |_| 0).unwrap_err();
    assert_eq!(error.to_string(), "0/1 nodes are available: persistentvolumeclaim \"data\" not found.");
    let delayed = |count: usize| Volumes {
        delayed: (0..count)
            .map(|number| Delayed { claim: format!("c{number}"), candidates: vec![("v".into(), None)], provision: None })
            .collect(),
        ..Default::default()
    };
    assert!(schedule(&info(pod("p", "0")), &facts(delayed(1)), &cluster, |_| 0).is_ok());
    let error = schedule(&info(pod("p", "0")), &facts(delayed(2)), &cluster, |_| 0).unwrap_err();
    assert_eq!(error.to_string(), "0/1 nodes are available: 1 node(s) didn't find available persistent volumes to bind.");
}

fn of_priority(mut pod: Pod, priority: i32) -> Pod {
    pod.spec.as_mut().unwrap().priority = Some(priority);
    pod
}

fn try_preempt(pod: Pod, cluster: &Snapshot, budgets: &[Arc<PodDisruptionBudget>]) -> Result<(String, Vec<String>), String> {
    let pod = info(pod);
    let error = schedule(&pod, &Facts::default(), cluster, |_| 0).unwrap_err();
    preempt(&pod, &Facts::default(), &error, cluster, budgets)
        .map(|candidate| (candidate.node.clone(), candidate.victims.iter().map(|victim| victim.key().name).collect()))
}

#[test]
fn preemption_ends_the_fewest_and_least_important() {
    let cluster = snapshot(vec![
        (node("a", "2", &[]), vec![of_priority(pod("high", "1"), 50), of_priority(pod("low", "1"), 1)]),
        (node("b", "2", &[]), vec![of_priority(pod("middle", "2"), 10)]),
    ]);
    assert_eq!(try_preempt(of_priority(pod("p", "1"), 100), &cluster, &[]), Ok(("a".into(), vec!["low".into()])));
    assert_eq!(try_preempt(of_priority(pod("p", "2"), 100), &cluster, &[]), Ok(("b".into(), vec!["middle".into()])));
    assert_eq!(
        try_preempt(of_priority(pod("p", "1"), 1), &cluster, &[]),
        Err("preemption: 0/2 nodes are available: 2 No preemption victims found for incoming pod.".into())
    );
    assert_eq!(
        try_preempt(of_priority(pod("p", "9"), 100), &cluster, &[]),
        Err("preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling.".into())
    );
}

#[test]
fn disruption_budgets_are_kept_when_another_node_will_do() {
    let mut guarded = of_priority(pod("guarded", "2"), 1);
    guarded.metadata.labels = Some([("app".to_owned(), "db".to_owned())].into());
    let cluster = snapshot(vec![(node("a", "2", &[]), vec![guarded]), (node("b", "2", &[]), vec![of_priority(pod("plain", "2"), 5)])]);
    let mut budget = PodDisruptionBudget {
        spec: Some(PodDisruptionBudgetSpec {
            selector: Some(label_selector([("app".to_owned(), "db".to_owned())].into())),
            ..Default::default()
        }),
        status: Some(PodDisruptionBudgetStatus { disruptions_allowed: 0, ..Default::default() }),
        ..Default::default()
    };
    budget.metadata.namespace = Some("default".into());
    assert_eq!(try_preempt(of_priority(pod("p", "1"), 100), &cluster, &[]).unwrap().0, "a");
    assert_eq!(try_preempt(of_priority(pod("p", "1"), 100), &cluster, &[Arc::new(budget)]).unwrap().0, "b");
}
