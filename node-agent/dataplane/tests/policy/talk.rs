//! What hosts say to each other.
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use crate::host::Host;

/// Long enough for an answer that comes, short enough to wait for one that doesn't.
const PATIENCE: Duration = Duration::from_millis(400);

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// Answers each line, and each datagram, with what was asked.
pub fn serve(host: &Host, listen: &str) {
    let listen = addr(listen);
    host.run(move || {
        let listener = TcpListener::bind(listen).unwrap();
        let socket = UdpSocket::bind(listen).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                std::thread::spawn(move || {
                    for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                        let Ok(line) = line else { return };
                        if writeln!(stream, "{line}").is_err() {
                            return;
                        }
                    }
                });
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 9000];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        });
    });
}

pub struct Tcp(BufReader<TcpStream>);

impl Tcp {
    pub fn open(host: &Host, to: &str) -> Option<Self> {
        let to = addr(to);
        let stream = host.run(move || TcpStream::connect_timeout(&to, PATIENCE)).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Some(Self(BufReader::new(stream)))
    }

    pub fn ask(&mut self) -> bool {
        let mut line = String::new();
        self.0.get_mut().write_all(b"?\n").is_ok() && self.0.read_line(&mut line).is_ok() && line == "?\n"
    }

    /// Waits for longer: what was sent in vain is sent again in growing intervals.
    pub fn ask_again(&mut self) -> bool {
        self.0.get_mut().set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut line = String::new();
        while line.is_empty() || !line.ends_with('\n') {
            if self.0.read_line(&mut line).unwrap_or(0) == 0 {
                return false;
            }
        }
        self.0.get_mut().set_read_timeout(Some(PATIENCE)).unwrap();
        true
    }
}

pub fn tcp(host: &Host, to: &str) -> bool {
    Tcp::open(host, to).is_some_and(|mut talk| talk.ask())
}

pub struct Udp(UdpSocket);

impl Udp {
    pub fn open(host: &Host, to: &str) -> Self {
        let to = addr(to);
        let socket = host.run(move || {
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            socket.connect(to).unwrap();
            socket
        });
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(socket)
    }

    pub fn ask(&self) -> bool {
        self.send(b"?") && matches!(self.0.recv(&mut [0; 16]), Ok(1))
    }

    /// Asks what doesn't fit into one packet.
    pub fn ask_much(&self) -> bool {
        self.send(&[7; 4000]) && matches!(self.0.recv(&mut [0; 9000]), Ok(4000))
    }

    /// What it learns of an answer's absence by an ICMP error.
    pub fn is_refused(&self) -> bool {
        self.send(b"?") && self.0.recv(&mut [0; 16]).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    }

    fn send(&self, bytes: &[u8]) -> bool {
        self.0.send(bytes).is_ok_and(|sent| sent == bytes.len())
    }
}

pub fn udp(host: &Host, to: &str) -> bool {
    Udp::open(host, to).ask()
}

/// An echo request, and the reply to it.
pub fn ping(host: &Host, to: &str) -> bool {
    let to: std::net::IpAddr = to.parse().unwrap();
    host.run(move || {
        let (domain, protocol, request) =
            if to.is_ipv4() { (AddressFamily::Inet, SockProtocol::Icmp, 8) } else { (AddressFamily::Inet6, SockProtocol::IcmpV6, 128) };
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap();
        let socket = socket(domain, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol).unwrap();
        // Sends and receives are the same as for datagrams.
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let sent = socket.connect(SocketAddr::new(to, 0)).and_then(|()| socket.send(&[request, 0, 0, 0, 0, 0, 0, 1, 42]));
        sent.is_ok() && matches!(socket.recv(&mut [0; 64]), Ok(9))
    })
}
