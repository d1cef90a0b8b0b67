//! A remote command's streams, the same whatever the client speaks: `v5` to `v1` over WebSocket, `v4` to `v1` over SPDY.
use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tracing::debug;

use crate::spdy::{self, frame};
use crate::upgrade::{self, Dialect, Rejection, Upgrade};
use crate::websocket::{self, Coding};

/// How long a SPDY client may take to open its streams.
const STREAM_CREATION: Duration = Duration::from_secs(30);
/// An error stream carries one Status.
const MAX_STATUS: usize = 64 * 1024;

pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const STDERR: u8 = 2;
pub const ERROR: u8 = 3;
pub const RESIZE: u8 = 4;

const SPDY_PROTOCOLS: [&str; 5] = ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io", ""];
const WEBSOCKET_PROTOCOLS: [&str; 6] =
    ["v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io", "base64.channel.k8s.io", ""];

/// Which streams a command has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

impl Wanted {
    /// A terminal has one output, and a command without any stream makes no sense.
    pub fn checked(mut self) -> Result<Self, Rejection> {
        self.stderr &= !self.tty;
        if self.stdin || self.stdout || self.stderr {
            return Ok(self);
        }
        Err(Rejection::bad_request("you must specify at least 1 of stdin, stdout, stderr"))
    }

    /// Stream types by SPDY's names, with their WebSocket channels.
    fn streams(self, resize: bool) -> Vec<(&'static str, u8)> {
        let all = [
            ("error", ERROR, true),
            ("stdin", STDIN, self.stdin),
            ("stdout", STDOUT, self.stdout),
            ("stderr", STDERR, self.stderr),
            ("resize", RESIZE, self.tty && resize),
        ];
        all.into_iter().filter(|(_, _, wanted)| *wanted).map(|(name, channel, _)| (name, channel)).collect()
    }
}

/// Bytes from the client; the sender going away is their end.
pub type Input = mpsc::Receiver<Bytes>;

/// Bytes to the client.
pub enum Output {
    Spdy(spdy::Writer),
    WebSocket { channel: u8, sender: websocket::Sender },
}

impl Output {
    pub async fn write(&mut self, data: Bytes) -> io::Result<()> {
        match self {
            Self::Spdy(writer) => writer.write(data).await,
            Self::WebSocket { channel, sender } => sender.send(*channel, data).await,
        }
    }

    /// Ends this stream; WebSocket channels end with their connection.
    pub async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Spdy(writer) => writer.finish().await,
            Self::WebSocket { .. } => Ok(()),
        }
    }
}

/// The client's end of a running command.
pub struct Session {
    pub stdin: Option<Input>,
    pub resize: Option<Input>,
    pub stdout: Option<Output>,
    pub stderr: Option<Output>,
    error: Output,
    /// The other halves of the input streams.
    unused: Vec<spdy::Writer>,
    /// From v4 on, the error stream carries a Status; before, a failure's text.
    status_as_json: bool,
    connection: Connection,
}

enum Connection {
    Spdy(spdy::Connection),
    WebSocket(tokio::sync::watch::Receiver<bool>),
}

impl Connection {
    async fn ended(&self) {
        match self {
            Self::Spdy(connection) => connection.ended().await,
            Self::WebSocket(ended) => {
                // The sender going away means the same.
                let _ = ended.clone().wait_for(|ended| *ended).await;
            }
        }
    }
}

/// Agrees on a protocol; the answer goes to the client, then [`accept`] gives the session.
pub fn negotiate<B>(request: &mut Request<B>) -> Result<(Dialect, Upgrade), Rejection> {
    let dialect = upgrade::dialect(request.headers())?;
    let supported: &[&'static str] = match dialect {
        Dialect::Spdy => &SPDY_PROTOCOLS,
        Dialect::WebSocket => &WEBSOCKET_PROTOCOLS,
    };
    Ok((dialect, upgrade::negotiate(request, dialect, supported)?))
}

/// Waits for the upgraded connection and its streams.
pub async fn accept(
    dialect: Dialect,
    protocol: &'static str,
    connection: hyper::upgrade::OnUpgrade,
    wanted: Wanted,
) -> io::Result<Session> {
    let upgraded = TokioIo::new(connection.await.map_err(io::Error::other)?);
    match dialect {
        Dialect::Spdy => accept_spdy(upgraded, protocol, wanted).await,
        Dialect::WebSocket => accept_websocket(upgraded, protocol, wanted).await,
    }
}

async fn accept_spdy(
    io: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + 'static,
    protocol: &str,
    wanted: Wanted,
) -> io::Result<Session> {
    let (connection, mut incoming) = spdy::Connection::start(io, spdy::Role::Server);
    let resize = protocol.starts_with("v3") || protocol.starts_with("v4");
    let expected = wanted.streams(resize);
    let mut found: Vec<(u8, spdy::Stream)> = Vec::new();
    let collect = async {
        while found.len() < expected.len() {
            let stream = incoming.recv().await?;
            let kind = frame::header(&stream.headers, "streamtype").unwrap_or_default().to_owned();
            match expected.iter().find(|(name, _)| *name == kind) {
                Some((_, channel)) if found.iter().all(|(other, _)| other != channel) => found.push((*channel, stream)),
                // It is reset by being dropped.
                _ => debug!(kind, "a stream that the command doesn't have"),
            }
        }
        Some(())
    };
    match tokio::time::timeout(STREAM_CREATION, collect).await {
        Ok(Some(())) => {}
        Ok(None) => return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the client left before its streams were open")),
        Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "timed out waiting for client to create streams")),
    }
    let mut take = |channel: u8| found.iter().position(|(other, _)| *other == channel).map(|index| found.swap_remove(index).1);
    let error = take(ERROR).ok_or_else(|| io::Error::other("no error stream"))?;
    // Input streams carry nothing back, but clients take the end of our half for the end of the command.
    let mut unused = Vec::new();
    let [stdin, resize] = [take(STDIN), take(RESIZE)].map(|stream| {
        stream.map(|stream| {
            unused.push(stream.writer);
            stream.reader.into_receiver()
        })
    });
    let mut output = |channel| take(channel).map(|stream| Output::Spdy(stream.writer));
    Ok(Session {
        stdin,
        resize,
        stdout: output(STDOUT),
        stderr: output(STDERR),
        error: Output::Spdy(error.writer),
        unused,
        status_as_json: protocol.starts_with("v4"),
        connection: Connection::Spdy(connection),
    })
}

async fn accept_websocket<T>(io: T, protocol: &str, wanted: Wanted) -> io::Result<Session>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let coding = if protocol.contains("base64") { Coding::Base64 } else { Coding::Binary };
    let streams = wanted.streams(true);
    let incoming: Vec<u8> = streams.iter().map(|(_, channel)| *channel).filter(|channel| matches!(*channel, STDIN | RESIZE)).collect();
    let channels = websocket::channels(websocket::serve(io).await, coding, &incoming);
    // An empty message on the lowest channel that can be written tells the client that the streams are open.
    let first =
        [(wanted.stdout, STDOUT), (wanted.stderr, STDERR)].into_iter().find(|(wanted, _)| *wanted).map_or(ERROR, |(_, channel)| channel);
    channels.sender.send(first, Bytes::new()).await?;
    let (mut stdin, mut resize) = (None, None);
    for (channel, receiver) in channels.receivers {
        *(if channel == STDIN { &mut stdin } else { &mut resize }) = Some(receiver);
    }
    let output = |channel| Output::WebSocket { channel, sender: channels.sender.clone() };
    Ok(Session {
        stdin,
        resize,
        stdout: wanted.stdout.then(|| output(STDOUT)),
        stderr: wanted.stderr.then(|| output(STDERR)),
        error: output(ERROR),
        unused: Vec::new(),
        status_as_json: protocol.starts_with("v4") || protocol.starts_with("v5"),
        connection: Connection::WebSocket(channels.ended),
    })
}

impl Session {
    /// Tells the result, a `Status` as JSON, and closes after everything has been written.
    pub async fn finish(mut self, status: &[u8]) -> io::Result<()> {
        if let Some(text) = error_text(status, self.status_as_json) {
            self.error.write(text).await?;
        }
        for output in [self.stdout.as_mut(), self.stderr.as_mut(), Some(&mut self.error)].into_iter().flatten() {
            output.finish().await?;
        }
        for writer in &mut self.unused {
            writer.finish().await?;
        }
        if let Connection::Spdy(connection) = &self.connection {
            connection.close().await;
        }
        drop((self.stdout, self.stderr, self.error));
        Ok(())
    }

    /// Carries the streams to the runtime's command and its result back; ends when either side does.
    pub async fn relay(mut self, remote: crate::client::Remote) -> io::Result<()> {
        let crate::client::Remote { stdin, resize, stdout, stderr, error, connection } = remote;
        let (client_stdin, client_resize) = (self.stdin.take(), self.resize.take());
        let inward = async { tokio::join!(copy_in(client_stdin, stdin), copy_in(client_resize, resize)) };
        let status = {
            let outward = async {
                let (_, _, status) =
                    tokio::join!(copy_out(stdout, &mut self.stdout), copy_out(stderr, &mut self.stderr), read_status(error));
                status
            };
            let (mut inward, mut outward) = (std::pin::pin!(inward), std::pin::pin!(outward));
            let mut inward_done = false;
            loop {
                tokio::select! {
                    status = &mut outward => break status,
                    _ = &mut inward, if !inward_done => inward_done = true,
                    () = self.connection.ended() => {
                        connection.close().await;
                        return Ok(());
                    }
                }
            }
        };
        connection.close().await;
        self.finish(&status).await
    }
}

async fn copy_in(from: Option<Input>, to: Option<spdy::Writer>) {
    let (Some(mut from), Some(mut to)) = (from, to) else { return };
    while let Some(data) = from.recv().await {
        if to.write(data).await.is_err() {
            // The command doesn't read any more; the client may go on writing into nothing.
            return;
        }
    }
    // The runtime is gone if this fails, which its outputs tell.
    let _ = to.finish().await;
}

async fn copy_out(from: Option<spdy::Reader>, to: &mut Option<Output>) {
    let Some(mut from) = from else { return };
    let Some(to) = to else { return };
    let mut broken = false;
    while let Some(data) = from.read().await {
        // Read on after a failure: the command must not block on a client that is leaving.
        broken = broken || to.write(data).await.is_err();
    }
}

async fn read_status(mut from: spdy::Reader) -> Vec<u8> {
    let mut status = Vec::new();
    while let Some(data) = from.read().await {
        if status.len() + data.len() <= MAX_STATUS {
            status.extend_from_slice(&data);
        }
    }
    status
}

/// What goes to the error stream for a result: from v4 on the Status itself, before only a failure's message.
fn error_text(status: &[u8], as_json: bool) -> Option<Bytes> {
    const SUCCESS: &[u8] = br#"{"metadata":{},"status":"Success"}"#;
    if as_json {
        return Some(if status.is_empty() { Bytes::from_static(SUCCESS) } else { Bytes::copy_from_slice(status) });
    }
    match serde_json::from_slice::<serde_json::Value>(status) {
        Ok(parsed) if parsed["status"] == "Success" => None,
        Ok(parsed) => Some(parsed["message"].as_str().unwrap_or_default().to_owned().into()),
        Err(_) if status.is_empty() => None,
        Err(_) => Some(Bytes::copy_from_slice(status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_told_in_the_protocols_way() {
        let failure = br#"{"status":"Failure","message":"command terminated with non-zero exit code"}"#;
        let cases: [(&[u8], bool, Option<&[u8]>); 6] = [
            (b"", true, Some(br#"{"metadata":{},"status":"Success"}"#)),
            (failure, true, Some(failure)),
            (br#"{"status":"Success"}"#, false, None),
            (failure, false, Some(b"command terminated with non-zero exit code")),
            (b"plain", false, Some(b"plain")),
            (b"", false, None),
        ];
        for (status, as_json, expected) in cases {
            assert_eq!(error_text(status, as_json).as_deref(), expected);
        }
    }

    #[test]
    fn a_terminal_has_one_output() {
        let wanted = Wanted { stdin: true, stdout: true, stderr: true, tty: true }.checked().unwrap();
        assert_eq!(wanted.streams(true).iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["error", "stdin", "stdout", "resize"]);
        assert_eq!(Wanted { stderr: true, tty: true, ..Wanted::default() }.checked().unwrap_err().status, 400);
    }
}
