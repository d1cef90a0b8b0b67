//! The plugin, routes, masquerade and DNS in network namespaces of the test's own: two nodes on one link, a pod on each, and an outside host.
//! Needs root, as the plugin does.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger_network::{cni, masquerade, netns, routes};
use serde_json::{Value, json};

/// A fresh network namespace; it ends with its last user.
struct Namespace(File);

impl Namespace {
    fn new() -> Self {
        let made = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("making a network namespace needs root");
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self(made.join().unwrap())
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::within_file(&self.0, || Ok(work())).unwrap()
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    fn ip(&self, arguments: &str) {
        self.shell("ip", arguments);
    }

    fn shell(&self, program: &str, arguments: &str) -> String {
        let output = self.run(|| Command::new(program).args(arguments.split_whitespace()).stdin(Stdio::null()).output().unwrap());
        assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

fn link(one: &Namespace, other: &Namespace, names: [&str; 2], addresses: [&str; 2]) {
    one.ip("link set lo up");
    other.ip("link set lo up");
    one.ip(&format!("link add {} type veth peer name {} netns {}", names[0], names[1], other.path()));
    for ((namespace, name), address) in [one, other].into_iter().zip(names).zip(addresses) {
        namespace.ip(&format!("addr add {address} dev {name}"));
        namespace.ip(&format!("link set {name} up"));
    }
}

/// A node whose agent answers the plugin as it is told to.
struct Node {
    namespace: Namespace,
    data: tempfile::TempDir,
    cidrs: Vec<String>,
    agent: Arc<Mutex<Agent>>,
}

#[derive(Default)]
struct Agent {
    asked: Vec<String>,
    refusal: Option<&'static str>,
    /// The attachments that stood in the store when the last question came.
    seen: Vec<outrigger_network::Attachment>,
}

fn run_agent(data: &Path, agent: Arc<Mutex<Agent>>) {
    let (listener, data) = (UnixListener::bind(data.join("agent.sock")).unwrap(), data.to_owned());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            let mut agent = agent.lock().unwrap();
            agent.asked.push(line.split(' ').nth(1).unwrap().to_owned());
            agent.seen = outrigger_network::attachments(&data).unwrap();
            let answer = match agent.refusal {
                None => "HTTP/1.0 200 OK\r\n\r\nnull".to_owned(),
                Some(reason) => format!("HTTP/1.0 503 Service Unavailable\r\n\r\n{reason}"),
            };
            // DEL doesn't wait for the answer to be read.
            let _ = stream.write_all(answer.as_bytes());
        }
    });
}

impl Node {
    fn new(cidrs: &[&str]) -> Self {
        let node = Self {
            namespace: Namespace::new(),
            data: tempfile::tempdir().unwrap(),
            cidrs: cidrs.iter().map(|cidr| (*cidr).to_owned()).collect(),
            agent: Arc::default(),
        };
        run_agent(node.data.path(), node.agent.clone());
        node
    }

    fn cni(&self, command: &str, id: &str, pod: &Namespace, more: Value) -> Value {
        let mut config = json!({"cniVersion": "1.0.0", "name": "outrigger", "type": "outrigger-cni", "dataDir": self.data.path().join("network"),
            "agentSocket": self.data.path().join("agent.sock"), "podCIDRs": self.cidrs, "mtu": 1450});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let input = config.to_string();
        let path = pod.path();
        let environment = |name: &str| {
            let value = match name {
                "CNI_COMMAND" => command,
                "CNI_CONTAINERID" => id,
                "CNI_NETNS" => &path,
                "CNI_IFNAME" => "eth0",
                "CNI_ARGS" => "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let (version, result) = self.namespace.run(|| cni::run(input.as_bytes(), environment));
        match result {
            Ok(document) => document.unwrap_or(Value::Null),
            Err(error) => error.document(version),
        }
    }
}

/// Sends a line from one namespace to a server in another; returns what the server saw as the source, or the error.
fn talk(from: &Namespace, to: &Namespace, address: &str) -> io::Result<IpAddr> {
    let target: SocketAddr = SocketAddr::new(address.parse().unwrap(), 7000);
    let listener = to.run(|| TcpListener::bind(target)).unwrap();
    let accept = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        stream.write_all(b"hello").unwrap();
        peer.ip()
    });
    let answer = from.run(|| {
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        assert_eq!(text, "hello");
        io::Result::Ok(())
    });
    answer?;
    Ok(accept.join().unwrap().to_canonical())
}

#[test]
fn pods_reach_each_other_and_the_outside() {
    let one = Node::new(&["10.244.1.0/24", "fd00:1::/64"]);
    let two = Node::new(&["10.244.2.0/24"]);
    let outside = Namespace::new();
    link(&one.namespace, &two.namespace, ["up0", "up0"], ["192.168.7.1/24", "192.168.7.2/24"]);
    link(&one.namespace, &outside, ["out0", "out0"], ["203.0.113.1/24", "203.0.113.9/24"]);
    for node in [&one, &two] {
        node.namespace.run(|| {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        });
    }

    let (pod_a, pod_b, pod_c) = (Namespace::new(), Namespace::new(), Namespace::new());
    let first = one.cni("ADD", "a", &pod_a, json!({}));
    assert_eq!(first["ips"][0]["address"], "10.244.1.1/32", "{first}");
    assert_eq!(first["ips"][1]["address"], "fd00:1::1/128", "{first}");
    let second = one.cni("ADD", "b", &pod_b, json!({}));
    assert_eq!(second["ips"][0]["address"], "10.244.1.2/32", "{second}");
    assert_eq!(two.cni("ADD", "c", &pod_c, json!({}))["ips"][0]["address"], "10.244.2.1/32");
    assert_eq!(one.cni("CHECK", "a", &pod_a, json!({"prevResult": first})), Value::Null);
    assert!(pod_a.shell("ip", "link show eth0").contains("mtu 1450"));

    // Same node, both families; the node itself.
    assert_eq!(talk(&pod_a, &pod_b, "10.244.1.2").unwrap(), "10.244.1.1".parse::<IpAddr>().unwrap());
    assert_eq!(talk(&pod_a, &pod_b, "fd00:1::2").unwrap(), "fd00:1::1".parse::<IpAddr>().unwrap());
    talk(&one.namespace, &pod_a, "10.244.1.1").unwrap();
    talk(&pod_a, &one.namespace, "192.168.7.1").unwrap();

    // The other node, once the routes are there.
    let wanted = |own: &str, other: &str, via: &str| {
        let others = [(other.parse().unwrap(), via.parse().unwrap())].into();
        routes::desired(&[own.parse().unwrap()], &others)
    };
    let sync = |node: &Node, table: &routes::Table| node.namespace.run(|| netns::block_on(routes::sync(table)).unwrap().unwrap());
    let (table_one, table_two) =
        (wanted("10.244.1.0/24", "10.244.2.0/24", "192.168.7.2"), wanted("10.244.2.0/24", "10.244.1.0/24", "192.168.7.1"));
    assert_eq!((sync(&one, &table_one), sync(&two, &table_two)), (2, 2));
    assert_eq!(sync(&one, &table_one), 0, "what the kernel has is not written again");
    assert_eq!(talk(&pod_a, &pod_c, "10.244.2.1").unwrap(), "10.244.1.1".parse::<IpAddr>().unwrap());
    // An address without a pod is refused by the node that owns the range.
    let error = pod_c.run(|| TcpStream::connect_timeout(&"10.244.1.77:80".parse().unwrap(), Duration::from_secs(5))).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::HostUnreachable, "{error}");

    // The outside sees the node, and pods and nodes see the pod.
    let rules = masquerade::Rules {
        own_cidrs: vec!["10.244.1.0/24".parse().unwrap()],
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
        nodes: ["192.168.7.1", "192.168.7.2"].map(|address| address.parse().unwrap()).into(),
    };
    for _ in 0..2 {
        one.namespace.run(|| netns::block_on(masquerade::apply(&rules)).unwrap().unwrap());
    }
    assert_eq!(talk(&pod_a, &outside, "203.0.113.9").unwrap(), "203.0.113.1".parse::<IpAddr>().unwrap());
    assert_eq!(talk(&pod_a, &pod_c, "10.244.2.1").unwrap(), "10.244.1.1".parse::<IpAddr>().unwrap());
    assert_eq!(talk(&pod_a, &two.namespace, "192.168.7.2").unwrap(), "10.244.1.1".parse::<IpAddr>().unwrap());

    // DEL takes everything away and may be repeated; others' routes stay.
    one.namespace.ip("route add 10.99.0.0/16 via 192.168.7.2");
    for _ in 0..2 {
        assert_eq!(one.cni("DEL", "a", &pod_a, json!({})), Value::Null);
    }
    let routes = one.namespace.shell("ip", "route");
    assert!(!routes.contains("10.244.1.1 ") && routes.contains("10.244.1.2 "), "{routes}");
    assert_eq!(sync(&one, &routes::Table::new()), 2);
    let routes = one.namespace.shell("ip", "route");
    assert!(routes.contains("10.99.0.0/16") && !routes.contains("10.244.2.0/24") && !routes.contains("unreachable"), "{routes}");
    assert_eq!(one.cni("CHECK", "a", &pod_a, json!({}))["code"], 101);
}

#[test]
fn the_loopback_of_a_sandbox_is_raised() {
    let (node, pod) = (Node::new(&[]), Namespace::new());
    assert!(pod.shell("ip", "link show lo").contains("state DOWN"));
    let result = node.cni("ADD", "a", &pod, json!({"cniVersion": "0.3.1", "name": "cni-loopback", "type": "loopback"}));
    assert_eq!((&result["interfaces"][0]["name"], &result["ips"][0]["address"]), (&json!("lo"), &json!("127.0.0.1/8")), "{result}");
    assert!(pod.shell("ip", "link show lo").contains("UP"));
    assert_eq!(node.cni("DEL", "a", &pod, json!({"type": "loopback"})), Value::Null);
}

#[test]
fn a_repeated_add_keeps_the_address_and_gc_frees_the_rest() {
    let node = Node::new(&["10.244.1.0/24"]);
    let (pod_a, pod_b) = (Namespace::new(), Namespace::new());
    let first = node.cni("ADD", "a", &pod_a, json!({}));
    node.cni("ADD", "b", &pod_b, json!({}));
    // The sandbox's namespace was made anew after a crash.
    let again = Namespace::new();
    assert_eq!(node.cni("ADD", "a", &again, json!({}))["ips"], first["ips"]);
    assert_eq!(node.cni("CHECK", "a", &again, json!({})), Value::Null);
    let alive = json!({"cniVersion": "1.1.0", "cni.dev/valid-attachments": [{"containerID": "b", "ifname": "eth0"}]});
    assert_eq!(node.cni("GC", "", &pod_a, alive), Value::Null);
    assert_eq!(node.cni("CHECK", "a", &again, json!({}))["code"], 101);
    assert_eq!(node.cni("CHECK", "b", &pod_b, json!({})), Value::Null);
    assert_eq!(node.namespace.shell("ip", "-o link show type veth").lines().count(), 1);
}

#[test]
fn a_pod_has_no_network_before_the_agent_admits_it() {
    let node = Node::new(&["10.244.1.0/24", "fd00:1::/64"]);
    let pod = Namespace::new();
    node.agent.lock().unwrap().refusal = Some("the kernel is busy");
    let refused = node.cni("ADD", "a", &pod, json!({}));
    let message = "the node agent hasn't admitted the pod to the network: the kernel is busy";
    assert_eq!((&refused["code"], &refused["msg"]), (&json!(11), &json!(message)));
    assert!(outrigger_network::attachments(node.data.path()).unwrap().is_empty(), "nothing stays of it");
    assert_eq!(node.namespace.shell("ip", "-o link show type veth"), "");
    {
        let agent = node.agent.lock().unwrap();
        let [seen] = &agent.seen[..] else { panic!("{:?}", agent.seen) };
        assert_eq!((seen.key.as_str(), seen.pod.as_deref(), seen.addresses.len()), ("a-eth0", Some("ns/web"), 2));
    }
    node.agent.lock().unwrap().refusal = None;
    assert_eq!(node.cni("ADD", "a", &pod, json!({}))["code"], Value::Null);
    assert_eq!(node.cni("DEL", "a", &pod, json!({})), Value::Null);
    let agent = node.agent.lock().unwrap();
    assert_eq!(agent.asked, ["/attachments?admit=a-eth0", "/attachments?admit=a-eth0", "/attachments"]);
    assert!(agent.seen.is_empty());
    drop(agent);
    let nobody = json!({"agentSocket": "/nonexistent/agent.sock"});
    let refused = node.cni("ADD", "a", &pod, nobody.clone());
    assert_eq!(refused["code"], 11, "{refused}");
    assert_eq!(node.cni("DEL", "a", &pod, nobody), Value::Null, "DEL needs nobody");
}

#[test]
fn dns_answers_on_the_service_address() {
    use outrigger_cluster::watch::Watch;
    let node = Namespace::new();
    node.ip("link set lo up");
    let (ready, is_ready) = std::sync::mpsc::channel();
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    let server = std::thread::spawn({
        let namespace = node.0.try_clone().unwrap();
        move || {
            nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            netns::block_on(async {
                let watch = Watch::default();
                let config = outrigger_network::dns::Config {
                    addresses: vec!["10.96.0.10".parse().unwrap()],
                    domain: "cluster.local".to_owned(),
                    resolv_conf: "/nonexistent".into(),
                };
                let (dns, _tasks) = outrigger_network::dns::Dns::start(config, &watch);
                watch.endpoint_slices.replace(Vec::new());
                watch.services.replace(vec![
                    serde_json::from_value(
                        json!({"metadata": {"namespace": "default", "name": "web"}, "spec": {"clusterIP": "10.96.0.7"}}),
                    )
                    .unwrap(),
                ]);
                ready.send(()).unwrap();
                while is_done.try_recv().is_err() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                dns.metrics()
            })
            .unwrap()
        }
    });
    is_ready.recv().unwrap();
    let question = |name: &str| {
        let mut message = hickory_proto::op::Message::query();
        message.add_query(hickory_proto::op::Query::query(name.parse().unwrap(), hickory_proto::rr::RecordType::A));
        message.to_vec().unwrap()
    };
    let ask = |name: &str| {
        node.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            // The server's first moments: its address may not be there yet.
            for _ in 0..50 {
                let mut buffer = [0; 1500];
                let asked = socket.send_to(&question(name), "10.96.0.10:53").and_then(|_| socket.recv(&mut buffer));
                if let Ok(length) = asked {
                    return hickory_proto::op::Message::from_vec(&buffer[..length]).unwrap();
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            panic!("no answer for {name}")
        })
    };
    let reply = ask("web.default.svc.cluster.local.");
    assert_eq!(reply.answers[0].data.to_string(), "10.96.0.7");
    assert!(reply.metadata.authoritative && reply.metadata.recursion_available);
    assert_eq!(ask("www.example.com.").metadata.response_code, hickory_proto::op::ResponseCode::ServFail);
    let over_tcp = node.run(|| {
        let mut stream = TcpStream::connect("10.96.0.10:53").unwrap();
        let question = question("none.default.svc.cluster.local.");
        stream.write_all(&u16::try_from(question.len()).unwrap().to_be_bytes()).unwrap();
        stream.write_all(&question).unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut reply = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut reply).unwrap();
        hickory_proto::op::Message::from_vec(&reply).unwrap()
    });
    assert_eq!(over_tcp.metadata.response_code, hickory_proto::op::ResponseCode::NXDomain);
    // The node's own packets must not carry the Service's address.
    assert!(node.shell("ip", "addr show dev lo").contains("inet 10.96.0.10/32 scope host"));
    done.send(()).unwrap();
    let metrics = server.join().unwrap();
    assert!(metrics.contains("outrigger_dns_responses_total{rcode=\"NXDOMAIN\"} 1"), "{metrics}");
}
