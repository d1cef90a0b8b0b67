//! What the host program does in its namespace: echo servers, clients, and the proxy under test.
use std::collections::HashMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::talk::{Reply, Request, Transport};

mod proxy;

pub use proxy::ProxyHost;

/// Long enough for a loaded machine; only what is expected to fail waits for it to the end.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Default)]
pub struct Host {
    connections: HashMap<String, Connection>,
    proxy: Option<ProxyHost>,
}

enum Connection {
    Tcp(TcpStream),
    /// The target is set when the socket isn't connected.
    Udp(UdpSocket, Option<SocketAddr>),
}

impl Host {
    /// Serves requests from standard input until it ends.
    pub fn run(mut self) -> Result<()> {
        let mut output = std::io::stdout().lock();
        for line in std::io::stdin().lock().lines() {
            let request: Request = serde_json::from_str(&line?).context("read a request")?;
            let reply = self.answer(request).unwrap_or_else(|error| Reply::Failed(format!("{error:#}")));
            writeln!(output, "{}", serde_json::to_string(&reply)?)?;
            output.flush()?;
        }
        Ok(())
    }

    fn answer(&mut self, request: Request) -> Result<Reply> {
        match request {
            Request::Serve { transport: Transport::Tcp, address, name } => serve_tcp(TcpListener::bind(address)?, name),
            Request::Serve { transport: Transport::Udp, address, name } => serve_udp(UdpSocket::bind(address)?, name),
            Request::Dial { transport, target } => {
                Ok(outcome(open(transport, target, true).and_then(|mut connection| ask(&mut connection))))
            }
            Request::Open { id, transport, target, connected } => match open(transport, target, connected) {
                Ok(mut connection) => {
                    let answer = outcome(ask(&mut connection));
                    self.connections.insert(id, connection);
                    Ok(answer)
                }
                Err(error) => Ok(outcome(Err(error))),
            },
            Request::Say { id } => {
                let connection = self.connections.get_mut(&id).with_context(|| format!("no connection {id:?}"))?;
                Ok(outcome(ask(connection)))
            }
            Request::Stream { target, bytes } => Ok(stream(target, bytes)),
            Request::Proxy(request) => {
                if self.proxy.is_none() {
                    self.proxy = Some(ProxyHost::new()?);
                }
                self.proxy.as_mut().context("no proxy")?.answer(request)
            }
        }
    }
}

fn serve_tcp(listener: TcpListener, name: String) -> Result<Reply> {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let name = name.clone();
            std::thread::spawn(move || echo_tcp(stream, &name));
        }
    });
    Ok(Reply::Done)
}

/// Lines are answered with the name and the peer; a stream that begins with a zero byte is sent back as it is.
fn echo_tcp(stream: TcpStream, name: &str) -> std::io::Result<()> {
    let peer = stream.peer_addr()?.ip().to_canonical();
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    if reader.fill_buf()?.first() == Some(&0) {
        std::io::copy(&mut reader, &mut writer)?;
        return writer.shutdown(Shutdown::Write);
    }
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        line.clear();
        writer.write_all(format!("{name} {peer}\n").as_bytes())?;
    }
    Ok(())
}

fn serve_udp(socket: UdpSocket, name: String) -> Result<Reply> {
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        loop {
            // Errors are echoes of answers that nobody took.
            let Ok((_, peer)) = socket.recv_from(&mut buffer) else { continue };
            let _ = socket.send_to(format!("{name} {}\n", peer.ip().to_canonical()).as_bytes(), peer);
        }
    });
    Ok(Reply::Done)
}

fn open(transport: Transport, target: SocketAddr, connected: bool) -> std::io::Result<Connection> {
    match transport {
        Transport::Tcp => {
            let stream = TcpStream::connect_timeout(&target, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(Connection::Tcp(stream))
        }
        Transport::Udp => {
            let any = if target.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
            let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            if connected {
                socket.connect(target)?;
            }
            Ok(Connection::Udp(socket, (!connected).then_some(target)))
        }
    }
}

fn ask(connection: &mut Connection) -> std::io::Result<(String, SocketAddr)> {
    let mut buffer = [0; 256];
    let (length, seen_from) = match connection {
        Connection::Tcp(stream) => {
            stream.write_all(b"who\n")?;
            let length = stream.read(&mut buffer)?;
            if length == 0 {
                return Err(ErrorKind::ConnectionReset.into());
            }
            (length, stream.peer_addr()?)
        }
        Connection::Udp(socket, None) => {
            socket.send(b"who\n")?;
            (socket.recv(&mut buffer)?, socket.peer_addr()?)
        }
        Connection::Udp(socket, Some(target)) => {
            socket.send_to(b"who\n", *target)?;
            socket.recv_from(&mut buffer)?
        }
    };
    Ok((String::from_utf8_lossy(&buffer[..length]).into_owned(), seen_from))
}

fn outcome(result: std::io::Result<(String, SocketAddr)>) -> Reply {
    match result {
        Ok((answer, seen_from)) => match answer.trim_end().split_once(' ').map(|(name, peer)| (name, peer.parse())) {
            Some((name, Ok(peer))) => Reply::Answer { name: name.into(), peer, seen_from },
            _ => Reply::Failed(format!("strange answer {answer:?}")),
        },
        Err(error) => match error.kind() {
            ErrorKind::ConnectionRefused => Reply::Refused,
            ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe => Reply::Reset,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Reply::TimedOut,
            ErrorKind::NetworkUnreachable | ErrorKind::HostUnreachable => Reply::Unreachable,
            // A UDP socket that was ended is no longer connected.
            _ if error.raw_os_error() == Some(nix::libc::EDESTADDRREQ) => Reply::Reset,
            _ => Reply::Failed(error.to_string()),
        },
    }
}

fn stream(target: SocketAddr, bytes: usize) -> Reply {
    let work = || -> std::io::Result<usize> {
        let mut writer = TcpStream::connect_timeout(&target, PATIENCE)?;
        let mut reader = writer.try_clone()?;
        let sender = std::thread::spawn(move || -> std::io::Result<()> {
            writer.write_all(&vec![0; bytes])?;
            writer.shutdown(Shutdown::Write)
        });
        let mut received = Vec::new();
        reader.read_to_end(&mut received)?;
        sender.join().map_err(|_| std::io::Error::other("the sender panicked"))??;
        Ok(received.len())
    };
    work().map_or_else(|error| outcome(Err(error)), Reply::Streamed)
}
