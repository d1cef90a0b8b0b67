//! What the host program does in its namespace: echo servers, clients, and the proxy under test.
use std::collections::HashMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::talk::{Reply, Request, Transport};

mod proxy;

pub use proxy::ProxyHost;

/// Longer than any pause of a loaded machine.
const PATIENCE: Duration = Duration::from_secs(15);

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
            Request::Dial { transport, target, patience } => {
                let patience = patience.unwrap_or(PATIENCE);
                Ok(outcome(open(transport, target, Some(0), patience).and_then(|mut connection| ask(&mut connection))))
            }
            Request::Open { id, transport, target, port } => match open(transport, target, port, PATIENCE) {
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
            Request::Datagram { target, bytes } => Ok(datagram(target, bytes).map_or_else(|error| outcome(Err(error)), Reply::Streamed)),
            Request::Get { target, path } => Ok(get(target, &path).map_or_else(|error| outcome(Err(error)), Reply::Page)),
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
        let mut buffer = vec![0; 1 << 16];
        loop {
            // Errors are echoes of answers that nobody took.
            let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
            let named = format!("{name} {}\n", peer.ip().to_canonical());
            let answer = if buffer.first() == Some(&0) { &buffer[..length] } else { named.as_bytes() };
            let _ = socket.send_to(answer, peer);
        }
    });
    Ok(Reply::Done)
}

fn open(transport: Transport, target: SocketAddr, port: Option<u16>, patience: Duration) -> std::io::Result<Connection> {
    match transport {
        Transport::Tcp => {
            let stream = match port {
                Some(port) if port != 0 => connect_from(port, target)?,
                _ => TcpStream::connect_timeout(&target, patience)?,
            };
            stream.set_read_timeout(Some(patience))?;
            Ok(Connection::Tcp(stream))
        }
        Transport::Udp => {
            let any = if target.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
            let socket = UdpSocket::bind(SocketAddr::new(any, port.unwrap_or(0)))?;
            socket.set_read_timeout(Some(patience))?;
            if port.is_some() {
                socket.connect(target)?;
            }
            Ok(Connection::Udp(socket, port.is_none().then_some(target)))
        }
    }
}

/// Several connections may share the client's port, as long as they lead elsewhere.
fn connect_from(port: u16, target: SocketAddr) -> std::io::Result<TcpStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt};
    use std::os::fd::AsRawFd;
    let (family, any) = match target {
        SocketAddr::V4(_) => (AddressFamily::Inet, IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        SocketAddr::V6(_) => (AddressFamily::Inet6, IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any, port)))?;
    let patience = nix::sys::time::TimeVal::from(nix::libc::timeval { tv_sec: PATIENCE.as_secs() as i64, tv_usec: 0 });
    setsockopt(&socket, sockopt::SendTimeout, &patience)?;
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(target)) {
        // What a socket with a time limit says when that is over.
        Err(nix::errno::Errno::EINPROGRESS) => return Err(ErrorKind::TimedOut.into()),
        outcome => outcome?,
    }
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
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
            // What was ended is no longer connected.
            _ if matches!(error.raw_os_error(), Some(nix::libc::EDESTADDRREQ | nix::libc::ENOTCONN)) => Reply::Reset,
            _ => Reply::Failed(error.to_string()),
        },
    }
}

fn datagram(target: SocketAddr, bytes: usize) -> std::io::Result<usize> {
    let Connection::Udp(socket, _) = open(Transport::Udp, target, Some(0), PATIENCE)? else { return Err(ErrorKind::Unsupported.into()) };
    socket.send(&vec![0; bytes])?;
    socket.recv(&mut vec![0; 1 << 16])
}

fn get(target: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
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
