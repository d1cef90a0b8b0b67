//! The DNS server's sockets: UDP and TCP in, the zone's answers out, everything else passed on unchanged.
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{DNSClass, RData, Record};
use hickory_proto::serialize::binary::{BinEncodable, BinEncoder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::Shared;
use super::answer::{Answer, Reply, answer};
use super::upstream::Transport;

/// Larger UDP replies would be fragmented somewhere; the client comes back by TCP.
const MAX_UDP_REPLY: u16 = 1232;
/// Without EDNS, RFC 1035 allows this much.
const PLAIN_UDP_REPLY: u16 = 512;
const TCP_IDLE: Duration = Duration::from_secs(10);
const MAX_TCP_CLIENTS: usize = 256;
/// Of these, how many one address may have: a single pod must not take them all.
pub(super) const MAX_TCP_OF_ONE: usize = 32;
/// Questions that wait for an upstream at a time; more are refused instead of held.
pub const MAX_WAITING: usize = 1024;

/// Answers UDP questions on `socket` until an unrecoverable error.
pub async fn serve_udp(socket: Arc<UdpSocket>, shared: Arc<Shared>) -> io::Result<()> {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let (length, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An ICMP error of an earlier reply; the socket itself is fine.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            Err(error) => return Err(error),
        };
        match respond(&shared, &buffer[..length], Transport::Udp) {
            Response::Nothing => {}
            Response::Now(bytes) => send(&socket, &bytes, client).await,
            Response::Later(pending) => {
                let (socket, shared) = (socket.clone(), shared.clone());
                tokio::spawn(async move { send(&socket, &pending.finish(&shared).await, client).await });
            }
        }
    }
}

async fn send(socket: &UdpSocket, bytes: &[u8], client: SocketAddr) {
    if let Err(error) = socket.send_to(bytes, client).await {
        debug!(%client, %error, "reply not sent");
    }
}

pub async fn serve_tcp(listener: TcpListener, shared: Arc<Shared>) -> io::Result<()> {
    let clients = Arc::new(Semaphore::new(MAX_TCP_CLIENTS));
    // Each connection holds its address's entry.
    let mut by_address: HashMap<IpAddr, Arc<()>> = HashMap::new();
    loop {
        let (stream, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "accepting a DNS client failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        by_address.retain(|_, held| Arc::strong_count(held) > 1);
        let held = by_address.entry(client.ip()).or_default().clone();
        // The entry itself and this new connection hold it besides those before.
        if Arc::strong_count(&held) - 2 >= MAX_TCP_OF_ONE {
            debug!(%client, "too many connections by TCP of one DNS client");
            continue;
        }
        let Ok(permit) = clients.clone().try_acquire_owned() else {
            debug!(%client, "too many DNS clients by TCP");
            continue;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            if let Err(error) = serve_stream(stream, &shared).await {
                debug!(%client, %error, "DNS client by TCP ended");
            }
            drop((permit, held));
        });
    }
}

async fn serve_stream(mut stream: TcpStream, shared: &Arc<Shared>) -> io::Result<()> {
    loop {
        let question = match tokio::time::timeout(TCP_IDLE, read_frame(&mut stream)).await {
            Ok(Ok(Some(question))) => question,
            Ok(Ok(None)) | Err(_) => return Ok(()),
            Ok(Err(error)) => return Err(error),
        };
        let reply = match respond(shared, &question, Transport::Tcp) {
            Response::Nothing => return Ok(()),
            Response::Now(bytes) => bytes,
            Response::Later(pending) => pending.finish(shared).await,
        };
        // Whoever doesn't read its answers is left like one that doesn't ask.
        match tokio::time::timeout(TCP_IDLE, write_frame(&mut stream, &reply)).await {
            Ok(written) => written?,
            Err(_) => return Ok(()),
        }
    }
}

/// One message with its two-byte length; `None` at the end of the stream.
pub async fn read_frame(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

pub async fn write_frame(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "DNS message too long"))?;
    let mut frame = Vec::with_capacity(message.len() + 2);
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(message);
    stream.write_all(&frame).await
}

enum Response {
    /// Not even a question: answering would only help reflections.
    Nothing,
    Now(Vec<u8>),
    Later(Box<Pending>),
}

/// A question that an upstream has to answer, in whole or in its last part.
struct Pending {
    question: Message,
    raw: Vec<u8>,
    transport: Transport,
    /// Ours so far, when only the end of an alias is missing.
    begun: Option<Reply>,
}

fn respond(shared: &Shared, raw: &[u8], transport: Transport) -> Response {
    let question = match Message::from_vec(raw) {
        Ok(question) => question,
        Err(error) => {
            debug!(%error, "undecodable DNS message");
            return malformed(raw).map_or(Response::Nothing, Response::Now);
        }
    };
    if question.metadata.message_type != MessageType::Query {
        return Response::Nothing;
    }
    shared.metrics.count_request(transport);
    let refuse = |code| Response::Now(encode(shared, &empty(&question, code), transport, question.edns.as_ref()));
    if question.metadata.op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    let [query] = question.queries.as_slice() else { return refuse(ResponseCode::FormErr) };
    if query.query_class() != DNSClass::IN && query.query_class() != DNSClass::ANY {
        return refuse(ResponseCode::NotImp);
    }
    let found = {
        let records = shared.records.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        answer(&shared.zone, &records, query.name(), query.query_type())
    };
    match found {
        Answer::Foreign => Response::Later(Box::new(Pending { raw: raw.to_vec(), question, transport, begun: None })),
        // Before the first lists have arrived, "no such name" would be a guess.
        Answer::Authoritative(_) if !shared.synced.load(Ordering::Acquire) => refuse(ResponseCode::ServFail),
        Answer::Authoritative(reply) if reply.unresolved.is_some() => {
            Response::Later(Box::new(Pending { raw: raw.to_vec(), question, transport, begun: Some(reply) }))
        }
        Answer::Authoritative(mut reply) => {
            rotate(&mut reply.answers, shared.metrics.turn());
            Response::Now(encode(shared, &complete(&question, reply), transport, question.edns.as_ref()))
        }
    }
}

impl Pending {
    async fn finish(self, shared: &Shared) -> Vec<u8> {
        let Ok(_permit) = shared.waiting.try_acquire() else { return self.fail(shared) };
        match self.begun {
            None => match shared.upstream.exchange(&self.raw, self.transport).await {
                Ok(reply) => {
                    shared.metrics.count_forwarded();
                    reply
                }
                Err(error) => {
                    debug!(%error, name = ?self.question.queries.first().map(|query| query.name().to_string()), "no upstream answered");
                    self.fail(shared)
                }
            },
            Some(mut reply) => {
                if let Some(target) = reply.unresolved.take() {
                    let kind = self.question.queries.first().map(|query| query.query_type()).unwrap_or(hickory_proto::rr::RecordType::A);
                    match shared.upstream.resolve(target, kind).await {
                        Ok(records) => reply.answers.extend(records),
                        Err(error) => debug!(%error, "the end of an external name stays unresolved"),
                    }
                }
                encode(shared, &complete(&self.question, reply), self.transport, self.question.edns.as_ref())
            }
        }
    }

    fn fail(&self, shared: &Shared) -> Vec<u8> {
        encode(shared, &empty(&self.question, ResponseCode::ServFail), self.transport, self.question.edns.as_ref())
    }
}

fn empty(question: &Message, code: ResponseCode) -> Message {
    let mut message = Message::response(question.metadata.id, question.metadata.op_code);
    message.metadata.recursion_desired = question.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.response_code = code;
    message.add_queries(question.queries.iter().cloned());
    message
}

fn complete(question: &Message, reply: Reply) -> Message {
    let mut message = empty(question, reply.code);
    message.metadata.authoritative = true;
    message.insert_answers(reply.answers);
    message.insert_authorities(reply.authorities);
    message.insert_additionals(reply.additionals);
    message
}

/// What a message that can't be decoded still gets, when its header is whole.
fn malformed(raw: &[u8]) -> Option<Vec<u8>> {
    let id = u16::from_be_bytes([*raw.first()?, *raw.get(1)?]);
    let is_query = raw.len() >= 12 && raw[2] & 0x80 == 0;
    if !is_query {
        return None;
    }
    Message::error_msg(id, OpCode::Query, ResponseCode::FormErr).to_vec().ok()
}

/// Writes the message within the client's limit; what doesn't fit is cut at a record's end and marked as truncated.
fn encode(shared: &Shared, message: &Message, transport: Transport, asked: Option<&Edns>) -> Vec<u8> {
    shared.metrics.count_answer(message.metadata.response_code);
    let mut message = message.clone();
    if asked.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP_REPLY);
        message.set_edns(edns);
    }
    let limit = match transport {
        Transport::Tcp => u16::MAX,
        Transport::Udp => asked.map_or(PLAIN_UDP_REPLY, |edns| edns.max_payload().clamp(PLAIN_UDP_REPLY, MAX_UDP_REPLY)),
    };
    match emit(&message, limit) {
        Ok(bytes) => bytes,
        Err(error) => {
            warn!(%error, "a DNS reply can't be encoded");
            let failure = Message::error_msg(message.metadata.id, OpCode::Query, ResponseCode::ServFail);
            failure.to_vec().unwrap_or_default()
        }
    }
}

fn emit(message: &Message, limit: u16) -> Result<Vec<u8>, hickory_proto::ProtoError> {
    let mut bytes = Vec::with_capacity(512);
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(limit);
    message.emit(&mut encoder)?;
    Ok(bytes)
}

/// Clients take the first address; each reply starts with another one. Aliases stay in front.
fn rotate(answers: &mut [Record], turn: usize) {
    let first = answers.iter().position(|record| !matches!(record.data, RData::CNAME(_))).unwrap_or(answers.len());
    let addresses = &mut answers[first..];
    if addresses.len() > 1 {
        addresses.rotate_left(turn % addresses.len());
    }
}

/// Binds both sockets of one server address.
pub async fn bind(address: IpAddr, port: u16) -> io::Result<(UdpSocket, TcpListener)> {
    let udp = UdpSocket::bind((address, port)).await?;
    let tcp = TcpListener::bind((address, port)).await?;
    Ok((udp, tcp))
}
