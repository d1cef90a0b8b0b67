//! Port-forward: connections into a pod, each a pair of streams, over SPDY, SPDY inside WebSocket, or WebSocket channels.
use std::collections::HashMap;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::Request;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::session::{Input, Output};
use crate::spdy::{self, frame};
use crate::upgrade::{self, Dialect, Rejection, Upgrade};
use crate::websocket::{self, Coding};

const SPDY_PROTOCOL: &str = "portforward.k8s.io";
const TUNNEL_PROTOCOL: &str = "SPDY/3.1+portforward.k8s.io";
const WEBSOCKET_PROTOCOLS: [&str; 4] = [TUNNEL_PROTOCOL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io", ""];
/// How long the second stream of a pair may take.
const PAIR_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_HALF_PAIRS: usize = 256;
/// WebSocket channels are single bytes, two for each port.
const MAX_CHANNEL_PORTS: usize = 127;

/// One connection that the client wants into the pod.
pub struct Forward {
    pub port: u16,
    input: Input,
    output: Output,
    error: Output,
}

impl Forward {
    /// Carries bytes both ways until both sides have ended.
    pub async fn splice(mut self, stream: TcpStream) -> io::Result<()> {
        let (mut read, mut write) = stream.into_split();
        let input = &mut self.input;
        let inward = async {
            while let Some(data) = input.recv().await {
                write.write_all(&data).await?;
            }
            write.shutdown().await
        };
        let output = &mut self.output;
        let outward = async {
            let mut buffer = BytesMut::with_capacity(32 * 1024);
            while read.read_buf(&mut buffer).await? > 0 {
                output.write(buffer.split().freeze()).await?;
                buffer.reserve(32 * 1024);
            }
            output.finish().await
        };
        // The pod's end decides: a client that only ever reads still gets everything.
        let result = {
            let (mut inward, mut outward) = (std::pin::pin!(inward), std::pin::pin!(outward));
            let mut inward_done = false;
            loop {
                tokio::select! {
                    result = &mut outward => break result,
                    result = &mut inward, if !inward_done => match result {
                        Ok(()) => inward_done = true,
                        Err(error) => break Err(error),
                    },
                }
            }
        };
        // Both may be gone with the connection.
        let _ = self.output.finish().await;
        let _ = self.error.finish().await;
        result
    }

    /// Tells the client why there is no connection.
    pub async fn fail(mut self, message: String) -> io::Result<()> {
        self.error.write(Bytes::from(message)).await?;
        self.error.finish().await?;
        self.output.finish().await
    }
}

/// The connections of one client, in the order in which it asks for them.
pub struct Forwards {
    forwards: mpsc::Receiver<Forward>,
    // Holds the connection open while it is served.
    _connection: Option<spdy::Connection>,
}

impl Forwards {
    /// `None` when the client has left.
    pub async fn next(&mut self) -> Option<Forward> {
        self.forwards.recv().await
    }
}

/// Agrees on a protocol; the answer goes to the client, then [`accept`] gives the connections.
pub fn negotiate<B>(request: &mut Request<B>) -> Result<(Dialect, Upgrade), Rejection> {
    let dialect = upgrade::dialect(request.headers())?;
    let supported: &[&'static str] = match dialect {
        Dialect::Spdy => &[SPDY_PROTOCOL],
        Dialect::WebSocket => &WEBSOCKET_PROTOCOLS,
    };
    let upgrade = upgrade::negotiate(request, dialect, supported)?;
    Ok((dialect, upgrade))
}

/// The `port` parameters of a request by WebSocket channels, which has to name its ports beforehand.
pub fn channel_ports(parameters: &[String]) -> Result<Vec<u16>, Rejection> {
    if parameters.is_empty() {
        return Err(Rejection::bad_request("query parameter \"port\" is required"));
    }
    let ports: Vec<u16> = parameters
        .iter()
        .flat_map(|parameter| parameter.split(','))
        .map(|text| match text.parse::<u16>() {
            Ok(0) => Err(Rejection::bad_request(format!("port {text:?} must be > 0"))),
            Ok(port) => Ok(port),
            Err(_) if text.is_empty() => Err(Rejection::bad_request("query parameter \"port\" cannot be empty")),
            Err(error) => Err(Rejection::bad_request(format!("unable to parse {text:?} as a port: {error}"))),
        })
        .collect::<Result<_, _>>()?;
    if ports.len() > MAX_CHANNEL_PORTS {
        return Err(Rejection::bad_request(format!("at most {MAX_CHANNEL_PORTS} ports can be forwarded")));
    }
    Ok(ports)
}

/// Whether this agreement needs [`channel_ports`].
pub fn is_by_channels(dialect: Dialect, protocol: &str) -> bool {
    dialect == Dialect::WebSocket && protocol != TUNNEL_PROTOCOL
}

/// Waits for the upgraded connection.
pub async fn accept(
    dialect: Dialect,
    protocol: &'static str,
    connection: hyper::upgrade::OnUpgrade,
    ports: &[u16],
) -> io::Result<Forwards> {
    let upgraded = TokioIo::new(connection.await.map_err(io::Error::other)?);
    match dialect {
        Dialect::Spdy => Ok(over_spdy(upgraded)),
        Dialect::WebSocket if protocol == TUNNEL_PROTOCOL => Ok(over_spdy(websocket::tunnel(websocket::serve(upgraded).await))),
        Dialect::WebSocket => {
            over_channels(upgraded, if protocol.contains("base64") { Coding::Base64 } else { Coding::Binary }, ports).await
        }
    }
}

fn over_spdy(io: impl AsyncRead + AsyncWrite + Send + 'static) -> Forwards {
    let (connection, incoming) = spdy::Connection::start(io, spdy::Role::Server);
    let (sender, forwards) = mpsc::channel(4);
    tokio::spawn(pair_up(incoming, sender));
    Forwards { forwards, _connection: Some(connection) }
}

/// Half a connection: the stream that came first, and when.
struct Half {
    stream: spdy::Stream,
    since: tokio::time::Instant,
}

/// Joins data and error streams by their request id.
async fn pair_up(mut incoming: mpsc::Receiver<spdy::Stream>, forwards: mpsc::Sender<Forward>) {
    let mut halves: HashMap<String, Half> = HashMap::new();
    while let Some(stream) = incoming.recv().await {
        // Dropping a half resets its stream.
        halves.retain(|_, half| half.since.elapsed() < PAIR_TIMEOUT);
        let kind = frame::header(&stream.headers, "streamtype").unwrap_or_default().to_owned();
        if kind != "data" && kind != "error" {
            continue;
        }
        let id = request_id(&stream, &kind);
        match halves.remove(&id) {
            None if halves.len() < MAX_HALF_PAIRS => {
                halves.insert(id, Half { stream, since: tokio::time::Instant::now() });
            }
            None => {}
            Some(first) => {
                let first_kind = frame::header(&first.stream.headers, "streamtype").unwrap_or_default();
                if first_kind == kind {
                    continue;
                }
                let (data, error) = if kind == "data" { (stream, first.stream) } else { (first.stream, stream) };
                let port = frame::header(&data.headers, "port").and_then(|port| port.parse().ok()).unwrap_or_default();
                let forward = Forward {
                    port,
                    input: data.reader.into_receiver(),
                    output: Output::Spdy(data.writer),
                    error: Output::Spdy(error.writer),
                };
                if forwards.send(forward).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Very old clients send no id: their error stream comes first, the data stream right after it.
fn request_id(stream: &spdy::Stream, kind: &str) -> String {
    match frame::header(&stream.headers, "requestid") {
        Some(id) if !id.is_empty() => id.to_owned(),
        _ => (if kind == "data" { stream.writer.id().wrapping_sub(2) } else { stream.writer.id() }).to_string(),
    }
}

async fn over_channels<T>(io: T, coding: Coding, ports: &[u16]) -> io::Result<Forwards>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let numbered: Vec<(u8, u16)> = (0..).step_by(2).zip(ports.iter().copied()).collect();
    let data: Vec<u8> = numbered.iter().map(|(channel, _)| *channel).collect();
    let channels = websocket::channels(websocket::serve(io).await, coding, &data);
    let (sender, forwards) = mpsc::channel(ports.len().max(1));
    for ((channel, port), (_, input)) in numbered.into_iter().zip(channels.receivers) {
        for number in [channel, channel + 1] {
            channels.sender.send(number, Bytes::copy_from_slice(&port.to_le_bytes())).await?;
        }
        let output = |channel| Output::WebSocket { channel, sender: channels.sender.clone() };
        // There is room for every port.
        let _ = sender.try_send(Forward { port, input, output: output(channel), error: output(channel + 1) });
    }
    Ok(Forwards { forwards, _connection: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_checked() {
        let cases: [(&[&str], Result<Vec<u16>, &str>); 5] = [
            (&["80", "443,8080"], Ok(vec![80, 443, 8080])),
            (&[], Err("query parameter \"port\" is required")),
            (&[""], Err("query parameter \"port\" cannot be empty")),
            (&["0"], Err("port \"0\" must be > 0")),
            (&["99999"], Err("unable to parse \"99999\" as a port: number too large to fit in target type")),
        ];
        for (parameters, expected) in cases {
            let parameters: Vec<String> = parameters.iter().map(|text| (*text).to_owned()).collect();
            assert_eq!(channel_ports(&parameters).map_err(|rejection| rejection.message), expected.map_err(str::to_owned));
        }
    }
}
