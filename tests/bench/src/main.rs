//! The benches: `cargo xtask bench` builds this program and everything that it measures, and runs it.
mod api;
mod bed;
mod contender;
mod dataplane;
mod endure;
mod load;
mod program;
mod report;
mod rounds;

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "outrigger-bench", about = "Server, clients and course of `cargo xtask bench`")]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Answer every byte with a byte
    Serve {
        #[arg(long, default_value = "0.0.0.0")]
        address: IpAddr,
    },
    /// Connect, ask, get the answer, see the end; over and over
    ConnectRequestResponse(load::Load),
    /// Ask and get the answer over one connection, over and over
    RequestResponse(load::Load),
    /// Keep connections busy until the input ends, and count those that were lost
    Hold(load::Hold),
    /// Ask over one connection until it ends, and say how long the last request waited
    UntilFreed(load::Wait),
    /// Bring Services to this namespace's kernel, and say how long it took
    Program(program::Program),
    /// Measure how fast the kernel follows, alone
    Programming {
        #[arg(long)]
        report: PathBuf,
    },
    /// Measure the Service path against kube-proxy
    Dataplane(dataplane::Dataplane),
}

fn main() -> Result<()> {
    // Only one provider is built in; a second installation can't happen this early.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match Cli::parse().role {
        Role::Serve { address } => load::serve(address),
        Role::ConnectRequestResponse(load) => load::connect_request_response(&load),
        Role::RequestResponse(load) => load::request_response(&load),
        Role::Hold(hold) => load::hold(&hold),
        Role::UntilFreed(wait) => load::until_freed(&wait),
        Role::Program(program) => program::run(&program),
        Role::Programming { report } => program::report(&report),
        Role::Dataplane(options) => dataplane::run(&options),
    }
}
