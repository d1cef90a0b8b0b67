//! Streamed answers for clients that ask for a WebSocket: each piece of the body becomes a message.
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::{Sink, SinkExt, StreamExt};
use http::header::{self, HeaderMap, HeaderValue};
use http::{StatusCode, header::HeaderName};
use http_body_util::BodyExt;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use outrigger_api::Status;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::body::{self, Request, RespBody, Response};

const BINARY: &str = "binary.k8s.io";
const BASE64_TEXT: &str = "base64.binary.k8s.io";
const HANDSHAKE: [HeaderName; 6] = [
    header::CONNECTION,
    header::UPGRADE,
    header::SEC_WEBSOCKET_KEY,
    header::SEC_WEBSOCKET_VERSION,
    header::SEC_WEBSOCKET_PROTOCOL,
    header::SEC_WEBSOCKET_EXTENSIONS,
];

/// A handshake that was asked for and can be agreed to.
pub struct Handshake {
    accept: HeaderValue,
    protocol: Option<&'static str>,
    connection: OnUpgrade,
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|token| !token.is_empty())
}

/// The first protocol of the client's that is known; a client may name none, and gets binary messages.
fn protocol(headers: &HeaderMap) -> Result<Option<&'static str>, Status> {
    let mut asked = tokens(headers, &header::SEC_WEBSOCKET_PROTOCOL).peekable();
    if asked.peek().is_none() {
        return Ok(None);
    }
    let found = asked.find_map(|asked| [BINARY, BASE64_TEXT].into_iter().find(|known| *known == asked));
    let unknown = || Status::new(403, "Forbidden", format!("requested protocol(s) are not supported; supports {BINARY}, {BASE64_TEXT}"));
    found.map(Some).ok_or_else(unknown)
}

/// Takes the wish for a WebSocket off the request, which then asks for a plain answer. `None`: there is no such wish.
pub fn take(request: &mut Request) -> Result<Option<Handshake>, Status> {
    let headers = request.headers();
    let wants = |name, token: &str| tokens(headers, name).any(|found| found.eq_ignore_ascii_case(token));
    if !wants(&header::CONNECTION, "upgrade") || !wants(&header::UPGRADE, "websocket") {
        return Ok(None);
    }
    let protocol = protocol(headers)?;
    let accept = headers.get(header::SEC_WEBSOCKET_KEY).map(|key| derive_accept_key(key.as_bytes()));
    let accept =
        accept.and_then(|accept| HeaderValue::from_str(&accept).ok()).ok_or_else(|| Status::bad_request("missing or bad WebSocket key"))?;
    for name in HANDSHAKE {
        request.headers_mut().remove(name);
    }
    Ok(Some(Handshake { accept, protocol, connection: hyper::upgrade::on(request) }))
}

impl Handshake {
    /// The answer that switches protocols; `content` follows in messages.
    pub fn stream(self, content: RespBody) -> Response {
        let mut response = Response::new(body::full(Bytes::new()));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, self.accept);
        if let Some(protocol) = self.protocol {
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
        }
        let as_text = self.protocol == Some(BASE64_TEXT);
        tokio::spawn(async move {
            match self.connection.await {
                Ok(connection) => {
                    let socket = WebSocketStream::from_raw_socket(TokioIo::new(connection), Role::Server, None).await;
                    let (sink, mut stream) = socket.split();
                    // What the client sends means nothing, but its end ends the stream.
                    let client_ends = async { while let Some(Ok(_)) = stream.next().await {} };
                    tokio::select! {
                        () = send(sink, content, as_text) => {}
                        () = client_ends => {}
                    }
                }
                Err(error) => tracing::debug!(%error, "upgrade failed"),
            }
        });
        response
    }
}

/// An empty message first tells that the stream stands, as upstream does it.
async fn send<S: Sink<Message> + Unpin>(mut sink: S, mut content: RespBody, as_text: bool) {
    let message = |data: Bytes| if as_text { Message::Text(BASE64.encode(data).into()) } else { Message::Binary(data) };
    let mut next = Some(Bytes::new());
    while let Some(data) = next {
        if sink.send(message(data)).await.is_err() {
            return;
        }
        next = loop {
            match content.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        break Some(data);
                    }
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, "the streamed content broke off");
                    break None;
                }
                None => break None,
            }
        };
    }
    // A client that is gone needs no goodbye.
    let _ = sink.send(Message::Close(None)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(headers: &[(&str, &str)]) -> Request {
        let builder = headers.iter().fold(http::Request::builder(), |builder, (name, value)| builder.header(*name, *value));
        builder.body(body::full(Bytes::new())).unwrap()
    }

    #[test]
    fn handshakes() {
        // The key is the example of RFC 6455.
        let base = [("connection", "Upgrade"), ("upgrade", "WebSocket"), ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")];
        let taken = |more: &[(&str, &str)]| {
            take(&mut request(&[&base, more].concat())).map(|taken| taken.map(|taken| taken.protocol)).map_err(|e| e.code)
        };
        assert_eq!(take(&mut request(&[("connection", "keep-alive")])).map(|taken| taken.is_some()).map_err(|e| e.code), Ok(false));
        assert_eq!(taken(&[]), Ok(Some(None)));
        assert_eq!(taken(&[("sec-websocket-protocol", "x, base64.binary.k8s.io")]), Ok(Some(Some(BASE64_TEXT))));
        assert_eq!(taken(&[("sec-websocket-protocol", "x")]), Err(403));
        assert_eq!(take(&mut request(&base[..2])).map(|taken| taken.is_some()).map_err(|e| e.code), Err(400));
    }

    #[tokio::test]
    async fn each_piece_becomes_a_message() {
        for (as_text, expected) in [(false, Message::Binary("line\n".into())), (true, Message::Text("bGluZQo=".into()))] {
            let (sink, sent) = futures::channel::mpsc::unbounded();
            send(sink, body::full("line\n"), as_text).await;
            let sent: Vec<Message> = sent.collect().await;
            assert_eq!((sent.len(), sent[0].len(), &sent[1], &sent[2]), (3, 0, &expected, &Message::Close(None)));
        }
    }

    #[tokio::test]
    async fn the_answer_switches_protocols() {
        let base = [("connection", "Upgrade"), ("upgrade", "websocket"), ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")];
        let mut asked = request(&base);
        let response = take(&mut asked).unwrap().unwrap().stream(body::full(Bytes::new()));
        assert!(asked.headers().is_empty());
        assert_eq!(response.headers()[header::SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
