//! The node's own resolvers: questions go to them as they came, bytes unchanged.
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use hickory_proto::op::{Message, OpCode, Query};
use hickory_proto::rr::{Name, Record, RecordType};
use tokio::net::{TcpStream, UdpSocket};

use super::server::{read_frame, write_frame};

const TIMEOUT: Duration = Duration::from_secs(2);
const ROUNDS: usize = 2;
/// As the resolver library has it.
const MAX_SERVERS: usize = 3;
/// systemd's stub answers on this address only on the node itself; its real servers are in the other file.
const SYSTEMD_RESOLV_CONF: &str = "/run/systemd/resolve/resolv.conf";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// The resolvers of one resolv.conf, read again when the file changes.
pub struct Upstream {
    path: PathBuf,
    /// Our own addresses: asking ourselves would loop.
    own: Vec<IpAddr>,
    cached: Mutex<(Option<SystemTime>, Vec<IpAddr>)>,
}

impl Upstream {
    pub fn new(path: PathBuf, own: Vec<IpAddr>) -> Self {
        Self { path, own, cached: Mutex::new((None, Vec::new())) }
    }

    fn servers(&self) -> Vec<IpAddr> {
        let modified = std::fs::metadata(&self.path).and_then(|metadata| metadata.modified()).ok();
        let mut cached = self.cached.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if cached.0 != modified || modified.is_none() {
            let mut servers = self.read(&self.path);
            if servers == [IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53))] {
                let real = self.read(SYSTEMD_RESOLV_CONF.as_ref());
                servers = if real.is_empty() { servers } else { real };
            }
            *cached = (modified, servers);
        }
        cached.1.clone()
    }

    fn read(&self, path: &std::path::Path) -> Vec<IpAddr> {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        parse_servers(&text).into_iter().filter(|server| !self.own.contains(server)).collect()
    }

    /// Passes a question on and returns the first reply; errors at once when there is nobody to ask.
    pub async fn exchange(&self, question: &[u8], transport: Transport) -> io::Result<Vec<u8>> {
        let servers = self.servers();
        let mut last = io::Error::new(io::ErrorKind::NotFound, "no upstream resolver is configured");
        for _ in 0..ROUNDS {
            for server in &servers {
                let server = SocketAddr::new(*server, 53);
                let attempt = async {
                    match transport {
                        Transport::Udp => exchange_udp(server, question).await,
                        Transport::Tcp => exchange_tcp(server, question).await,
                    }
                };
                match tokio::time::timeout(TIMEOUT, attempt).await {
                    Ok(Ok(reply)) => return Ok(reply),
                    Ok(Err(error)) => last = error,
                    Err(_) => last = io::Error::new(io::ErrorKind::TimedOut, format!("{server} didn't answer")),
                }
            }
        }
        Err(last)
    }

    /// Asks for the records of one name.
    pub async fn resolve(&self, name: Name, kind: RecordType) -> io::Result<Vec<Record>> {
        let mut question = Message::query();
        question.metadata.op_code = OpCode::Query;
        question.metadata.recursion_desired = true;
        question.add_query(Query::query(name, kind));
        let bytes = question.to_vec().map_err(io::Error::other)?;
        let reply = self.exchange(&bytes, Transport::Udp).await?;
        Ok(Message::from_vec(&reply).map_err(io::Error::other)?.answers)
    }
}

async fn exchange_udp(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    // A socket per question: its random port is half of what protects from forged replies.
    let any = if server.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let is_reply = length >= 12 && buffer[..2] == question[..2] && buffer[2] & 0x80 != 0;
        if is_reply {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn exchange_tcp(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    write_frame(&mut stream, question).await?;
    read_frame(&mut stream).await?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// The `nameserver` lines; a zone after `%` is dropped with its address, which only the stub could use.
fn parse_servers(text: &str) -> Vec<IpAddr> {
    let lines = text.lines().map(|line| line.split(['#', ';']).next().unwrap_or_default());
    let servers = lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()).flatten()?.parse().ok()
    });
    servers.take(MAX_SERVERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_resolv_conf() {
        let text = "# made by hand\nsearch example.org\nnameserver 192.0.2.1 # first\n nameserver fe80::1%eth0\nnameserver 2001:db8::1\noptions ndots:5\n";
        assert_eq!(parse_servers(text), ["192.0.2.1".parse::<IpAddr>().unwrap(), "2001:db8::1".parse().unwrap()]);
    }

    #[tokio::test]
    async fn asking_nobody_fails_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resolv.conf");
        std::fs::write(&path, "nameserver 10.96.0.10\n").unwrap();
        let upstream = Upstream::new(path, vec!["10.96.0.10".parse().unwrap()]);
        let error = upstream.exchange(&[0; 12], Transport::Udp).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
