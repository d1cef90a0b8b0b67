//! The HTTP side of a stream: which protocol the client asks for, and the answer that switches to it.
use http::header::{CONNECTION, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use http::{HeaderMap, Request, Response, StatusCode};
use hyper::upgrade::OnUpgrade;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_PROTOCOLS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");
pub const SPDY: &str = "SPDY/3.1";

/// What the request's headers ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Spdy,
    WebSocket,
}

/// A request that can't be upgraded, as the client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub status: StatusCode,
    pub message: String,
    /// For the answer's header of the same purpose.
    pub accepted: Vec<&'static str>,
}

impl Rejection {
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into(), accepted: Vec::new() }
    }

    pub fn response(&self) -> Response<String> {
        let mut response = Response::new(self.message.clone());
        *response.status_mut() = self.status;
        for protocol in &self.accepted {
            response.headers_mut().append(ACCEPTED_PROTOCOLS, HeaderValue::from_static(protocol));
        }
        response
    }
}

fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(token))
}

fn list(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty()).collect()
}

/// The dialect of a request; an error in upstream's words when it asks for none.
pub fn dialect(headers: &HeaderMap) -> Result<Dialect, Rejection> {
    if has_token(headers, &CONNECTION, "upgrade") {
        if has_token(headers, &UPGRADE, "websocket") {
            return Ok(Dialect::WebSocket);
        }
        if has_token(headers, &UPGRADE, SPDY) {
            return Ok(Dialect::Spdy);
        }
    }
    let show = |name: &HeaderName| list(headers, name).join(", ");
    Err(Rejection::bad_request(format!(
        "unable to upgrade: missing upgrade headers in request: Upgrade: [{}], Connection: [{}]",
        show(&UPGRADE),
        show(&CONNECTION)
    )))
}

/// An agreed upgrade: the answer to send, and what to await for the connection.
pub struct Upgrade {
    pub response: Response<()>,
    pub protocol: &'static str,
    pub connection: OnUpgrade,
}

/// Picks the first protocol of the client's list that is in `supported`; an empty name in `supported` stands for a
/// client that asks for none.
pub fn negotiate<B>(request: &mut Request<B>, dialect: Dialect, supported: &[&'static str]) -> Result<Upgrade, Rejection> {
    let header = match dialect {
        Dialect::Spdy => STREAM_PROTOCOL,
        Dialect::WebSocket => SEC_WEBSOCKET_PROTOCOL,
    };
    let asked = list(request.headers(), &header);
    let found = if asked.is_empty() {
        supported.iter().find(|protocol| protocol.is_empty())
    } else {
        asked.iter().find_map(|asked| supported.iter().find(|protocol| *protocol == asked))
    };
    let Some(protocol) = found.copied() else {
        let accepted: Vec<&'static str> = supported.iter().copied().filter(|protocol| !protocol.is_empty()).collect();
        let message = format!(
            "unable to upgrade: unable to negotiate protocol: client supports [{}], server accepts [{}]",
            asked.join(" "),
            accepted.join(" ")
        );
        return Err(Rejection { status: StatusCode::FORBIDDEN, message, accepted });
    };
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    match dialect {
        Dialect::Spdy => {
            headers.insert(UPGRADE, HeaderValue::from_static(SPDY));
        }
        Dialect::WebSocket => {
            let key = request.headers().get(SEC_WEBSOCKET_KEY).ok_or_else(|| Rejection::bad_request("missing Sec-WebSocket-Key"))?;
            let accept =
                HeaderValue::from_str(&derive_accept_key(key.as_bytes())).map_err(|_| Rejection::bad_request("bad Sec-WebSocket-Key"))?;
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
        }
    }
    if !protocol.is_empty() {
        headers.insert(header, HeaderValue::from_static(protocol));
    }
    Ok(Upgrade { response, protocol, connection: hyper::upgrade::on(request) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(headers: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::builder();
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap()
    }

    #[test]
    fn the_headers_tell_the_dialect() {
        let cases: [(&[(&str, &str)], Option<Dialect>); 5] = [
            (&[("connection", "Upgrade"), ("upgrade", "SPDY/3.1")], Some(Dialect::Spdy)),
            (&[("connection", "keep-alive, upgrade"), ("upgrade", "WebSocket")], Some(Dialect::WebSocket)),
            (&[("upgrade", "websocket")], None),
            (&[("connection", "Upgrade"), ("upgrade", "h2c")], None),
            (&[], None),
        ];
        for (headers, expected) in cases {
            assert_eq!(dialect(request(headers).headers()).ok(), expected, "{headers:?}");
        }
    }

    #[test]
    fn the_first_common_protocol_wins() {
        let supported = ["", "v4.channel.k8s.io", "channel.k8s.io"];
        let cases: [(&[(&str, &str)], Result<&str, StatusCode>); 4] = [
            (
                &[("x-stream-protocol-version", "v5.channel.k8s.io"), ("x-stream-protocol-version", "v4.channel.k8s.io")],
                Ok("v4.channel.k8s.io"),
            ),
            (&[("x-stream-protocol-version", "channel.k8s.io, v4.channel.k8s.io")], Ok("channel.k8s.io")),
            (&[], Ok("")),
            (&[("x-stream-protocol-version", "v9")], Err(StatusCode::FORBIDDEN)),
        ];
        for (headers, expected) in cases {
            let got =
                negotiate(&mut request(headers), Dialect::Spdy, &supported).map(|upgrade| upgrade.protocol).map_err(|error| error.status);
            assert_eq!(got, expected, "{headers:?}");
        }
    }

    #[test]
    fn websocket_handshakes_are_answered() {
        // The example of RFC 6455.
        let headers = [("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="), ("sec-websocket-protocol", "v5.channel.k8s.io")];
        let upgrade = negotiate(&mut request(&headers), Dialect::WebSocket, &["v5.channel.k8s.io"]).unwrap();
        assert_eq!(upgrade.response.headers()[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(upgrade.response.headers()[SEC_WEBSOCKET_PROTOCOL], "v5.channel.k8s.io");
        assert!(negotiate(&mut request(&[]), Dialect::WebSocket, &[""]).is_err());
    }
}
