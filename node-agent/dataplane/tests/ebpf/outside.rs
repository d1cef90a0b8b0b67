//! Traffic from outside the node, which no socket hook sees.
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use serde_json::json;

use crate::lab::{Lab, Network, service, slice};

/// Answers each line, and each datagram, with its own address and the client's.
fn serve(listen: &'static str) -> impl FnOnce() + Send {
    move || {
        let listener = TcpListener::bind(listen).unwrap();
        let socket = UdpSocket::bind(listen).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                std::thread::spawn(move || {
                    let from = stream.peer_addr().unwrap().ip();
                    for _ in BufReader::new(stream.try_clone().unwrap()).lines() {
                        if writeln!(stream, "{listen} {from}").is_err() {
                            return;
                        }
                    }
                });
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(format!("{listen} {}", from.ip()).as_bytes(), from);
            }
        });
    }
}

struct Talk {
    reader: BufReader<TcpStream>,
}

impl Talk {
    fn open(lab: &Lab, network: &Network, dial: &'static str) -> Self {
        let connect = move || TcpStream::connect_timeout(&dial.parse().unwrap(), Duration::from_secs(5));
        let stream = lab.unhooked(|| network.client.run(connect)).unwrap_or_else(|error| panic!("{dial}: {error}"));
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        Self { reader: BufReader::new(stream) }
    }

    fn ask(&mut self) -> std::io::Result<String> {
        self.reader.get_mut().write_all(b"?\n")?;
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}

fn ask_udp(lab: &Lab, network: &Network, dial: &'static str) -> std::io::Result<String> {
    let bind = if dial.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = lab.unhooked(|| network.client.run(move || UdpSocket::bind(bind)))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.send_to(b"?", dial)?;
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer)?;
    assert_eq!(from, dial.parse().unwrap());
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

fn node_port(name: &str, ip: &str, protocol: &str, port: u16) -> serde_json::Value {
    service(name, ip, &format!("80/{protocol}"), json!({"type": "NodePort", "nodePort": port}))
}

#[test]
fn node_ports_reach_pods_here_with_the_clients_address() {
    Lab::run(&[], |lab| {
        let network = Network::new();
        network.pod.run(serve("10.0.0.1:8080"));
        network.pod.run(serve("[fd00::1]:8080"));
        let mut agent = lab.agent();
        agent.apply(&[
            node_port("tcp", "10.96.0.1", "TCP", 30080),
            slice("tcp", "8080/TCP", &["10.0.0.1"]),
            node_port("udp", "10.96.0.2", "UDP", 30080),
            slice("udp", "8080/UDP", &["10.0.0.1"]),
            node_port("six", "fd96::1", "TCP", 30086),
            slice("six", "8080/TCP", &["fd00::1"]),
            node_port("six-udp", "fd96::2", "UDP", 30086),
            slice("six-udp", "8080/UDP", &["fd00::1"]),
        ]);
        assert_eq!(Talk::open(lab, &network, "10.1.0.1:30080").ask().unwrap(), "10.0.0.1:8080 10.1.0.9");
        assert_eq!(ask_udp(lab, &network, "10.1.0.1:30080").unwrap(), "10.0.0.1:8080 10.1.0.9");
        assert_eq!(Talk::open(lab, &network, "[fd01::1]:30086").ask().unwrap(), "[fd00::1]:8080 fd01::9");
        assert_eq!(ask_udp(lab, &network, "[fd01::1]:30086").unwrap(), "[fd00::1]:8080 fd01::9");
    });
}

#[test]
fn node_ports_reach_pods_elsewhere_through_this_node() {
    Lab::run(&[], |lab| {
        let network = Network::new();
        network.other.run(serve("10.0.1.1:8080"));
        let mut agent = lab.agent();
        agent.apply(&[
            node_port("tcp", "10.96.0.1", "TCP", 30080),
            slice("tcp", "8080/TCP", &["10.0.1.1"]),
            node_port("udp", "10.96.0.2", "UDP", 30080),
            slice("udp", "8080/UDP", &["10.0.1.1"]),
        ]);
        let mut talks: Vec<_> = (0..50).map(|_| Talk::open(lab, &network, "10.1.0.1:30080")).collect();
        for talk in &mut talks {
            assert_eq!(talk.ask().unwrap(), "10.0.1.1:8080 10.1.0.1");
        }
        assert_eq!(ask_udp(lab, &network, "10.1.0.1:30080").unwrap(), "10.0.1.1:8080 10.1.0.1");
    });
}

#[test]
fn connections_from_outside_outlive_the_agent_and_end_with_their_backend() {
    Lab::run(&[], |lab| {
        let network = Network::new();
        network.pod.run(serve("10.0.0.1:8080"));
        network.other.run(serve("10.0.1.1:8080"));
        let mut agent = lab.agent();
        let web = || node_port("web", "10.96.0.1", "TCP", 30080);
        let both = || slice("web", "8080/TCP", &["10.0.0.1", "10.0.1.1"]);
        agent.apply(&[web(), both()]);
        let mut talks: Vec<_> = (0..20).map(|_| Talk::open(lab, &network, "10.1.0.1:30080")).collect();
        let answers: Vec<_> = talks.iter_mut().map(|talk| talk.ask().unwrap()).collect();
        drop(agent);
        let mut agent = lab.agent();
        let applied = agent.apply(&[web(), both()]);
        assert_eq!((applied.upserted, applied.ended), (0, 0));
        for (talk, answer) in talks.iter_mut().zip(&answers) {
            assert_eq!(talk.ask().unwrap(), *answer);
        }
        let doomed = answers.iter().filter(|answer| answer.starts_with("10.0.1.1")).count();
        assert_eq!(agent.apply(&[slice("web", "8080/TCP", &["10.0.0.1"])]).ended, doomed);
        for (talk, answer) in talks.iter_mut().zip(&answers) {
            match talk.ask() {
                Ok(again) => assert_eq!(again, *answer),
                Err(error) => assert_eq!((error.kind(), &answer[..8]), (ErrorKind::ConnectionReset, "10.0.1.1")),
            }
        }
    });
}

#[test]
fn nothing_listens_where_no_backend_is() {
    Lab::run(&[], |lab| {
        let network = Network::new();
        let mut agent = lab.agent();
        agent.apply(&[node_port("web", "10.96.0.1", "TCP", 30080)]);
        let connect = || TcpStream::connect_timeout(&"10.1.0.1:30080".parse().unwrap(), Duration::from_secs(5));
        let refused = lab.unhooked(|| network.client.run(connect)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    });
}
