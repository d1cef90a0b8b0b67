//! Where a proxied backend stands among our paths: its redirects and its pages' links are led back through there.

use std::convert::Infallible;
use std::io::{self, Read, Write};

use bytes::Bytes;
use flate2::Compression;
use flate2::read::{DeflateDecoder, MultiGzDecoder};
use flate2::write::DeflateEncoder;
use html5gum::emitters::callback::{CallbackEmitter, CallbackEvent};
use html5gum::{Span, Tokenizer};
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION,
};
use http_body::Body as _;
use http_body_util::{BodyExt, Limited};
use outrigger_api::Status;

use crate::body::{Request, Response, full};
use crate::reply;

/// Who may use our origin is our own decision.
const CORS: [HeaderName; 4] =
    [ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN];

const FORWARDED_URI: HeaderName = HeaderName::from_static("x-forwarded-uri");

/// The largest page that is rewritten, compressed or not: it is held whole.
const MAX_PAGE: usize = 64 * 1024 * 1024;

pub struct Mount {
    /// Our path that stands for the backend's root, without a slash at its end.
    pub prefix: String,
    /// The backend's host and port.
    pub backend: String,
    /// The host that the client asked for.
    pub host: String,
}

impl Mount {
    pub fn new(prefix: String, backend: String, request: &Request) -> Self {
        let named = || request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let host = request.uri().authority().map_or_else(named, |authority| authority.as_str()).to_string();
        Self { prefix, backend, host }
    }

    /// Tells the backend what its `path` looks like from outside.
    pub fn announce(&self, headers: &mut HeaderMap, path: &str) {
        if let Ok(value) = HeaderValue::from_str(&joined(&self.prefix, path)) {
            headers.insert(FORWARDED_URI, value);
        }
    }

    /// The backend's answer as the client may follow it.
    pub async fn response(&self, response: Response) -> Result<Response, Status> {
        let (mut parts, body) = response.into_parts();
        for name in CORS {
            parts.headers.remove(name);
        }
        if let Some(location) = parts.headers.get(LOCATION) {
            let moved = location.to_str().ok().and_then(|url| self.url(url));
            if let Some(moved) = moved.and_then(|url| HeaderValue::from_str(&url).ok()) {
                parts.headers.insert(LOCATION, moved);
            }
            return Ok(Response::from_parts(parts, body));
        }
        let coding = Coding::of(&parts.headers).filter(|_| is_html(&parts.headers) && !body.is_end_stream());
        let Some(coding) = coding else { return Ok(Response::from_parts(parts, body)) };
        let broken = |why: String| Status::service_unavailable(format!("error trying to reach service: {why}"));
        let bytes = Limited::new(body, MAX_PAGE).collect().await.map_err(|error| broken(error.to_string()))?.to_bytes();
        let page = coding.decode(&bytes).map_err(|error| broken(error.to_string()))?;
        parts.headers.remove(CONTENT_LENGTH);
        Ok(Response::from_parts(parts, full(coding.encode(self.page(&page)))))
    }

    /// The page with its links led through the prefix; all else stays as it is, byte for byte.
    fn page(&self, html: &[u8]) -> Vec<u8> {
        let (mut out, mut done) = (Vec::with_capacity(html.len()), 0);
        let (mut element, mut attribute) = (Vec::new(), Vec::new());
        let mut links = CallbackEmitter::new(|event: CallbackEvent<'_>, span: Span<usize>| -> Option<Infallible> {
            match event {
                CallbackEvent::OpenStartTag { name } => element = name.to_vec(),
                CallbackEvent::AttributeName { name } => attribute = name.to_vec(),
                CallbackEvent::AttributeValue { value } if is_url(&element, &attribute) => {
                    let url = std::str::from_utf8(value).ok().and_then(|url| self.url(url));
                    if let (Some(url), Some(before)) = (url, html.get(done..span.start)) {
                        let quote = if matches!(before.last(), Some(b'"' | b'\'')) { "" } else { "\"" };
                        out.extend_from_slice(before);
                        out.extend_from_slice(format!("{quote}{}{quote}", escaped(&url)).as_bytes());
                        done = span.end;
                    }
                }
                CallbackEvent::CloseStartTag { .. } | CallbackEvent::EndTag { .. } => element.clear(),
                _ => {}
            }
            None
        });
        // What stands inside scripts and the like are no tags.
        links.naively_switch_states(true);
        let Ok(()) = Tokenizer::new_with_emitter(html, links).finish();
        out.extend_from_slice(html.get(done..).unwrap_or_default());
        out
    }

    /// The URL as the client must ask for it. None where it serves as it is: a relative one, one of another host.
    fn url(&self, url: &str) -> Option<String> {
        let scheme = url.find([':', '/', '?', '#']).filter(|at| *at > 0 && url[*at..].starts_with(':')).map_or(0, |at| at + 1);
        let rest = &url[scheme..];
        let (authority, rest) = match rest.strip_prefix("//") {
            Some(rest) => rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len())),
            None => ("", rest),
        };
        let (path, tail) = rest.split_at(rest.find(['?', '#']).unwrap_or(rest.len()));
        let host = authority.rsplit('@').next().unwrap_or_default();
        let asked = !host.is_empty() && host == self.host;
        if !path.starts_with('/') || !(host.is_empty() || host == self.backend || asked) {
            return None;
        }
        let origin = if asked { &url[..url.len() - rest.len()] } else { "" };
        let path = if path.starts_with(&self.prefix) { path.to_string() } else { joined(&self.prefix, path) };
        let led = format!("{origin}{path}{tail}");
        (led != url).then_some(led)
    }
}

/// The path below the prefix, without what `.`, `..` and double slashes say; a slash at the end stays.
fn joined(prefix: &str, path: &str) -> String {
    let mut parts = Vec::new();
    for part in prefix.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    let end = if path.ends_with('/') && !parts.is_empty() { "/" } else { "" };
    format!("/{}{end}", parts.join("/"))
}

/// Which attributes of which elements are URLs.
fn is_url(element: &[u8], attribute: &[u8]) -> bool {
    match attribute {
        b"href" => matches!(element, b"a" | b"area" | b"base" | b"link"),
        b"src" => matches!(element, b"audio" | b"embed" | b"frame" | b"iframe" | b"img" | b"input" | b"script" | b"source" | b"video"),
        b"cite" => matches!(element, b"blockquote" | b"del" | b"ins" | b"q"),
        b"longdesc" => matches!(element, b"frame" | b"iframe" | b"img"),
        b"usemap" => matches!(element, b"img" | b"input" | b"object"),
        b"formaction" => matches!(element, b"button" | b"input"),
        b"codebase" => matches!(element, b"applet" | b"object"),
        b"classid" | b"data" => element == b"object",
        b"action" => element == b"form",
        b"background" => element == b"body",
        b"icon" => element == b"command",
        b"manifest" => element == b"html",
        b"poster" => element == b"video",
        b"profile" => element == b"head",
        _ => false,
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;").replace('\'', "&#39;")
}

fn is_html(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()?.split(';').next());
    kind.is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/html"))
}

/// How a page is compressed.
#[derive(Clone, Copy)]
enum Coding {
    Identity,
    Gzip,
    Deflate,
}

impl Coding {
    /// None: one that isn't understood, whose page stays as it is.
    fn of(headers: &HeaderMap) -> Option<Self> {
        match headers.get(CONTENT_ENCODING).map_or(&b""[..], |coding| coding.as_bytes()) {
            b"" => Some(Self::Identity),
            b"gzip" => Some(Self::Gzip),
            b"deflate" => Some(Self::Deflate),
            _ => None,
        }
    }

    fn decode(self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let reader: Box<dyn Read + '_> = match self {
            Self::Identity => Box::new(bytes),
            Self::Gzip => Box::new(MultiGzDecoder::new(bytes)),
            Self::Deflate => Box::new(DeflateDecoder::new(bytes)),
        };
        let mut page = Vec::new();
        if reader.take(MAX_PAGE as u64 + 1).read_to_end(&mut page)? > MAX_PAGE {
            return Err(io::Error::other("the page is too large"));
        }
        Ok(page)
    }

    fn encode(self, page: Vec<u8>) -> Bytes {
        match self {
            Self::Identity => page.into(),
            Self::Gzip => reply::gzip(&page),
            Self::Deflate => {
                let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
                // Writing into memory does not fail.
                let _ = encoder.write_all(&page);
                encoder.finish().unwrap_or_default().into()
            }
        }
    }
}

#[cfg(test)]
#[path = "mount_tests.rs"]
mod tests;
