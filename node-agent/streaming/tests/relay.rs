//! Commands and port-forwards end to end over loopback: a client in each dialect, the agent's end in the middle, and a
//! runtime's streaming server behind it that echoes its input.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]
use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::{Request, Response};
use http_body_util::{Empty, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use outrigger_streaming::session::{self, Wanted};
use outrigger_streaming::spdy::{Connection, Role, Stream};
use outrigger_streaming::{client, portforward};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;

const ALL: Wanted = Wanted { stdin: true, stdout: true, stderr: true, tty: false };

async fn serve<F, R>(handler: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = Response<String>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let handler = handler.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let answer = handler(request);
                    async move { Ok::<_, Infallible>(answer.await.map(|body| Full::new(Bytes::from(body)))) }
                });
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades().await.unwrap();
            });
        }
    });
    address
}

/// Echoes stdin to stdout, says a word on stderr, and ends with a failure once stdin has ended.
async fn runtime(mut request: Request<Incoming>) -> Response<String> {
    let (dialect, upgrade) = match session::negotiate(&mut request) {
        Ok(agreed) => agreed,
        Err(rejection) => return rejection.response(),
    };
    tokio::spawn(async move {
        let mut session = session::accept(dialect, upgrade.protocol, upgrade.connection, ALL).await.unwrap();
        session.stderr.as_mut().unwrap().write(Bytes::from_static(b"warning")).await.unwrap();
        let mut stdin = session.stdin.take().unwrap();
        while let Some(data) = stdin.recv().await {
            session.stdout.as_mut().unwrap().write(data).await.unwrap();
        }
        session.finish(br#"{"status":"Failure","message":"exit 7"}"#).await.unwrap();
    });
    upgrade.response.map(|()| String::new())
}

async fn agent() -> SocketAddr {
    let runtime = serve(runtime).await;
    serve(move |mut request: Request<Incoming>| async move {
        let (dialect, upgrade) = match session::negotiate(&mut request) {
            Ok(agreed) => agreed,
            Err(rejection) => return rejection.response(),
        };
        tokio::spawn(async move {
            let session = session::accept(dialect, upgrade.protocol, upgrade.connection, ALL).await.unwrap();
            let remote = client::connect(&format!("http://{runtime}/exec/token"), ALL).await.unwrap();
            session.relay(remote).await.unwrap();
        });
        upgrade.response.map(|()| String::new())
    })
    .await
}

async fn spdy(address: SocketAddr, path: &str, protocol: &str) -> Connection {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    let request = Request::post(path)
        .header("Host", "agent")
        .header("Connection", "Upgrade")
        .header("Upgrade", "SPDY/3.1")
        .header("X-Stream-Protocol-Version", protocol)
        .body(Empty::<Bytes>::new())
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 101);
    assert_eq!(response.headers()["x-stream-protocol-version"], protocol);
    Connection::start(TokioIo::new(hyper::upgrade::on(response).await.unwrap()), Role::Client).0
}

async fn websocket(address: SocketAddr, path: &str, protocol: &str) -> tokio_tungstenite::WebSocketStream<TcpStream> {
    let stream = TcpStream::connect(address).await.unwrap();
    let request = Request::get(format!("ws://agent{path}"))
        .header("Host", "agent")
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", tokio_tungstenite::tungstenite::handshake::client::generate_key())
        .header("Sec-WebSocket-Protocol", protocol)
        .body(())
        .unwrap();
    tokio_tungstenite::client_async(request, stream).await.unwrap().0
}

async fn open(connection: &Connection, headers: &[(&str, &str)]) -> Stream {
    connection.open(headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()).await.unwrap()
}

async fn read_all(stream: &mut Stream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(data) = stream.reader.read().await {
        all.extend_from_slice(&data);
    }
    all
}

#[tokio::test]
async fn a_command_over_spdy() {
    let connection = spdy(agent().await, "/exec", "v4.channel.k8s.io").await;
    let mut error = open(&connection, &[("streamtype", "error")]).await;
    let mut stdin = open(&connection, &[("streamtype", "stdin")]).await;
    let mut stdout = open(&connection, &[("streamtype", "stdout")]).await;
    let mut stderr = open(&connection, &[("streamtype", "stderr")]).await;
    let sent: Vec<u8> = (0..3_000_000_u32).map(|number| number as u8).collect();
    let received = async { tokio::join!(read_all(&mut stdout), read_all(&mut stderr), read_all(&mut error)) };
    let send = async {
        stdin.writer.write(Bytes::from(sent.clone())).await.unwrap();
        stdin.writer.finish().await.unwrap();
    };
    let ((stdout, stderr, error), ()) = tokio::join!(received, send);
    assert!(stdout == sent, "{} of {} bytes came back", stdout.len(), sent.len());
    assert_eq!((stderr.as_slice(), error.as_slice()), (b"warning".as_slice(), br#"{"status":"Failure","message":"exit 7"}"#.as_slice()));
    connection.ended().await;
}

#[tokio::test]
async fn a_command_over_websocket() {
    let cases = [
        ("v5.channel.k8s.io", Message::Binary(Bytes::from_static(b"\x00hello")), r#"{"status":"Failure","message":"exit 7"}"#),
        ("channel.k8s.io", Message::Binary(Bytes::from_static(b"\x00hello")), "exit 7"),
        ("v4.base64.channel.k8s.io", Message::Text("0aGVsbG8=".into()), r#"{"status":"Failure","message":"exit 7"}"#),
    ];
    let address = agent().await;
    for (protocol, hello, status) in cases {
        let coding = if protocol.contains("base64") {
            outrigger_streaming::websocket::Coding::Base64
        } else {
            outrigger_streaming::websocket::Coding::Binary
        };
        let mut socket = websocket(address, "/exec", protocol).await;
        let mut outputs = vec![Vec::new(); 4];
        socket.send(hello).await.unwrap();
        while outputs[1].is_empty() || outputs[2].is_empty() {
            let (channel, data) = coding.decode(socket.next().await.unwrap().unwrap()).unwrap();
            outputs[usize::from(channel)].extend_from_slice(&data);
        }
        assert_eq!((outputs[1].as_slice(), outputs[2].as_slice()), (b"hello".as_slice(), b"warning".as_slice()), "{protocol}");
        if protocol != "v5.channel.k8s.io" {
            // Only v5 can end its input and still listen.
            continue;
        }
        socket.send(coding.encode(255, &[0])).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            if let Some((channel, data)) = coding.decode(message) {
                outputs[usize::from(channel)].extend_from_slice(&data);
            }
        }
        assert_eq!(String::from_utf8_lossy(&outputs[3]), status, "{protocol}");
    }
}

#[tokio::test]
async fn a_plain_request_is_told_what_is_missing() {
    let stream = TcpStream::connect(agent().await).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let response = sender.send_request(Request::post("/exec").header("Host", "agent").body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
    assert_eq!(response.status(), 400);
}

async fn forwarder() -> SocketAddr {
    serve(|mut request: Request<Incoming>| async move {
        let (dialect, upgrade) = match portforward::negotiate(&mut request) {
            Ok(agreed) => agreed,
            Err(rejection) => return rejection.response(),
        };
        let ports: Vec<u16> =
            request.uri().query().unwrap_or_default().split('&').filter_map(|pair| pair.strip_prefix("port=")?.parse().ok()).collect();
        tokio::spawn(async move {
            let mut forwards = portforward::accept(dialect, upgrade.protocol, upgrade.connection, &ports).await.unwrap();
            while let Some(forward) = forwards.next().await {
                tokio::spawn(async move {
                    match TcpStream::connect(("127.0.0.1", forward.port)).await {
                        Ok(stream) => forward.splice(stream).await,
                        Err(_) => forward.fail("refused".to_owned()).await,
                    }
                });
            }
        });
        upgrade.response.map(|()| String::new())
    })
    .await
}

/// A server that answers a whole request, read to its end, with its length.
async fn counter() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                stream.write_all(all.len().to_string().as_bytes()).await.unwrap();
            });
        }
    });
    port
}

async fn forward_over_spdy(connection: Connection) {
    let port = counter().await.to_string();
    for request in ["0", "1", "2"] {
        let mut error = open(&connection, &[("streamtype", "error"), ("port", &port), ("requestid", request)]).await;
        error.writer.finish().await.unwrap();
        let mut data = open(&connection, &[("streamtype", "data"), ("port", &port), ("requestid", request)]).await;
        data.writer.write(Bytes::from(vec![7; 100_000])).await.unwrap();
        data.writer.finish().await.unwrap();
        assert_eq!(read_all(&mut data).await, b"100000");
        assert_eq!(read_all(&mut error).await, b"");
    }
    let mut error = open(&connection, &[("streamtype", "error"), ("port", "1"), ("requestid", "3")]).await;
    let mut data = open(&connection, &[("streamtype", "data"), ("port", "1"), ("requestid", "3")]).await;
    assert_eq!(read_all(&mut error).await, b"refused");
    assert_eq!(read_all(&mut data).await, b"");
}

#[tokio::test]
async fn ports_over_spdy() {
    forward_over_spdy(spdy(forwarder().await, "/portForward", "portforward.k8s.io").await).await;
}

#[tokio::test]
async fn ports_over_spdy_inside_websocket() {
    let socket = websocket(forwarder().await, "/portForward", "SPDY/3.1+portforward.k8s.io").await;
    forward_over_spdy(Connection::start(outrigger_streaming::websocket::tunnel(socket), Role::Client).0).await;
}

#[tokio::test]
async fn ports_over_websocket_channels() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut socket = websocket(forwarder().await, &format!("/portForward?port={port}"), "v4.channel.k8s.io").await;
    let first = [socket.next().await.unwrap().unwrap(), socket.next().await.unwrap().unwrap()];
    let [low, high] = port.to_le_bytes();
    assert_eq!(first.map(Message::into_data), [Bytes::copy_from_slice(&[0, low, high]), Bytes::copy_from_slice(&[1, low, high])]);
    let (mut stream, _) = listener.accept().await.unwrap();
    socket.send(Message::Binary(Bytes::from_static(b"\x00ping"))).await.unwrap();
    let mut buffer = [0; 4];
    stream.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"ping");
    stream.write_all(b"pong").await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap().into_data().as_ref(), b"\x00pong");
}
