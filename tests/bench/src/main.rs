//! The benches' own traffic: a server, and a client that counts requests over new connections or over one.
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use serde_json::json;

#[derive(Parser)]
#[command(name = "outrigger-bench", about = "Server and client of `cargo xtask bench`")]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Answer every byte with a byte
    Serve {
        #[arg(long, default_value = "0.0.0.0:7000")]
        listen: SocketAddr,
    },
    /// Connect, ask, get the answer, close; over and over
    ConnectRequestResponse(Load),
    /// Ask and get the answer over one connection, over and over
    RequestResponse(Load),
}

#[derive(clap::Args)]
struct Load {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long, default_value_t = 3)]
    seconds: u64,
}

fn main() -> Result<()> {
    match Cli::parse().role {
        Role::Serve { listen } => serve(listen),
        Role::ConnectRequestResponse(load) => measure(&load, || last_exchange(&mut connect(load.to)?)),
        Role::RequestResponse(load) => {
            let mut stream = connect(load.to)?;
            measure(&load, move || exchange(&mut stream, b'x'))
        }
    }
}

fn serve(listen: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("listen on {listen}"))?;
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        std::thread::spawn(move || -> std::io::Result<()> {
            stream.set_nodelay(true)?;
            let mut byte = [0];
            while stream.read(&mut byte)? == 1 {
                stream.write_all(&byte)?;
                if byte[0] == LAST {
                    break;
                }
            }
            Ok(())
        });
    }
    Ok(())
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).with_context(|| format!("connect to {to}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The request after which the server closes. It closes first so that TIME_WAIT stays with it: kept by the client, the waiting
/// ports of one measurement would be missing in the next one that goes to the same address, which is every one by eBPF.
const LAST: u8 = b'l';

fn last_exchange(stream: &mut TcpStream) -> Result<()> {
    exchange(stream, LAST)?;
    ensure!(stream.read(&mut [0])? == 0, "more than one answer");
    Ok(())
}

fn exchange(stream: &mut TcpStream, request: u8) -> Result<()> {
    let mut byte = [request];
    stream.write_all(&byte)?;
    stream
        .read_exact(&mut byte)
        .map_err(|error| if error.kind() == ErrorKind::UnexpectedEof { ErrorKind::ConnectionReset.into() } else { error })?;
    Ok(())
}

fn measure(load: &Load, mut once: impl FnMut() -> Result<()>) -> Result<()> {
    for _ in 0..50 {
        once()?;
    }
    let (started, limit) = (Instant::now(), Duration::from_secs(load.seconds));
    let mut times = Vec::with_capacity(1 << 20);
    while started.elapsed() < limit {
        let begin = Instant::now();
        once()?;
        times.push(begin.elapsed());
    }
    ensure!(!times.is_empty(), "no exchange within {} s", load.seconds);
    let rate = times.len() as f64 / started.elapsed().as_secs_f64();
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e6;
    println!("{}", json!({"rate": rate, "p50_us": at(50), "p99_us": at(99), "count": times.len()}));
    Ok(())
}
