//! WebSocket as Kubernetes uses it: numbered channels in one message stream, or a tunnel for SPDY's bytes.
use std::io;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::{mpsc, watch};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message, Role, WebSocketConfig};
use tracing::debug;

/// Clients send pieces of at most 32 KiB; nothing needs more.
const MAX_MESSAGE: usize = 1024 * 1024;
const BACKLOG: usize = 8;
const TUNNEL_BUFFER: usize = 64 * 1024;
/// Protocol v5: a message on this channel ends the channel that its one byte names.
const CLOSE_CHANNEL: u8 = 255;

/// How channels are written into messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// The channel's number as a byte, then the data.
    Binary,
    /// The channel's number as a digit, then the data in base64, as text.
    Base64,
}

impl Coding {
    pub fn encode(self, channel: u8, data: &[u8]) -> Message {
        match self {
            Self::Binary => {
                let mut message = BytesMut::with_capacity(data.len() + 1);
                message.put_u8(channel);
                message.put_slice(data);
                Message::Binary(message.freeze())
            }
            Self::Base64 => {
                let mut text = String::with_capacity(data.len() * 4 / 3 + 4);
                text.push(char::from(b'0'.wrapping_add(channel)));
                BASE64.encode_string(data, &mut text);
                Message::Text(text.into())
            }
        }
    }

    /// The channel and its data; `None` for what is no such message.
    pub fn decode(self, message: Message) -> Option<(u8, Bytes)> {
        let mut payload = match message {
            Message::Binary(payload) => payload,
            Message::Text(text) => Bytes::from(text),
            _ => return None,
        };
        let channel = *payload.first()?;
        let data = payload.split_off(1);
        match self {
            Self::Binary => Some((channel, data)),
            Self::Base64 => Some((channel.checked_sub(b'0')?, BASE64.decode(data).ok()?.into())),
        }
    }
}

/// The sending side of all channels.
#[derive(Clone)]
pub struct Sender {
    messages: mpsc::Sender<(u8, Bytes)>,
}

impl Sender {
    pub async fn send(&self, channel: u8, data: Bytes) -> io::Result<()> {
        self.messages.send((channel, data)).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// A WebSocket split into channels, running on a task of its own.
pub struct Channels {
    pub sender: Sender,
    /// Incoming data by channel number; only those asked for are there.
    pub receivers: Vec<(u8, mpsc::Receiver<Bytes>)>,
    pub ended: watch::Receiver<bool>,
}

fn config() -> WebSocketConfig {
    WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE))
}

/// The server's end over a connection whose handshake is done.
pub async fn serve<T: AsyncRead + AsyncWrite + Unpin>(io: T) -> WebSocketStream<T> {
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config())).await
}

/// Splits `socket` into channels: data of those in `incoming` is received, of others dropped.
pub fn channels<T>(socket: WebSocketStream<T>, coding: Coding, incoming: &[u8]) -> Channels
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (messages, queue) = mpsc::channel(BACKLOG);
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    for channel in incoming {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        senders.push((*channel, sender));
        receivers.push((*channel, receiver));
    }
    let (end, ended) = watch::channel(false);
    tokio::spawn(async move {
        run(socket, coding, senders, queue).await;
        end.send_replace(true);
    });
    Channels { sender: Sender { messages }, receivers, ended }
}

type Senders = Vec<(u8, mpsc::Sender<Bytes>)>;

async fn run<T>(socket: WebSocketStream<T>, coding: Coding, senders: Senders, mut queue: mpsc::Receiver<(u8, Bytes)>)
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sink, mut stream) = socket.split();
    // Answers to pings and closes are written when something is sent or the stream is polled; both happen here.
    let receive = async {
        let mut senders = senders;
        while let Some(message) = stream.next().await {
            match message {
                Ok(Message::Close(_)) => break,
                Ok(message) => deliver(coding, message, &mut senders).await,
                Err(error) => {
                    debug!(%error, "WebSocket broke off");
                    break;
                }
            }
        }
    };
    let send = async {
        while let Some((channel, data)) = queue.recv().await {
            sink.send(coding.encode(channel, &data)).await?;
        }
        sink.send(Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))).await
    };
    let (mut receive, mut send) = (std::pin::pin!(receive), std::pin::pin!(send));
    tokio::select! {
        () = &mut receive => {}
        result = &mut send => match result {
            // The peer answers our close with its own; its bytes are read until then.
            Ok(()) => { let _ = tokio::time::timeout(std::time::Duration::from_secs(2), receive).await; }
            Err(error) => debug!(%error, "WebSocket can't be written"),
        },
    }
}

async fn deliver(coding: Coding, message: Message, senders: &mut Senders) {
    let Some((channel, data)) = coding.decode(message) else { return };
    if channel == CLOSE_CHANNEL {
        senders.retain(|(open, _)| data.first() != Some(open));
        return;
    }
    let sender = senders.iter().find(|(open, _)| *open == channel).map(|(_, sender)| sender);
    if let Some(sender) = sender
        && !data.is_empty()
    {
        // An error means that nobody reads this channel: what arrives is dropped.
        let _ = sender.send(data).await;
    }
}

/// The bytes inside a WebSocket's binary messages as a plain connection.
pub fn tunnel<T>(socket: WebSocketStream<T>) -> DuplexStream
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (near, far) = tokio::io::duplex(TUNNEL_BUFFER);
    tokio::spawn(async move {
        if let Err(error) = pump(socket, far).await {
            debug!(%error, "WebSocket tunnel broke off");
        }
    });
    near
}

async fn pump<T: AsyncRead + AsyncWrite + Unpin>(socket: WebSocketStream<T>, inner: DuplexStream) -> io::Result<()> {
    let (mut sink, mut stream) = socket.split();
    let (mut inner_read, mut inner_write) = tokio::io::split(inner);
    let inward = async {
        while let Some(message) = stream.next().await {
            match message.map_err(io::Error::other)? {
                Message::Binary(data) => inner_write.write_all(&data).await?,
                Message::Close(_) => break,
                _ => {}
            }
        }
        inner_write.shutdown().await
    };
    let outward = async {
        let mut buffer = BytesMut::with_capacity(TUNNEL_BUFFER);
        while inner_read.read_buf(&mut buffer).await? > 0 {
            sink.send(Message::Binary(buffer.split().freeze())).await.map_err(io::Error::other)?;
            buffer.reserve(TUNNEL_BUFFER);
        }
        sink.close().await.map_err(io::Error::other)
    };
    tokio::try_join!(inward, outward)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codings_are_the_documented_ones() {
        assert_eq!(Coding::Binary.encode(1, b"hi"), Message::Binary(Bytes::from_static(b"\x01hi")));
        assert_eq!(Coding::Base64.encode(1, b"hi"), Message::Text("1aGk=".into()));
        let cases = [
            (Coding::Binary, Message::Binary(Bytes::from_static(b"\x00abc")), Some((0, Bytes::from_static(b"abc")))),
            (Coding::Binary, Message::Text("\u{4}{}".into()), Some((4, Bytes::from_static(b"{}")))),
            (Coding::Binary, Message::Binary(Bytes::new()), None),
            (Coding::Base64, Message::Text("0YWJj".into()), Some((0, Bytes::from_static(b"abc")))),
            (Coding::Base64, Message::Text("0Y".into()), None),
            (Coding::Base64, Message::Text(" YWJj".into()), None),
            (Coding::Binary, Message::Ping(Bytes::new()), None),
        ];
        for (coding, message, expected) in cases {
            assert_eq!(coding.decode(message.clone()), expected, "{message:?}");
        }
    }
}
