//! What the test and its processes in the namespaces say to each other: one JSON object per line.
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Transport {
    Tcp,
    Udp,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Answers every line or datagram with this name and the peer's address.
    Serve { transport: Transport, address: SocketAddr, name: String },
    /// Connects, asks, closes; `patience` is how long it waits where no answer is expected.
    Dial { transport: Transport, target: SocketAddr, patience: Option<Duration> },
    /// Connects and keeps the connection under this name.
    ///
    /// `port` is its own; without one the socket isn't connected (UDP).
    Open { id: String, transport: Transport, target: SocketAddr, port: Option<u16> },
    /// Asks once more on a kept connection.
    Say { id: String },
    /// Sends this many bytes, half-closes, and counts what comes back.
    Stream { target: SocketAddr, bytes: usize },
    /// Sends one datagram of this size and waits for its echo.
    Datagram { target: SocketAddr, bytes: usize },
    /// An HTTP GET.
    Get { target: SocketAddr, path: String },
    /// Only for the process that runs the proxy.
    Proxy(ProxyRequest),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ProxyRequest {
    Start {
        config: ProxyConfig,
        objects: Vec<serde_json::Value>,
    },
    Apply(serde_json::Value),
    Delete(serde_json::Value),
    SetMode(String),
    /// What is counted of each Service port, as JSON.
    Counts,
    /// Listens to what happens to connections.
    Watch,
    /// What has happened since, one line each.
    Happened,
    Teardown,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProxyConfig {
    pub mode: String,
    pub node_name: String,
    pub node_ips: Vec<IpAddr>,
    pub cluster_cidrs: Vec<String>,
    pub nodeport_addresses: Vec<String>,
    pub masquerade_all: bool,
    pub pod_interface_prefix: Option<String>,
    pub cgroup2_path: String,
    pub pin_dir: String,
    pub instance: String,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Done,
    /// A server's answer; `seen_from` is who the client believes it talks to.
    Answer {
        name: String,
        peer: IpAddr,
        seen_from: SocketAddr,
    },
    Streamed(usize),
    /// Head and body as they came.
    Page(String),
    Refused,
    Reset,
    Unreachable,
    TimedOut,
    Failed(String),
}
