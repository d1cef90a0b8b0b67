//! The client's end towards a container runtime's streaming server, which speaks SPDY.
use std::io;

use bytes::Bytes;
use http::header::{CONNECTION, HOST, UPGRADE};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::session::Wanted;
use crate::spdy::{Connection, Reader, Role, Writer};
use crate::upgrade::SPDY;

/// The only one that reports exit codes in a form to pass on.
const PROTOCOL: &str = "v4.channel.k8s.io";
const MAX_ERROR_BODY: usize = 16 * 1024;

/// A command's streams in the runtime.
pub struct Remote {
    pub stdin: Option<Writer>,
    pub resize: Option<Writer>,
    pub stdout: Option<Reader>,
    pub stderr: Option<Reader>,
    pub error: Reader,
    pub connection: Connection,
}

/// Opens the streams of the command behind `url`, which the runtime's Exec or Attach returned.
pub async fn connect(url: &str, wanted: Wanted) -> io::Result<Remote> {
    let (connection, _) = Connection::start(upgrade(url).await?, Role::Client);
    let open = async |kind: &str| connection.open(vec![("streamtype".to_owned(), kind.to_owned())]).await;
    // The runtime expects the error stream first.
    let mut error = open("error").await?;
    error.writer.finish().await?;
    let mut remote = Remote { stdin: None, resize: None, stdout: None, stderr: None, error: error.reader, connection: connection.clone() };
    if wanted.stdin {
        remote.stdin = Some(open("stdin").await?.writer);
    }
    for (kind, wanted, slot) in [("stdout", wanted.stdout, &mut remote.stdout), ("stderr", wanted.stderr, &mut remote.stderr)] {
        if wanted {
            let mut stream = open(kind).await?;
            stream.writer.finish().await?;
            *slot = Some(stream.reader);
        }
    }
    if wanted.tty {
        remote.resize = Some(open("resize").await?.writer);
    }
    Ok(remote)
}

/// Asks for SPDY and returns the connection once the server has switched.
async fn upgrade(url: &str) -> io::Result<TokioIo<hyper::upgrade::Upgraded>> {
    let url: Uri = url.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, format!("streaming URL {url:?}: {error}")))?;
    let authority =
        url.authority().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("streaming URL {url} has no host")))?;
    let stream = TcpStream::connect((authority.host().trim_matches(['[', ']']), authority.port_u16().unwrap_or(80))).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "connection to the runtime's streaming server ended");
        }
    });
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::post(path)
        .header(HOST, authority.as_str())
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, SPDY)
        .header("X-Stream-Protocol-Version", PROTOCOL)
        .body(Empty::<Bytes>::new())
        .map_err(io::Error::other)?;
    let response = sender.send_request(request).await.map_err(io::Error::other)?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ERROR_BODY).collect().await;
        let text = body.map(|body| String::from_utf8_lossy(&body.to_bytes()).trim().to_owned()).unwrap_or_default();
        return Err(io::Error::other(format!("the runtime's streaming server answered {status}: {text}")));
    }
    Ok(TokioIo::new(hyper::upgrade::on(response).await.map_err(io::Error::other)?))
}
