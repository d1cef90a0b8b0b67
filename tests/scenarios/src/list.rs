//! What must hold, for every backend. What one can't do is named with its reason.
//!
//! Every scenario is written with IPv4 addresses and played a second time with IPv6 ones, unless it says that it has its own.
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use outrigger_dataplane::Mode;

use crate::talk::Transport;
use crate::world::Place;

mod balancing;
mod basic;
mod life;
mod outside;
mod packets;
mod policy;
mod sight;

#[derive(Clone, Debug)]
pub enum Step {
    /// Objects that are new or changed.
    Apply(String),
    Delete(String),
    /// Connects several times.
    Dial {
        from: Place,
        transport: Transport,
        to: String,
        expect: Expect,
    },
    /// Connects again and again with a pause between, until all of these have answered.
    DialApart {
        from: Place,
        to: String,
        pause: Duration,
        until: &'static [&'static str],
    },
    Open {
        id: &'static str,
        from: Place,
        transport: Transport,
        to: String,
        /// The client's own port; 0 for any.
        port: u16,
        expect: Expect,
    },
    /// An unconnected UDP socket: the answer must come from the address that was asked.
    OpenUnconnected {
        id: &'static str,
        from: Place,
        to: String,
        expect: Expect,
    },
    /// On a connection that was opened before: the answer must be the one of the first time.
    Same {
        id: &'static str,
    },
    Say {
        id: &'static str,
        expect: Expect,
    },
    /// A megabyte goes there and comes back, though the sender closes its half first.
    Stream {
        from: Place,
        to: String,
    },
    /// A datagram of this size goes there and comes back.
    Datagram {
        from: Place,
        to: String,
        bytes: usize,
    },
    /// An HTTP GET: the answer has this status and each of these texts in its head or body.
    Get {
        from: Place,
        to: String,
        path: &'static str,
        status: u16,
        contains: &'static [&'static str],
    },
    /// Runs a program on the node.
    Run(String),
    /// What is counted from here on is compared by `Counted`.
    Count,
    /// So many connections to the Service port, over so many backends, and for each reason so many that came to nothing.
    Counted {
        port: &'static str,
        connections: u64,
        backends: usize,
        drops: &'static [(&'static str, u64)],
    },
    Watch,
    /// Each of these lines is told within a while.
    Told(Vec<String>),
    KillAndRestart,
    /// What the objects became while no agent ran.
    KillApplyRestart(String),
    SwitchTo(Mode),
    Sleep(Duration),
}

#[derive(Clone, Debug)]
pub enum Expect {
    /// Over several dials all of these answer, and nobody else.
    From(&'static [&'static str]),
    /// This one answers, and sees the client at this address.
    Sees(&'static str, String),
    /// Over several dials always the same one answers.
    OneOf(&'static [&'static str]),
    Refused,
    /// Refused or reset: the client is told at once.
    Ended,
    TimedOut,
}

/// The proxy's settings that scenarios change.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub nodeport_addresses: &'static [&'static str],
    pub masquerade_all: bool,
    /// `--pod-interface-name-prefix`.
    pub pod_interface_prefix: Option<&'static str>,
}

#[derive(Clone, Debug)]
pub struct Scenario {
    pub name: String,
    pub settings: Settings,
    pub objects: String,
    pub steps: Vec<Step>,
    pub unsupported: &'static [(Mode, &'static str)],
    /// Not to be played with the other family's addresses.
    pub once: bool,
}

const VIP: &str = "10.96.0.10:80";
const ALL: &[&str] = &["a", "b", "r"];
const NOT_KEPT: (Mode, &str) = (Mode::Userspace, "connections run through the agent's process and end with it");

/// Words of the scenarios and their counterparts in IPv6.
const COUNTERPARTS: [(&str, &str); 21] = [
    ("10.96.0.10", "fd00:96::10"),
    ("10.96.0.11", "fd00:96::11"),
    ("10.244.0.0/16", "fd00:244::/32"),
    ("10.244.1.10/32", "fd00:244:1::a/128"),
    ("10.244.1.10", "fd00:244:1::a"),
    ("10.244.1.11", "fd00:244:1::b"),
    ("10.244.1.12", "fd00:244:1::c"),
    ("10.244.1.99", "fd00:244:1::99"),
    ("10.244.2.10", "fd00:244:2::a"),
    ("10.244.2.12", "fd00:244:2::c"),
    ("10.244.2.0/24", "fd00:244:2::/64"),
    ("192.168.77.1/32", "fd00:77::1/128"),
    ("192.168.78.2/32", "fd00:78::2/128"),
    ("192.168.77.1", "fd00:77::1"),
    ("192.168.77.2", "fd00:77::2"),
    ("192.168.78.1", "fd00:78::1"),
    ("192.168.78.2", "fd00:78::2"),
    ("192.168.90.1", "fd00:90::1"),
    ("192.168.90.2", "fd00:90::2"),
    ("127.0.0.1", "::1"),
    ("IPv4", "IPv6"),
];

fn counterpart(text: &str) -> String {
    COUNTERPARTS.iter().fold(text.to_owned(), |text, (four, six)| {
        let words = text.split_inclusive(|c: char| !(c.is_alphanumeric() || c == '.' || c == '/'));
        words
            .map(
                |word| {
                    if word.trim_end_matches(|c: char| !c.is_alphanumeric()) == *four { word.replacen(four, six, 1) } else { word.into() }
                },
            )
            .collect()
    })
}

fn counterpart_socket(text: &str) -> String {
    let socket: SocketAddr = text.parse().expect("scenarios dial sockets");
    let ip: IpAddr = counterpart(&socket.ip().to_string()).parse().expect("the counterpart is an address");
    SocketAddr::new(ip, socket.port()).to_string()
}

/// Lines end with a socket.
fn told_counterpart(line: &str) -> String {
    let (rest, socket) = line.rsplit_once(' ').expect("lines end with a socket");
    format!("{} {}", counterpart(rest), counterpart_socket(socket))
}

impl Scenario {
    /// The same with IPv6 addresses.
    fn six(mut self) -> Self {
        self.name += " (IPv6)";
        self.objects = counterpart(&self.objects);
        for step in &mut self.steps {
            step.six();
        }
        self
    }

    fn unsupported(self, unsupported: &'static [(Mode, &'static str)]) -> Self {
        Self { unsupported, ..self }
    }

    fn with(self, settings: Settings) -> Self {
        Self { settings, ..self }
    }

    fn once(self) -> Self {
        Self { once: true, ..self }
    }
}

impl Step {
    fn six(&mut self) {
        match self {
            Self::Apply(objects) | Self::Delete(objects) | Self::KillApplyRestart(objects) => *objects = counterpart(objects),
            Self::Dial { to, expect, .. } | Self::Open { to, expect, .. } | Self::OpenUnconnected { to, expect, .. } => {
                *to = counterpart_socket(to);
                expect.six();
            }
            Self::DialApart { to, .. } | Self::Stream { to, .. } | Self::Datagram { to, .. } | Self::Get { to, .. } => {
                *to = counterpart_socket(to);
            }
            Self::Say { expect, .. } => expect.six(),
            Self::Run(command) => *command = counterpart(command).replacen("ip ", "ip -6 ", 1),
            Self::Told(lines) => lines.iter_mut().for_each(|line| *line = told_counterpart(line)),
            Self::Count
            | Self::Counted { .. }
            | Self::Watch
            | Self::Same { .. }
            | Self::KillAndRestart
            | Self::SwitchTo(_)
            | Self::Sleep(_) => {}
        }
    }
}

impl Expect {
    fn six(&mut self) {
        if let Self::Sees(_, address) = self {
            *address = counterpart(address);
        }
    }
}

/// A Service with one port 80 on TCP and UDP; `more` is further YAML of its spec, indented by two.
pub fn service(more: &str) -> String {
    named_service("web", "10.96.0.10", 30080, more)
}

fn named_service(name: &str, ip: &str, node_port: u16, more: &str) -> String {
    format!(
        "---
kind: Service
metadata: {{name: {name}, namespace: default}}
spec:
  clusterIP: {ip}
  clusterIPs: [{ip}]
  ports:
  - {{name: tcp, port: 80, protocol: TCP, targetPort: 8080, nodePort: {node_port}}}
  - {{name: udp, port: 80, protocol: UDP, targetPort: 8080, nodePort: {node_port}}}
{more}
"
    )
}

/// A Service that only has its ClusterIP.
pub fn cluster_ip(more: &str) -> String {
    service(more).replace(", nodePort: 30080", "")
}

/// The Service's slice; each endpoint is `(pod, conditions)`.
pub fn slice(endpoints: &[(&str, &str)]) -> String {
    named_slice("web", endpoints, &[])
}

/// `hints` are the endpoints' in their order.
fn named_slice(service: &str, endpoints: &[(&str, &str)], hints: &[&str]) -> String {
    let mut text = format!(
        "---
kind: EndpointSlice
addressType: IPv4
metadata: {{name: {service}-1, namespace: default, labels: {{kubernetes.io/service-name: {service}}}}}
ports:
- {{name: tcp, port: 8080, protocol: TCP}}
- {{name: udp, port: 8080, protocol: UDP}}
endpoints:"
    );
    if endpoints.is_empty() {
        text.push_str(" []");
    }
    for (index, (name, conditions)) in endpoints.iter().enumerate() {
        let (ip, node) = match *name {
            "a" => ("10.244.1.10", "node-1"),
            "b" => ("10.244.1.11", "node-1"),
            "r" => ("10.244.2.10", "node-2"),
            // Of these hosts nobody listens at the addresses: datagrams are answered by ICMP errors.
            "quiet" => ("10.244.1.12", "node-1"),
            "quiet-r" => ("10.244.2.12", "node-2"),
            // Nobody is there.
            _ => ("10.244.1.99", "node-1"),
        };
        let hints = hints.get(index).map(|hints| format!(", hints: {{{hints}}}")).unwrap_or_default();
        text.push_str(&format!("\n- {{addresses: [{ip}], nodeName: {node}, conditions: {{{conditions}}}{hints}}}"));
    }
    text.push('\n');
    text
}

fn ready(names: &[&str]) -> String {
    slice(&names.iter().map(|name| (*name, "ready: true")).collect::<Vec<_>>())
}

fn dial(from: Place, transport: Transport, to: &str, expect: Expect) -> Step {
    Step::Dial { from, transport, to: to.into(), expect }
}

fn open(id: &'static str, from: Place, transport: Transport, to: &str, expect: Expect) -> Step {
    Step::Open { id, from, transport, to: to.into(), port: 0, expect }
}

fn sees(name: &'static str, address: &str) -> Expect {
    Expect::Sees(name, address.into())
}

fn scenario(name: &str, objects: String, steps: Vec<Step>) -> Scenario {
    Scenario { name: name.into(), settings: Settings::default(), objects, steps, unsupported: &[], once: false }
}

pub fn all() -> Vec<Scenario> {
    let written = [basic::list(), balancing::list(), policy::list(), outside::list(), packets::list(), life::list(), sight::list()]
        .into_iter()
        .flatten();
    written
        .flat_map(|scenario| {
            let six = (!scenario.once).then(|| scenario.clone().six());
            std::iter::once(scenario).chain(six)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_of_a_scenario_has_a_counterpart() {
        for scenario in all().into_iter().filter(|scenario| scenario.name.ends_with("(IPv6)")) {
            let text = format!("{} {:?}", scenario.objects, scenario.steps);
            let digits = |word: &str| word.split('.').filter(|part| part.parse::<u8>().is_ok()).count() == 4;
            let left: Vec<&str> = text.split(|c: char| !(c.is_alphanumeric() || c == '.')).filter(|word| digits(word)).collect();
            assert!(left.is_empty(), "{}: {left:?}", scenario.name);
        }
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = all().into_iter().map(|scenario| scenario.name).collect();
        names.sort();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
