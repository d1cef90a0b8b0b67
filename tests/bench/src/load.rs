//! The benches' own traffic: a server, clients that count exchanges, and one that holds connections open under load.
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Each connection is answered once, and closed by the server.
pub const SHORT_PORT: u16 = 7000;
/// Each connection is answered for as long as it lives.
pub const LONG_PORT: u16 = 7001;
pub const IPERF_PORT: u16 = 5201;

/// What takes longer than this was a lost packet, not work.
const SLOW: Duration = Duration::from_millis(150);
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub struct Load {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long, default_value_t = 300)]
    millis: u64,
}

/// One measurement as its client prints it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Exchanges per second.
    pub rate: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub count: usize,
    /// Exchanges that took so long that a packet must have been lost.
    pub slow: usize,
    /// Exchanges that came to nothing.
    pub failed: usize,
}

/// Serves both ports on every address. The server closes first, so that waiting ports stay with it: kept by the client, those of
/// one measurement would be missing in the next to the same address, which by eBPF is the same one with and without a Service.
pub fn serve(address: IpAddr) -> Result<()> {
    let listen = |port| TcpListener::bind((address, port)).with_context(|| format!("listen on {address}:{port}"));
    let (short, long) = (listen(SHORT_PORT)?, listen(LONG_PORT)?);
    std::thread::spawn(move || {
        for stream in long.incoming().flatten() {
            std::thread::spawn(move || echo(stream));
        }
    });
    // No thread per connection: what is measured is the way there, not the scheduler.
    for stream in short.incoming() {
        let Ok(mut stream) = stream else { continue };
        let mut byte = [0];
        let _ = stream.set_nodelay(true);
        let _ = stream.set_read_timeout(Some(PATIENCE));
        if stream.read(&mut byte).is_ok_and(|count| count == 1) {
            let _ = stream.write_all(&byte);
        }
    }
    Ok(())
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

pub fn connect_request_response(load: &Load) -> Result<()> {
    measure(load, || {
        let mut stream = connect(load.to)?;
        exchange(&mut stream)?;
        ensure!(stream.read(&mut [0])? == 0, "more than one answer");
        Ok(())
    })
}

pub fn request_response(load: &Load) -> Result<()> {
    let mut stream = connect(load.to)?;
    measure(load, move || Ok(exchange(&mut stream)?))
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("connect to {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut byte = *b"x";
    stream.write_all(&byte)?;
    stream
        .read_exact(&mut byte)
        .map_err(|error| if error.kind() == ErrorKind::UnexpectedEof { ErrorKind::ConnectionReset.into() } else { error })
}

fn measure(load: &Load, mut once: impl FnMut() -> Result<()>) -> Result<()> {
    // Neighbours, routes, caches and maps are warm when it begins. The first exchange has to work.
    once()?;
    for _ in 0..50 {
        let _ = once();
    }
    let (started, limit) = (Instant::now(), Duration::from_millis(load.millis));
    let mut times = Vec::with_capacity(1 << 16);
    let mut failed = 0;
    while started.elapsed() < limit {
        let begin = Instant::now();
        match once() {
            Ok(()) => times.push(begin.elapsed()),
            Err(_) => failed += 1,
        }
    }
    let rate = times.len() as f64 / started.elapsed().as_secs_f64();
    ensure!(!times.is_empty(), "no exchange within {} ms", load.millis);
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e6;
    let slow = times.iter().filter(|time| **time > SLOW).count();
    println!("{}", serde_json::to_string(&Outcome { rate, p50_us: at(50), p99_us: at(99), count: times.len(), slow, failed })?);
    Ok(())
}

#[derive(clap::Args)]
pub struct Hold {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long, default_value_t = 50)]
    connections: usize,
}

/// Keeps connections busy until its input ends; tells when it began, and then how many of them were lost, and the longest that one
/// had to wait for an answer.
pub fn hold(options: &Hold) -> Result<()> {
    let mut streams = (0..options.connections).map(|_| connect(options.to)).collect::<Result<Vec<_>>>()?;
    static OVER: AtomicBool = AtomicBool::new(false);
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        OVER.store(true, Ordering::Relaxed);
    });
    println!("ready");
    let (mut lost, mut exchanges, mut longest) = (0_usize, 0_u64, Duration::ZERO);
    while !OVER.load(Ordering::Relaxed) && !streams.is_empty() {
        let before = streams.len();
        streams.retain_mut(|stream| {
            let begin = Instant::now();
            let kept = exchange(stream).is_ok();
            longest = longest.max(begin.elapsed());
            exchanges += 1;
            kept
        });
        lost += before - streams.len();
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("{}", json!({"lost": lost, "exchanges": exchanges, "longest_ms": longest.as_secs_f64() * 1e3}));
    Ok(())
}

#[derive(clap::Args)]
pub struct Wait {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long, default_value_t = 30)]
    seconds: u64,
}

/// One connection that asks again and again; ends when that ends, and says how long after the first unanswered request.
pub fn until_freed(options: &Wait) -> Result<()> {
    let mut stream = connect(options.to)?;
    stream.set_read_timeout(Some(Duration::from_secs(options.seconds)))?;
    exchange(&mut stream)?;
    println!("{}", json!({"peer": stream.peer_addr()?.to_string()}));
    loop {
        let begin = Instant::now();
        if let Err(error) = exchange(&mut stream) {
            let freed = !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            let _ = stream.shutdown(Shutdown::Both);
            println!("{}", json!({"freed": freed, "ms": begin.elapsed().as_secs_f64() * 1e3, "error": error.to_string()}));
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
