//! The DNS specification's examples, and what clients of upstream's DNS have come to expect, as one table.
use std::sync::Arc;

use hickory_proto::rr::{Name, RecordType};
use outrigger_cluster::Delta;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::answer::{Answer, Zone, answer};
use super::records::Records;
use super::upstream::Upstream;
use super::{Shared, server};

fn service(namespace: &str, name: &str, spec: Value) -> Delta<k8s_openapi::api::core::v1::Service> {
    Delta::Applied(Arc::new(serde_json::from_value(json!({"metadata": {"namespace": namespace, "name": name}, "spec": spec})).unwrap()))
}

fn slice(service: &str, name: &str, ports: Value, endpoints: Value) -> Delta<k8s_openapi::api::discovery::v1::EndpointSlice> {
    Delta::Applied(Arc::new(
        serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "ports": ports, "endpoints": endpoints
        }))
        .unwrap(),
    ))
}

fn records() -> Records {
    let mut records = Records::default();
    let ports = json!([{"name": "https", "port": 443, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}]);
    records.take_service(&service(
        "default",
        "kubernetes",
        json!({"clusterIP": "10.3.0.1", "clusterIPs": ["10.3.0.1", "fd00::1"], "ports": ports}),
    ));
    records.take_service(&service("default", "headless", json!({"clusterIP": "None", "clusterIPs": ["None"], "ports": ports})));
    records.take_service(&service("default", "early", json!({"clusterIP": "None", "publishNotReadyAddresses": true})));
    records.take_service(&service("default", "nobody", json!({"clusterIP": "None"})));
    records.take_service(&service("default", "outside", json!({"type": "ExternalName", "externalName": "www.example.com"})));
    records.take_service(&service(
        "default",
        "alias",
        json!({"type": "ExternalName", "externalName": "kubernetes.default.svc.cluster.local"}),
    ));
    records.take_service(&service("default", "loop", json!({"type": "ExternalName", "externalName": "loop.default.svc.cluster.local"})));
    let endpoints = json!([
        {"addresses": ["10.0.0.1"], "hostname": "my-pet", "conditions": {"ready": true}},
        {"addresses": ["10.0.0.2"], "conditions": {}},
        {"addresses": ["10.0.0.3"], "hostname": "sick", "conditions": {"ready": false}}
    ]);
    records.take_slice(&slice("headless", "headless-1", json!([{"name": "https", "port": 8443, "protocol": "TCP"}]), endpoints.clone()));
    records.take_slice(&slice("early", "early-1", json!([]), endpoints));
    records.take_slice(&slice("kubernetes", "kubernetes-1", json!([]), json!([{"addresses": ["10.0.0.9"]}])));
    records
}

/// `CODE | answer, answer | additional` with the zone written as `%`.
fn ask(records: &Records, name: &str, kind: RecordType) -> String {
    let zone = Zone::new("cluster.local", vec!["10.3.0.10".parse().unwrap()]).unwrap();
    let expand = |text: &str| text.replace('%', "cluster.local.");
    let name: Name = expand(name).parse().unwrap();
    let show = |records: &[hickory_proto::rr::Record]| {
        let shown = records.iter().map(|record| format!("{} {} {}", record.ttl, record.record_type(), record.data));
        shown.collect::<Vec<_>>().join(", ").replace("cluster.local.", "%")
    };
    match answer(&zone, records, &name, kind) {
        Answer::Foreign => "foreign".to_owned(),
        Answer::Authoritative(reply) => {
            assert!(reply.answers.iter().all(|record| record.name == name || reply.answers[0].record_type() == RecordType::CNAME));
            assert_eq!(reply.answers.is_empty(), !reply.authorities.is_empty(), "an empty answer carries the SOA");
            let code = format!("{:?}", reply.code);
            let mut text = if reply.answers.is_empty() { code } else { show(&reply.answers) };
            if !reply.additionals.is_empty() {
                text.push_str(&format!(" | {}", show(&reply.additionals)));
            }
            if let Some(target) = reply.unresolved {
                text.push_str(&format!(" | then {target}"));
            }
            text
        }
    }
}

#[test]
fn answers_follow_the_specification() {
    use RecordType::*;
    let records = records();
    let cases = [
        ("dns-version.%", TXT, "30 TXT 1.1.0"),
        ("dns-version.%", A, "NoError"),
        ("%", NS, "30 NS ns.dns.%"),
        ("%", SOA, "5 SOA ns.dns.% hostmaster.% 1 7200 1800 86400 5"),
        ("ns.dns.%", A, "30 A 10.3.0.10"),
        // cluster IPs
        ("kubernetes.default.svc.%", A, "30 A 10.3.0.1"),
        ("KUBERNETES.Default.svc.%", A, "30 A 10.3.0.1"),
        ("kubernetes.default.svc.%", AAAA, "30 AAAA fd00::1"),
        ("kubernetes.default.svc.%", MX, "NoError"),
        ("kubernetes.other.svc.%", A, "NXDomain"),
        ("missing.default.svc.%", A, "NXDomain"),
        ("_https._tcp.kubernetes.default.svc.%", SRV, "30 SRV 0 100 443 kubernetes.default.svc.% | 30 A 10.3.0.1, 30 AAAA fd00::1"),
        ("_dns._udp.kubernetes.default.svc.%", SRV, "30 SRV 0 100 53 kubernetes.default.svc.% | 30 A 10.3.0.1, 30 AAAA fd00::1"),
        ("_https._udp.kubernetes.default.svc.%", SRV, "NXDomain"),
        ("_https._tcp.kubernetes.default.svc.%", A, "NoError"),
        ("_tcp.kubernetes.default.svc.%", SRV, "NoError"),
        ("_sctp.kubernetes.default.svc.%", SRV, "NXDomain"),
        ("10-0-0-9.kubernetes.default.svc.%", A, "5 A 10.0.0.9"),
        ("1.0.3.10.in-addr.arpa.", PTR, "5 PTR kubernetes.default.svc.%"),
        ("1.0.3.10.in-addr.arpa.", A, "NoError"),
        ("1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.", PTR, "5 PTR kubernetes.default.svc.%"),
        // headless
        ("headless.default.svc.%", A, "5 A 10.0.0.1, 5 A 10.0.0.2"),
        ("headless.default.svc.%", AAAA, "NoError"),
        ("my-pet.headless.default.svc.%", A, "5 A 10.0.0.1"),
        ("sick.headless.default.svc.%", A, "NXDomain"),
        ("10-0-0-2.headless.default.svc.%", A, "5 A 10.0.0.2"),
        (
            "_https._tcp.headless.default.svc.%",
            SRV,
            "5 SRV 0 50 8443 my-pet.headless.default.svc.%, 5 SRV 0 50 8443 10-0-0-2.headless.default.svc.% | 5 A 10.0.0.1, 5 A 10.0.0.2",
        ),
        ("1.0.0.10.in-addr.arpa.", PTR, "5 PTR my-pet.early.default.svc.%, 5 PTR my-pet.headless.default.svc.%"),
        ("2.0.0.10.in-addr.arpa.", PTR, "foreign"),
        ("early.default.svc.%", A, "5 A 10.0.0.1, 5 A 10.0.0.2, 5 A 10.0.0.3"),
        ("nobody.default.svc.%", A, "NXDomain"),
        // external names
        ("outside.default.svc.%", CNAME, "30 CNAME www.example.com."),
        ("outside.default.svc.%", A, "30 CNAME www.example.com. | then www.example.com."),
        ("alias.default.svc.%", A, "30 CNAME kubernetes.default.svc.%, 30 A 10.3.0.1"),
        ("x.outside.default.svc.%", A, "NXDomain"),
        // pods and names in between
        ("10-244-1-5.default.pod.%", A, "5 A 10.244.1.5"),
        ("10-244-1-5.default.pod.%", AAAA, "NoError"),
        ("not-an-address.default.pod.%", A, "NXDomain"),
        ("default.svc.%", A, "NoError"),
        ("other.svc.%", A, "NXDomain"),
        ("svc.%", A, "NoError"),
        ("www.example.com.default.svc.%", A, "NXDomain"),
        ("nonsense.%", A, "NXDomain"),
        // not ours
        ("www.example.com.", A, "foreign"),
        ("xcluster.local.", A, "foreign"),
        ("9.9.9.9.in-addr.arpa.", PTR, "foreign"),
        ("10.in-addr.arpa.", PTR, "foreign"),
    ];
    for (name, kind, expected) in cases {
        assert_eq!(ask(&records, name, kind), expected, "{name} {kind}");
    }
}

#[test]
fn a_loop_of_aliases_ends() {
    assert!(ask(&records(), "loop.default.svc.%", RecordType::A).starts_with("30 CNAME"));
}

#[test]
fn records_go_with_their_objects() {
    let mut records = records();
    let Delta::Applied(gone) = slice("headless", "headless-1", json!([]), json!([])) else { unreachable!() };
    records.take_slice(&Delta::Deleted(gone));
    assert_eq!(ask(&records, "headless.default.svc.%", RecordType::A), "NXDomain");
    assert_eq!(ask(&records, "1.0.0.10.in-addr.arpa.", RecordType::PTR), "5 PTR my-pet.early.default.svc.%");

    // The slice moves to another Service.
    records.take_slice(&slice("headless", "early-1", json!([]), json!([{"addresses": ["10.0.0.7"]}])));
    assert_eq!(ask(&records, "early.default.svc.%", RecordType::A), "NXDomain");
    assert_eq!(ask(&records, "headless.default.svc.%", RecordType::A), "5 A 10.0.0.7");

    // The cluster IP changes, and an address goes to another Service before the old one is gone.
    records.take_service(&service("other", "taker", json!({"clusterIP": "10.3.0.1"})));
    records.take_service(&service("default", "kubernetes", json!({"clusterIP": "10.3.0.2"})));
    assert_eq!(ask(&records, "1.0.3.10.in-addr.arpa.", RecordType::PTR), "5 PTR taker.other.svc.%");
    assert_eq!(ask(&records, "2.0.3.10.in-addr.arpa.", RecordType::PTR), "5 PTR kubernetes.default.svc.%");
    assert_eq!(ask(&records, "other.svc.%", RecordType::A), "NoError");

    records.take_service(&Delta::Replaced(Arc::new(Vec::new())));
    assert_eq!(ask(&records, "other.svc.%", RecordType::A), "NXDomain");
    assert_eq!(ask(&records, "1.0.3.10.in-addr.arpa.", RecordType::PTR), "foreign");
}

#[tokio::test]
async fn one_address_has_its_share_of_connections() {
    let directory = tempfile::tempdir().unwrap();
    let zone = Zone::new("cluster.local", Vec::new()).unwrap();
    let shared = Arc::new(Shared::new(zone, Upstream::new(directory.path().join("resolv.conf"), Vec::new())));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(server::serve_tcp(listener, shared));
    // A server status request: answered at once, that it isn't known here.
    let question: [u8; 14] = [0, 12, 0, 7, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let ask = async |stream: &mut TcpStream| {
        // An error is that of a connection closed meanwhile, which the reading shows too.
        let _ = stream.write_all(&question).await;
        server::read_frame(stream).await.is_ok_and(|answer| answer.is_some())
    };
    let mut held = Vec::new();
    for _ in 0..server::MAX_TCP_OF_ONE {
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut stream).await);
        held.push(stream);
    }
    assert!(!ask(&mut TcpStream::connect(address).await.unwrap()).await);
    // Another address isn't concerned.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    assert!(ask(&mut socket.connect(address).await.unwrap()).await);
    assert!(ask(&mut held[0]).await);
}
