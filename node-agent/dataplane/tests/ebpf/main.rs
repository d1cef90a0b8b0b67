//! The eBPF backend on the real kernel, in cgroups and namespaces of its own.
#![allow(clippy::unwrap_used, reason = "a failed precondition is a failed test")]
mod balancing;
#[path = "../shared/host.rs"]
mod host;
mod lab;
mod outside;
mod scale;
mod sight;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use lab::{Lab, service, slice};
use outrigger_dataplane::Parting;
use serde_json::json;

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// Answers every connection with the address it listens on.
fn serve_tcp(listen: &str) {
    let listener = TcpListener::bind(listen).unwrap();
    let name = listen.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let name = name.clone();
            std::thread::spawn(move || {
                let _ = stream.write_all(format!("{name}\n").as_bytes());
                // Held until the client is done.
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest);
            });
        }
    });
}

fn serve_udp(listen: &str) {
    let socket = UdpSocket::bind(listen).unwrap();
    let name = listen.to_owned();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(name.as_bytes(), from);
        }
    });
}

/// Who answers a connection to `dial`.
fn ask(dial: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&addr(dial), Duration::from_secs(5))?;
    let name = read_name(&mut stream)?;
    assert_eq!(stream.peer_addr()?, addr(dial), "the program sees whom it dialled");
    Ok(name)
}

fn read_name(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut name = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        name.push(byte[0]);
    }
    Ok(String::from_utf8(name).unwrap())
}

fn client(bind: &str) -> UdpSocket {
    let socket = UdpSocket::bind(bind).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

/// Who answers a datagram from an unconnected socket; the answer must come from whom it was sent to.
fn ask_udp(socket: &UdpSocket, dial: &str) -> std::io::Result<String> {
    socket.send_to(b"?", dial)?;
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer)?;
    assert_eq!(from, addr(dial));
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// The distinct answers of many tries, sorted.
fn many(mut ask: impl FnMut() -> String) -> Vec<String> {
    let mut answers: Vec<_> = (0..60).map(|_| ask()).collect();
    answers.sort();
    answers.dedup();
    answers
}

#[test]
fn cluster_ip_over_tcp_reaches_all_backends_and_hides_them() {
    Lab::run(&["10.0.0.1/32", "10.0.0.2/32"], |lab| {
        serve_tcp("10.0.0.1:8080");
        serve_tcp("10.0.0.2:8080");
        let mut agent = lab.agent();
        agent.apply(&[service("web", "10.96.0.1", "80/TCP", json!({})), slice("web", "8080/TCP", &["10.0.0.1", "10.0.0.2"])]);
        assert_eq!(many(|| ask("10.96.0.1:80").unwrap()), ["10.0.0.1:8080", "10.0.0.2:8080"]);
        assert_eq!(ask("10.0.0.1:8080").unwrap(), "10.0.0.1:8080", "direct connections are left alone");
        let lines = outrigger_dataplane::ebpf::inspect::frontends(&lab.config.pin_dir).unwrap();
        assert_eq!((lines.len(), lines[0].connections, lines[0].backends.len()), (1, 60, 2));
    });
}

#[test]
fn cluster_ip_over_udp_connected_and_not() {
    Lab::run(&["10.0.0.1/32", "10.0.0.2/32", "10.0.0.3/32"], |lab| {
        ["10.0.0.1:5353", "10.0.0.2:5353", "10.0.0.3:5353"].into_iter().for_each(serve_udp);
        let mut agent = lab.agent();
        agent.apply(&[
            service("a", "10.96.0.10", "53/UDP", json!({})),
            slice("a", "5353/UDP", &["10.0.0.1", "10.0.0.2"]),
            service("b", "10.96.0.11", "53/UDP", json!({})),
            slice("b", "5353/UDP", &["10.0.0.3"]),
        ]);
        assert_eq!(many(|| ask_udp(&client("0.0.0.0:0"), "10.96.0.10:53").unwrap()), ["10.0.0.1:5353", "10.0.0.2:5353"]);
        let one = client("0.0.0.0:0");
        assert_eq!(many(|| ask_udp(&one, "10.96.0.10:53").unwrap()).len(), 1, "a socket keeps its backend");
        let first = ask_udp(&one, "10.96.0.10:53").unwrap();
        for _ in 0..20 {
            assert_eq!(ask_udp(&one, "10.96.0.11:53").unwrap(), "10.0.0.3:5353");
            assert_eq!(ask_udp(&one, "10.96.0.10:53").unwrap(), first);
        }
        let connected = client("0.0.0.0:0");
        connected.connect("10.96.0.10:53").unwrap();
        assert_eq!(connected.peer_addr().unwrap(), addr("10.96.0.10:53"));
        connected.send(b"?").unwrap();
        let mut buffer = [0; 64];
        let (length, from) = connected.recv_from(&mut buffer).unwrap();
        assert_eq!((length, from), ("10.0.0.1:5353".len(), addr("10.96.0.10:53")));
    });
}

#[test]
fn ipv6_and_ipv4_through_ipv6_sockets() {
    Lab::run(&["10.0.0.1/32", "fd00::1/128"], |lab| {
        serve_tcp("10.0.0.1:8080");
        serve_tcp("[fd00::1]:8080");
        serve_udp("[fd00::1]:8080");
        let mut agent = lab.agent();
        agent.apply(&[
            service("four", "10.96.0.1", "80/TCP", json!({})),
            slice("four", "8080/TCP", &["10.0.0.1"]),
            service("six", "fd96::1", "80/TCP", json!({})),
            slice("six", "8080/TCP", &["fd00::1"]),
            service("six-udp", "fd96::2", "80/UDP", json!({})),
            slice("six-udp", "8080/UDP", &["fd00::1"]),
        ]);
        assert_eq!(ask("[fd96::1]:80").unwrap(), "[fd00::1]:8080");
        assert_eq!(ask("[::ffff:10.96.0.1]:80").unwrap(), "10.0.0.1:8080");
        assert_eq!(ask_udp(&client("[::]:0"), "[fd96::2]:80").unwrap(), "[fd00::1]:8080");
    });
}

#[test]
fn without_endpoints_it_is_refused_at_once() {
    Lab::run(&[], |lab| {
        let mut agent = lab.agent();
        agent.apply(&[service("tcp", "10.96.0.1", "80/TCP", json!({})), service("udp", "10.96.0.2", "80/UDP", json!({}))]);
        assert_eq!(ask("10.96.0.1:80").unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(ask_udp(&client("0.0.0.0:0"), "10.96.0.2:80").unwrap_err().kind(), ErrorKind::ConnectionRefused);
    });
}

#[test]
fn node_ports_answer_on_the_nodes_addresses_and_its_localhost() {
    Lab::run(&["10.0.0.1/32", "10.1.0.1/32"], |lab| {
        serve_tcp("10.0.0.1:8080");
        host::ip("link add uplink type bridge");
        host::ip("addr add 10.1.0.2/24 dev uplink");
        let mut agent = lab.agent();
        agent.apply(&[
            service("web", "10.96.0.1", "80/TCP", json!({"type": "NodePort", "nodePort": 30080})),
            slice("web", "8080/TCP", &["10.0.0.1"]),
        ]);
        for dial in ["10.1.0.2:30080", "127.0.0.1:30080", "10.96.0.1:80"] {
            assert_eq!(ask(dial).unwrap(), "10.0.0.1:8080", "{dial}");
        }
        assert_eq!(ask("10.1.0.2:30081").unwrap_err().kind(), ErrorKind::ConnectionRefused);
        // A pod's localhost is its own.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                host::ip("link set lo up");
                assert_eq!(ask("127.0.0.1:30080").unwrap_err().kind(), ErrorKind::ConnectionRefused);
                // In reach of the hook, though not of the network here.
                assert_eq!(ask("10.1.0.2:30080").unwrap_err().kind(), ErrorKind::NetworkUnreachable);
            });
        });
    });
}

#[test]
fn session_affinity_keeps_a_client_on_its_backend() {
    Lab::run(&["10.0.0.1/32", "10.0.0.2/32", "10.0.0.3/32"], |lab| {
        ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080"].into_iter().for_each(serve_tcp);
        let mut agent = lab.agent();
        let affinity = json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 100}}});
        agent.apply(&[service("web", "10.96.0.1", "80/TCP", affinity), slice("web", "8080/TCP", &["10.0.0.1", "10.0.0.2", "10.0.0.3"])]);
        let answers = many(|| ask("10.96.0.1:80").unwrap());
        assert_eq!(answers.len(), 1);
        // It lasts over a restart of the agent and over other backends' coming and going.
        drop(agent);
        let mut agent = lab.agent();
        agent.apply(&[
            service("web", "10.96.0.1", "80/TCP", json!({"sessionAffinity": "ClientIP"})),
            slice("web", "8080/TCP", &["10.0.0.0", "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"]),
        ]);
        assert_eq!(many(|| ask("10.96.0.1:80").unwrap()), answers);
        let rest: Vec<_> = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].into_iter().filter(|ip| !answers[0].starts_with(ip)).collect();
        agent.apply(&[slice("web", "8080/TCP", &rest)]);
        let others = many(|| ask("10.96.0.1:80").unwrap());
        assert!(others.len() == 1 && others != answers, "{others:?}");
    });
}

/// Waits until the socket was ended from outside.
fn is_ended(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    match stream.read_exact(&mut [0; 8]) {
        Err(error) => error.kind() == ErrorKind::ConnectionAborted,
        Ok(_) => false,
    }
}

#[test]
fn sockets_of_a_gone_backend_end_and_others_live() {
    Lab::run(&["10.0.0.1/32", "10.0.0.2/32"], |lab| {
        ["10.0.0.1:8080", "10.0.0.2:8080"].into_iter().for_each(serve_tcp);
        serve_udp("10.0.0.1:8080");
        let mut agent = lab.agent();
        let web = service("web", "10.96.0.1", "80/TCP", json!({}));
        let dns = service("dns", "10.96.0.2", "80/UDP", json!({}));
        agent.apply(&[
            web.clone(),
            slice("web", "8080/TCP", &["10.0.0.1", "10.0.0.2"]),
            dns.clone(),
            slice("dns", "8080/UDP", &["10.0.0.1"]),
        ]);
        let mut streams: Vec<_> = (0..20).map(|_| TcpStream::connect("10.96.0.1:80").unwrap()).collect();
        let names: Vec<_> = streams.iter_mut().map(|stream| read_name(stream).unwrap()).collect();
        let mut direct = TcpStream::connect("10.0.0.1:8080").unwrap();
        read_name(&mut direct).unwrap();
        let connected = client("0.0.0.0:0");
        connected.connect("10.96.0.2:80").unwrap();
        let applied = agent.apply(&[slice("web", "8080/TCP", &["10.0.0.2"]), slice("dns", "8080/UDP", &[])]);
        let doomed = names.iter().filter(|name| *name == "10.0.0.1:8080").count();
        assert!(doomed > 0 && applied.ended == doomed + 1, "{applied:?} of {names:?}");
        for (stream, name) in streams.iter_mut().zip(&names) {
            assert_eq!(is_ended(stream), name == "10.0.0.1:8080", "{name}");
        }
        assert!(!is_ended(&mut direct), "who dialled the pod itself is not the Service's client");
        assert_eq!(connected.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionAborted);
    });
}

#[test]
fn a_restarted_agent_finds_its_work_and_ends_what_died_meanwhile() {
    Lab::run(&["10.0.0.1/32", "10.0.0.2/32"], |lab| {
        ["10.0.0.1:8080", "10.0.0.2:8080"].into_iter().for_each(serve_tcp);
        let web = service("web", "10.96.0.1", "80/TCP", json!({}));
        let old = service("old", "10.96.0.2", "80/TCP", json!({}));
        let mut agent = lab.agent();
        agent.apply(&[web.clone(), slice("web", "8080/TCP", &["10.0.0.1"]), old.clone(), slice("old", "8080/TCP", &["10.0.0.1"])]);
        let mut stream = TcpStream::connect("10.96.0.1:80").unwrap();
        read_name(&mut stream).unwrap();
        drop(agent);
        assert_eq!(ask("10.96.0.1:80").unwrap(), "10.0.0.1:8080", "without an agent");
        let mut agent = lab.agent();
        assert_eq!(agent.found, 2);
        assert_eq!(ask("10.96.0.2:80").unwrap(), "10.0.0.1:8080", "nothing changes before the first sync");
        let applied = agent.apply(&[web, slice("web", "8080/TCP", &["10.0.0.2"])]);
        assert_eq!((applied.upserted, applied.removed, applied.ended), (1, 1, 1));
        assert!(is_ended(&mut stream));
        assert_eq!(ask("10.96.0.1:80").unwrap(), "10.0.0.2:8080");
        drop(agent);
        let mut agent = lab.agent();
        let web = service("web", "10.96.0.1", "80/TCP", json!({}));
        let applied = agent.apply(&[web, slice("web", "8080/TCP", &["10.0.0.2"])]);
        assert_eq!((applied.upserted, applied.removed, applied.ended), (0, 0, 0), "what is right is left alone");
    });
}

#[test]
fn restarts_upgrades_and_growth_fail_no_connect() {
    Lab::run(&["10.0.0.1/32", "10.0.0.2/32"], |lab| {
        ["10.0.0.1:8080", "10.0.0.2:8080"].into_iter().for_each(serve_tcp);
        let objects = || [service("web", "10.96.0.1", "80/TCP", json!({})), slice("web", "8080/TCP", &["10.0.0.1", "10.0.0.2"])];
        let mut agent = lab.agent();
        agent.apply(&objects());
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let load = scope.spawn(|| {
                let mut count = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    ask("10.96.0.1:80").unwrap();
                    count += 1;
                }
                count
            });
            for _ in 0..10 {
                drop(std::mem::replace(&mut agent, lab.agent()));
                agent.apply(&objects());
            }
            // More Services than the first maps have room for.
            let many: Vec<_> = (0..20_000)
                .flat_map(|n| {
                    let name = format!("s{n}");
                    let ip = format!("10.97.{}.{}", n / 250, n % 250 + 1);
                    [service(&name, &ip, "80/TCP", json!({})), slice(&name, "8080/TCP", &["10.0.0.1", "10.0.0.2"])]
                })
                .collect();
            let start = Instant::now();
            assert_eq!(agent.apply(&many).upserted, 20_000);
            println!("20,000 Services in {:?}", start.elapsed());
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(load.join().unwrap() > 100);
        });
        assert_eq!(ask("10.97.79.250:80").unwrap().split_once(':').unwrap().1, "8080");
        let start = Instant::now();
        agent.apply(&[slice("s77", "8080/TCP", &["10.0.0.2"])]);
        println!("one endpoint of 20,000 Services in {:?}", start.elapsed());
        drop(agent);
        assert_eq!(lab.agent().found, 20_001, "the larger maps are adopted");
    });
}

#[test]
fn parting_leaves_live_flows_or_nothing() {
    Lab::run(&["10.0.0.1/32"], |lab| {
        serve_tcp("10.0.0.1:8080");
        serve_udp("10.0.0.1:8080");
        let mut agent = lab.agent();
        agent.apply(&[
            service("web", "10.96.0.1", "80/TCP", json!({})),
            slice("web", "8080/TCP", &["10.0.0.1"]),
            service("dns", "10.96.0.2", "80/UDP", json!({})),
            slice("dns", "8080/UDP", &["10.0.0.1"]),
        ]);
        let stream = TcpStream::connect("10.96.0.1:80").unwrap();
        let connected = client("0.0.0.0:0");
        connected.connect("10.96.0.2:80").unwrap();
        agent.part(Parting::Handover);
        assert_eq!(stream.peer_addr().unwrap(), addr("10.96.0.1:80"));
        connected.send(b"?").unwrap();
        assert_eq!(connected.recv_from(&mut [0; 64]).unwrap().1, addr("10.96.0.2:80"));
        assert_eq!(TcpStream::connect("10.96.0.1:80").unwrap_err().kind(), ErrorKind::NetworkUnreachable);
        agent.part(Parting::Final);
        assert!(!lab.config.pin_dir.exists());
        assert_eq!(stream.peer_addr().unwrap(), addr("10.0.0.1:8080"), "no program is left to rename it");
    });
}
