//! A SPDY/3.1 connection: many streams over one upgraded HTTP connection, from either end.
//!
//! Backpressure is the connection's own: a stream whose reader is slow stops the connection from being read, as in
//! upstream's implementation, whose peers send no window updates.
pub mod frame;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tracing::debug;

use frame::{Decoder, Encoder, Frame, Headers};

/// Data pieces that wait in a stream for its reader.
const STREAM_BACKLOG: usize = 8;
/// Frames that wait for the connection to take them.
const SEND_BACKLOG: usize = 32;
const MAX_STREAMS: usize = 2048;
/// Answers and resets that wait for the connection to take them: all streams may end at once, but a peer that asks on and on
/// without reading the answers is left.
const URGENT_BACKLOG: usize = 2 * MAX_STREAMS;
const MAX_DATA: usize = 32 * 1024;
/// How long the peer may take to close its end after we closed ours; until then its bytes are read, since closing with
/// unread bytes would make the kernel drop what we sent last.
const LINGER: Duration = Duration::from_secs(2);

const REFUSED_STREAM: u32 = 3;
const CANCEL: u32 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
}

/// A stream of our own that has just begun.
struct Opened {
    id: u32,
    data: mpsc::Receiver<Bytes>,
    replied: oneshot::Receiver<()>,
    reset: Arc<AtomicBool>,
}

/// Something to be written, in order.
enum Command {
    Open { headers: Headers, fin: bool, opened: oneshot::Sender<Opened> },
    Send(Frame),
    Close,
}

struct Inbound {
    data: Option<mpsc::Sender<Bytes>>,
    replied: Option<oneshot::Sender<()>>,
    reset: Arc<AtomicBool>,
}

#[derive(Default)]
struct Streams(Mutex<HashMap<u32, Inbound>>);

impl Streams {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Inbound>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The way of frames that nobody waits with. When it's full, the connection ends.
#[derive(Clone)]
struct Urgent {
    frames: mpsc::Sender<Frame>,
    full: Arc<Notify>,
}

impl Urgent {
    fn send(&self, frame: Frame) {
        // The other error means that the connection is gone, and its streams with it.
        if let Err(mpsc::error::TrySendError::Full(_)) = self.frames.try_send(frame) {
            self.full.notify_one();
        }
    }
}

/// A running connection. Dropping all handles and streams closes it.
#[derive(Clone)]
pub struct Connection {
    commands: mpsc::Sender<Command>,
    urgent: Urgent,
    ended: watch::Receiver<bool>,
}

/// One stream: its headers, what comes in, and the way out.
pub struct Stream {
    pub headers: Headers,
    pub reader: Reader,
    pub writer: Writer,
}

/// What the peer sends on a stream.
pub struct Reader(mpsc::Receiver<Bytes>);

impl Reader {
    /// The next piece; `None` when the peer has ended or reset the stream, or the connection is gone.
    pub async fn read(&mut self) -> Option<Bytes> {
        self.0.recv().await
    }

    pub fn into_receiver(self) -> mpsc::Receiver<Bytes> {
        self.0
    }
}

/// Our half of a stream. Dropped unfinished, it resets the stream.
pub struct Writer {
    id: u32,
    commands: mpsc::Sender<Command>,
    urgent: Urgent,
    reset: Arc<AtomicBool>,
    finished: bool,
}

impl Writer {
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Waits until the connection has taken the data over.
    pub async fn write(&mut self, mut data: Bytes) -> io::Result<()> {
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(MAX_DATA));
            self.send(Frame::Data { id: self.id, fin: false, data: piece }).await?;
        }
        Ok(())
    }

    /// Ends our half; the peer reads to the end of what was sent before.
    pub async fn finish(&mut self) -> io::Result<()> {
        if self.finished {
            return Ok(());
        }
        self.finished = true;
        self.send(Frame::Data { id: self.id, fin: true, data: Bytes::new() }).await
    }

    /// Ends both halves at once.
    pub fn reset(&mut self) {
        if !self.finished {
            self.finished = true;
            self.urgent.send(Frame::Reset { id: self.id, status: CANCEL });
        }
    }

    async fn send(&self, frame: Frame) -> io::Result<()> {
        if self.reset.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::ConnectionReset, "the peer reset the stream"));
        }
        self.commands.send(Command::Send(frame)).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.reset();
    }
}

impl Connection {
    /// Runs the connection over `io`; streams that the peer opens arrive at the receiver, already replied to.
    pub fn start<T>(io: T, role: Role) -> (Self, mpsc::Receiver<Stream>)
    where
        T: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read, write) = tokio::io::split(io);
        let (commands, command_queue) = mpsc::channel(SEND_BACKLOG);
        let (frames, urgent_queue) = mpsc::channel(URGENT_BACKLOG);
        let full = Arc::new(Notify::new());
        let urgent = Urgent { frames, full: full.clone() };
        let (incoming, streams_opened) = mpsc::channel(16);
        let (end, ended) = watch::channel(false);
        let streams = Arc::new(Streams::default());
        let reading = Reading {
            read,
            role,
            streams: streams.clone(),
            commands: commands.downgrade(),
            urgent: urgent.frames.downgrade(),
            full: full.clone(),
            incoming,
        };
        let writing =
            Writing { write, encoder: Encoder::default(), streams: streams.clone(), next: if role == Role::Client { 1 } else { 2 } };
        tokio::spawn(drive(reading, writing.run(command_queue, urgent_queue), full, streams, end));
        (Self { commands, urgent, ended }, streams_opened)
    }

    /// Opens a stream and waits for the peer's reply.
    pub async fn open(&self, headers: Headers) -> io::Result<Stream> {
        let (opened, wait) = oneshot::channel();
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        self.commands.send(Command::Open { headers: headers.clone(), fin: false, opened }).await.map_err(|_| gone())?;
        let Opened { id, data, replied, reset } = wait.await.map_err(|_| gone())?;
        let writer = Writer { id, commands: self.commands.clone(), urgent: self.urgent.clone(), reset, finished: false };
        replied.await.map_err(|_| io::Error::new(io::ErrorKind::ConnectionRefused, "the peer refused the stream"))?;
        Ok(Stream { headers, reader: Reader(data), writer })
    }

    /// Closes after everything sent so far has been written.
    pub async fn close(&self) {
        // An error means that it is closed already.
        let _ = self.commands.send(Command::Close).await;
    }

    /// Resolves when the connection is over, by either side.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // The sender going away means the same.
        let _ = ended.wait_for(|ended| *ended).await;
    }
}

/// Both directions until either fails or too much waits to be sent; then every stream sees its end.
async fn drive<T: AsyncRead + AsyncWrite>(
    mut reading: Reading<T>,
    writing: impl Future<Output = io::Result<()>>,
    full: Arc<Notify>,
    streams: Arc<Streams>,
    end: watch::Sender<bool>,
) {
    let result = {
        let mut writing = std::pin::pin!(writing);
        let read = tokio::select! {
            result = reading.run() => Some(result),
            () = full.notified() => Some(Err(io::Error::other("the peer doesn't read what it asks for"))),
            result = &mut writing => {
                if let Err(error) = result {
                    debug!(%error, "SPDY connection broke off");
                }
                None
            }
        };
        read
    };
    match result {
        Some(Err(error)) => debug!(%error, "SPDY connection broke off"),
        Some(Ok(())) => {}
        None => {
            streams.lock().clear();
            end.send_replace(true);
            // Over or not, the connection ends here.
            let _ = tokio::time::timeout(LINGER, reading.discard()).await;
        }
    }
    for (_, inbound) in streams.lock().drain() {
        inbound.reset.store(true, Ordering::Release);
    }
    end.send_replace(true);
}

struct Writing<T> {
    write: tokio::io::WriteHalf<T>,
    encoder: Encoder,
    streams: Arc<Streams>,
    next: u32,
}

impl<T: AsyncWrite> Writing<T> {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, mut urgent: mpsc::Receiver<Frame>) -> io::Result<()> {
        let mut output = BytesMut::with_capacity(MAX_DATA);
        loop {
            tokio::select! {
                biased;
                // Before a reset, what the stream sent earlier must be out.
                command = commands.recv() => match command {
                    Some(Command::Close) | None => break,
                    Some(Command::Open { headers, fin, opened }) => self.open(headers, fin, opened, &mut output)?,
                    Some(Command::Send(frame)) => self.encode(&frame, &mut output)?,
                },
                frame = urgent.recv() => match frame {
                    Some(frame) => self.encode(&frame, &mut output)?,
                    None => break,
                },
            }
            if output.len() >= MAX_DATA || commands.is_empty() {
                self.write.write_all(&output).await?;
                self.write.flush().await?;
                output.clear();
            }
        }
        self.encode(&Frame::GoAway { last: 0, status: 0 }, &mut output)?;
        self.write.write_all(&output).await?;
        self.write.flush().await?;
        self.write.shutdown().await
    }

    fn encode(&mut self, frame: &Frame, output: &mut BytesMut) -> io::Result<()> {
        if let Frame::Reset { id, .. } = frame {
            self.streams.lock().remove(id);
        }
        self.encoder.encode(frame, output).map_err(io::Error::other)
    }

    fn open(&mut self, headers: Headers, fin: bool, opened: oneshot::Sender<Opened>, output: &mut BytesMut) -> io::Result<()> {
        let id = self.next;
        self.next += 2;
        let (data, receiver) = mpsc::channel(STREAM_BACKLOG);
        let (replied, reply) = oneshot::channel();
        let reset = Arc::new(AtomicBool::new(false));
        self.streams.lock().insert(id, Inbound { data: Some(data), replied: Some(replied), reset: reset.clone() });
        self.encode(&Frame::SynStream { id, fin, headers }, output)?;
        if opened.send(Opened { id, data: receiver, replied: reply, reset }).is_err() {
            // The opener gave up before the stream began.
            self.encode(&Frame::Reset { id, status: CANCEL }, output)?;
        }
        Ok(())
    }
}

struct Reading<T> {
    read: tokio::io::ReadHalf<T>,
    role: Role,
    streams: Arc<Streams>,
    // Weak, so that the reading side alone doesn't keep the connection open.
    commands: mpsc::WeakSender<Command>,
    urgent: mpsc::WeakSender<Frame>,
    full: Arc<Notify>,
    incoming: mpsc::Sender<Stream>,
}

impl<T: AsyncRead> Reading<T> {
    async fn run(&mut self) -> io::Result<()> {
        let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::with_capacity(MAX_DATA));
        loop {
            while let Some(frame) = decoder.decode(&mut buffer).map_err(io::Error::other)? {
                self.take(frame).await;
            }
            buffer.reserve(MAX_DATA);
            if self.read.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
    }

    async fn discard(&mut self) {
        let mut buffer = vec![0; 4096];
        while self.read.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
    }

    async fn take(&mut self, frame: Frame) {
        match frame {
            Frame::SynStream { id, fin, headers } => self.opened(id, fin, headers).await,
            Frame::SynReply { id, fin, .. } => {
                if let Some(inbound) = self.streams.lock().get_mut(&id)
                    && let Some(replied) = inbound.replied.take()
                {
                    // Nobody waits any more: the opener gave up.
                    let _ = replied.send(());
                }
                self.finished(id, fin);
            }
            Frame::Data { id, fin, data } => {
                let sender = self.streams.lock().get(&id).and_then(|inbound| inbound.data.clone());
                if let Some(sender) = sender
                    && !data.is_empty()
                {
                    // An error means that nobody reads this stream: what arrives is dropped.
                    let _ = sender.send(data).await;
                }
                self.finished(id, fin);
            }
            Frame::Headers { id, fin, .. } => self.finished(id, fin),
            Frame::Reset { id, .. } => {
                if let Some(inbound) = self.streams.lock().remove(&id) {
                    inbound.reset.store(true, Ordering::Release);
                }
            }
            // Pings of our own parity are answers.
            Frame::Ping { id } if (id % 2 == 1) != (self.role == Role::Client) => self.answer(Frame::Ping { id }),
            Frame::Ping { .. } | Frame::GoAway { .. } | Frame::Ignored => {}
        }
    }

    fn finished(&self, id: u32, fin: bool) {
        if fin && let Some(inbound) = self.streams.lock().get_mut(&id) {
            inbound.data = None;
        }
    }

    fn urgent(&self) -> Option<Urgent> {
        Some(Urgent { frames: self.urgent.upgrade()?, full: self.full.clone() })
    }

    fn answer(&self, frame: Frame) {
        if let Some(urgent) = self.urgent() {
            urgent.send(frame);
        }
    }

    async fn opened(&mut self, id: u32, fin: bool, headers: Headers) {
        let ours = (id % 2 == 1) == (self.role == Role::Client);
        let (Some(commands), Some(urgent)) = (self.commands.upgrade(), self.urgent()) else { return };
        let (data, receiver) = mpsc::channel(STREAM_BACKLOG);
        let reset = Arc::new(AtomicBool::new(false));
        let accepted = {
            let mut streams = self.streams.lock();
            // Streams that both sides have ended are of no interest any more.
            streams.retain(|_, inbound| inbound.data.is_some() || inbound.replied.is_some() || Arc::strong_count(&inbound.reset) > 1);
            let accepted = !ours && streams.len() < MAX_STREAMS && !streams.contains_key(&id);
            if accepted {
                streams.insert(id, Inbound { data: (!fin).then_some(data), replied: None, reset: reset.clone() });
            }
            accepted
        };
        if !accepted {
            self.answer(Frame::Reset { id, status: REFUSED_STREAM });
            return;
        }
        let reply = Frame::SynReply { id, fin: false, headers: Headers::new() };
        // An error means that the connection is being closed.
        let _ = commands.send(Command::Send(reply)).await;
        let writer = Writer { id, commands, urgent, reset, finished: false };
        // When nobody takes streams any more, dropping it resets it.
        let _ = self.incoming.send(Stream { headers, reader: Reader(receiver), writer }).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn is_left_by_the_server(asked: Frame) -> bool {
        let (mut peer, io) = tokio::io::duplex(256);
        let (connection, _streams) = Connection::start(io, Role::Server);
        let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
        for _ in 0..URGENT_BACKLOG * 2 {
            bytes.clear();
            encoder.encode(&asked, &mut bytes).unwrap();
            if peer.write_all(&bytes).await.is_err() {
                connection.ended().await;
                return true;
            }
        }
        false
    }

    #[tokio::test]
    async fn a_peer_that_asks_without_reading_is_left() {
        assert!(is_left_by_the_server(Frame::Ping { id: 1 }).await);
        // An even number is the server's own: the stream is refused.
        assert!(is_left_by_the_server(Frame::SynStream { id: 2, fin: false, headers: Headers::new() }).await);
    }
}
