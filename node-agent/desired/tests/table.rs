//! Objects in, the node's table, its changes and its answers out.
use std::sync::Arc;

use outrigger_desired::trace::{Flow, Surroundings, trace};
use outrigger_desired::{Change, Delta, Protocol, State, Table, Watched, diff};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn change(object: Value, applied: bool) -> Change {
    fn watched<K: DeserializeOwned>(object: Value, applied: bool) -> Watched<K> {
        let object = Arc::new(serde_json::from_value(object).expect("the test's objects are right"));
        if applied { Watched::Applied(object) } else { Watched::Deleted(object) }
    }
    match object["kind"].as_str().expect("objects have a kind") {
        "Service" => Change::Service(watched(object, applied)),
        "EndpointSlice" => Change::EndpointSlice(watched(object, applied)),
        "Node" => Change::Node(watched(object, applied)),
        "Pod" => Change::Pod(watched(object, applied)),
        other => panic!("{other}"),
    }
}

/// A node of zone `here` that hears of objects.
struct Node {
    state: State,
    table: Table,
}

impl Node {
    fn new(objects: &[Value]) -> Self {
        let mut node = Self { state: State::new("node-1"), table: Table::default() };
        node.hear(json!({"kind": "Node", "metadata": {"name": "node-1", "labels": {"topology.kubernetes.io/zone": "here"}}}), true);
        objects.iter().for_each(|object| _ = node.hear(object.clone(), true));
        node
    }

    fn hear(&mut self, object: Value, applied: bool) -> Delta {
        let touched = self.state.apply(&change(object, applied));
        let before = self.table.clone();
        let delta = self.table.update(&self.state, &touched);
        assert_eq!(delta, diff(&before, &self.table), "the step by what changed is the step by comparing all");
        assert_eq!(self.table.to_string(), Table::build(&self.state).to_string(), "and leads to the same table");
        delta
    }
}

/// `more` is added to the spec, or replaces what is there.
fn service(name: &str, ip: &str, more: Value) -> Value {
    let mut spec = json!({"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80, "protocol": "TCP"}]});
    more.as_object().into_iter().flatten().for_each(|(key, value)| spec[key] = value.clone());
    let status = spec.as_object_mut().and_then(|spec| spec.remove("status")).unwrap_or_else(|| json!({}));
    json!({"kind": "Service", "metadata": {"name": name, "namespace": "ns"}, "spec": spec, "status": status})
}

/// Each endpoint is its address, the number of its node, and further fields.
fn slice(service: &str, endpoints: &[(&str, u8, Value)]) -> Value {
    let endpoint = |(ip, node, more): &(&str, u8, Value)| {
        let mut endpoint = json!({"addresses": [ip], "nodeName": format!("node-{node}"), "conditions": {"ready": true}});
        more.as_object().into_iter().flatten().for_each(|(key, value)| endpoint[key] = value.clone());
        endpoint
    };
    json!({
        "kind": "EndpointSlice", "addressType": "IPv4", "ports": [{"port": 8080, "protocol": "TCP"}],
        "metadata": {"name": format!("{service}-1"), "namespace": "ns", "labels": {"kubernetes.io/service-name": service}},
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
    })
}

fn draining() -> Value {
    json!({"conditions": {"ready": false, "serving": true, "terminating": true}})
}

/// The table of a Service `web` at 10.96.0.1 with these endpoints.
fn check(spec: Value, endpoints: &[(&str, u8, Value)], expected: &str) {
    let node = Node::new(&[service("web", "10.96.0.1", spec), slice("web", endpoints)]);
    assert_eq!(node.table.to_string(), expected);
}

#[test]
fn endpoints_by_readiness() {
    let unready = json!({"conditions": {"ready": false, "serving": false}});
    let gone = json!({"conditions": {"ready": false, "serving": false, "terminating": true}});
    for (first, second, expected) in [
        (json!({}), json!({}), "[10.0.0.1:8080* 10.0.1.1:8080]"),
        (json!({"conditions": {}}), unready.clone(), "[10.0.0.1:8080*] retained=[10.0.1.1:8080]"),
        (draining(), json!({}), "[10.0.1.1:8080] retained=[10.0.0.1:8080*]"),
        (draining(), unready.clone(), "[10.0.0.1:8080*] retained=[10.0.1.1:8080]"),
        (gone, unready, "Reject retained=[10.0.0.1:8080* 10.0.1.1:8080]"),
    ] {
        let expected = format!("10.96.0.1:80/TCP ns/web ClusterIp -> {expected}\n");
        check(json!({}), &[("10.0.0.1", 1, first), ("10.0.1.1", 2, second)], &expected);
    }
}

#[test]
fn frontends_by_type() {
    check(
        json!({"type": "LoadBalancer", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}], "externalIPs": ["1.1.1.1"],
            "loadBalancerSourceRanges": [" 9.0.0.0/8"], "sessionAffinity": "ClientIP",
            "status": {"loadBalancer": {"ingress": [{"ip": "2.2.2.2"}, {"ip": "3.3.3.3", "ipMode": "Proxy"}]}}}),
        &[("10.0.0.1", 1, json!({}))],
        "1.1.1.1:80/TCP ns/web ExternalIp -> [10.0.0.1:8080*] affinity=10800s masquerade=Always
2.2.2.2:80/TCP ns/web LoadBalancer -> [10.0.0.1:8080*] affinity=10800s masquerade=Always sources=[9.0.0.0/8]
10.96.0.1:80/TCP ns/web ClusterIp -> [10.0.0.1:8080*] affinity=10800s
node4:30080/TCP ns/web NodePort -> [10.0.0.1:8080*] affinity=10800s masquerade=Always
",
    );
    for spec in [json!({"clusterIP": "None", "clusterIPs": ["None"]}), json!({"type": "ExternalName", "externalName": "a.b"})] {
        check(spec, &[("10.0.0.1", 1, json!({}))], "");
    }
}

#[test]
fn policies() {
    let external =
        json!({"type": "NodePort", "externalTrafficPolicy": "Local", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}]});
    let (here, there) = (("10.0.0.1", 1, json!({})), ("10.0.1.1", 2, json!({})));
    check(
        external.clone(),
        &[here.clone(), there.clone()],
        "10.96.0.1:80/TCP ns/web ClusterIp -> [10.0.0.1:8080* 10.0.1.1:8080]
node4:30080/TCP ns/web NodePort -> [10.0.0.1:8080*] short-circuit=[10.0.0.1:8080* 10.0.1.1:8080] retained=[10.0.1.1:8080] masquerade=FromNode
",
    );
    check(
        external,
        std::slice::from_ref(&there),
        "10.96.0.1:80/TCP ns/web ClusterIp -> [10.0.1.1:8080]
node4:30080/TCP ns/web NodePort -> Drop short-circuit=[10.0.1.1:8080] retained=[10.0.1.1:8080] masquerade=FromNode
",
    );
    let internal = json!({"internalTrafficPolicy": "Local"});
    check(internal.clone(), &[here, there.clone()], "10.96.0.1:80/TCP ns/web ClusterIp -> [10.0.0.1:8080*] retained=[10.0.1.1:8080]\n");
    check(
        internal.clone(),
        &[("10.0.0.1", 1, draining()), there.clone()],
        "10.96.0.1:80/TCP ns/web ClusterIp -> [10.0.0.1:8080*] retained=[10.0.1.1:8080]\n",
    );
    check(internal, &[there], "10.96.0.1:80/TCP ns/web ClusterIp -> Drop retained=[10.0.1.1:8080]\n");
}

#[test]
fn hints_count_when_all_have_them_and_one_is_for_us() {
    let zone = |name: &str| json!({"hints": {"forZones": [{"name": name}]}});
    let node = |zone: &str, node: &str| json!({"hints": {"forZones": [{"name": zone}], "forNodes": [{"name": node}]}});
    for (first, second, expected) in [
        (zone("here"), zone("there"), "[10.0.0.1:8080*] retained=[10.0.1.1:8080]"),
        (zone("here"), json!({}), "[10.0.0.1:8080* 10.0.1.1:8080]"),
        (zone("there"), zone("there"), "[10.0.0.1:8080* 10.0.1.1:8080]"),
        (node("here", "node-2"), node("here", "node-1"), "[10.0.1.1:8080] retained=[10.0.0.1:8080*]"),
        (node("here", "node-2"), node("there", "node-3"), "[10.0.0.1:8080*] retained=[10.0.1.1:8080]"),
    ] {
        let expected = format!("10.96.0.1:80/TCP ns/web ClusterIp -> {expected}\n");
        check(json!({"trafficDistribution": "PreferSameZone"}), &[("10.0.0.1", 1, first), ("10.0.1.1", 2, second)], &expected);
    }
}

#[test]
fn a_service_says_how_its_endpoints_are_chosen() {
    for (wanted, shown, warnings) in [("least-connections", " balancing=LeastConnections", 0), ("random", "", 0), ("fastest", "", 1)] {
        let mut web = service("web", "10.96.0.1", json!({"ports": [{"port": 80, "protocol": "TCP"}]}));
        web["metadata"]["annotations"] = json!({"outrigger.dev/balancing": wanted});
        let mut node = Node::new(&[]);
        let touched = node.state.apply(&change(web, true));
        assert_eq!(touched.warnings.len(), warnings, "{:?}", touched.warnings);
        node.table.update(&node.state, &touched);
        assert_eq!(node.table.to_string(), format!("10.96.0.1:80/TCP ns/web ClusterIp -> Reject{shown}\n"));
    }
}

#[test]
fn host_ports_give_way_to_services() {
    let pod = json!({"kind": "Pod", "metadata": {"name": "p", "namespace": "ns"},
        "spec": {"nodeName": "node-1", "containers": [{"name": "c", "ports": [
            {"containerPort": 53, "hostPort": 30080, "protocol": "TCP"}, {"containerPort": 54, "hostPort": 54, "hostIP": "5.5.5.5", "protocol": "UDP"}]}]},
        "status": {"podIPs": [{"ip": "10.0.0.7"}]}});
    let own = "5.5.5.5:54/UDP ns/p:54 HostPort -> [10.0.0.7:54*] masquerade=FromNode\n";
    let mut node = Node::new(&[pod]);
    let shared = "node4:30080/TCP ns/p:30080 HostPort -> [10.0.0.7:53*] masquerade=FromNode\n";
    assert_eq!(node.table.to_string(), format!("{own}{shared}"));
    let web = service("web", "10.96.0.1", json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}]}));
    node.hear(web.clone(), true);
    assert!(node.table.to_string().contains("node4:30080/TCP ns/web NodePort -> Reject masquerade=Always\n"));
    node.hear(web, false);
    assert_eq!(node.table.to_string(), format!("{own}{shared}"), "the port falls back to the pod");
}

#[test]
fn steps_name_what_is_gone() {
    let mut node = Node::new(&[]);
    let udp = |mut slice: Value| {
        slice["ports"][0]["protocol"] = "UDP".into();
        slice
    };
    let ports = json!({"ports": [{"port": 53, "protocol": "UDP"}]});
    let both = [("10.0.0.1", 1, json!({})), ("10.0.1.1", 2, json!({}))];
    let mut told = |object: Value, applied: bool| node.hear(object, applied).to_string();
    assert_eq!(told(udp(slice("dns", &both)), true), "");
    assert_eq!(told(service("dns", "10.96.0.10", ports.clone()), true), "+ 10.96.0.10:53/UDP\n");
    assert_eq!(told(service("dns", "10.96.0.10", ports.clone()), true), "", "what doesn't change is no step");
    assert_eq!(told(udp(slice("dns", &both[1..])), true), "~ 10.96.0.10:53/UDP\nx 10.96.0.10:53/UDP 10.0.0.1:8080\n");
    let drained = [("10.0.0.1", 1, json!({})), ("10.0.1.1", 2, draining())];
    assert_eq!(told(udp(slice("dns", &drained)), true), "~ 10.96.0.10:53/UDP\n", "what drains isn't gone");
    assert_eq!(
        told(service("dns", "10.96.0.10", ports), false),
        "- 10.96.0.10:53/UDP\nx 10.96.0.10:53/UDP 10.0.0.1:8080\nx 10.96.0.10:53/UDP 10.0.1.1:8080\n"
    );
}

#[test]
fn traces() {
    let local = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "loadBalancerSourceRanges": ["9.0.0.0/8"],
        "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}], "status": {"loadBalancer": {"ingress": [{"ip": "2.2.2.2"}]}}});
    let node = Node::new(&[
        service("web", "10.96.0.1", local),
        slice("web", &[("10.0.1.1", 2, json!({}))]),
        service("none", "10.96.0.2", json!({})),
    ]);
    let around = Surroundings {
        node_ips: vec!["192.168.0.1".parse().unwrap()],
        nodeport_addresses: vec![],
        cluster_cidrs: vec!["10.0.0.0/16".parse().unwrap()],
    };
    for (from, to, expected) in [
        ("10.0.0.9", "10.96.0.1:80", "to one of [10.0.1.1:8080]"),
        ("8.8.8.8", "10.96.0.1:80", "to one of [10.0.1.1:8080], masqueraded"),
        ("10.0.0.9", "10.96.0.1:81", "rejected"),
        ("10.0.0.9", "10.96.0.2:80", "rejected"),
        ("10.0.0.9", "10.0.1.1:8080", "passes by"),
        ("9.9.9.9", "2.2.2.2:80", "dropped"),
        ("8.8.8.8", "2.2.2.2:80", "dropped"),
        ("192.168.0.1", "2.2.2.2:80", "dropped"),
        ("8.8.8.8", "192.168.0.1:30080", "dropped"),
        ("192.168.0.1", "192.168.0.1:30080", "to one of [10.0.1.1:8080], masqueraded"),
        ("10.0.0.9", "192.168.0.1:30080", "to one of [10.0.1.1:8080]"),
        ("10.0.1.1", "10.96.0.1:80", "to one of [10.0.1.1:8080]"),
    ] {
        let flow = Flow { source: from.parse().unwrap(), destination: to.parse().unwrap(), protocol: Protocol::Tcp };
        let told = trace(&node.table, &around, &flow).to_string();
        assert_eq!(told.lines().next(), Some(expected), "{from} -> {to}: {told}");
        assert!(told.lines().count() > 1, "every verdict has its reasons: {told}");
    }
}
