//! `outrigger-node`: everything that a node needs beside its container runtime, in one process.
mod app;
mod config;
mod forward;
mod local;
mod policy;
mod proxy;
mod roles;

use std::path::Path;

use anyhow::Result;
use clap::Parser;

fn main() -> Result<()> {
    // The runtime calls the pod network's plugins by these names: no flags, and as little start-up as possible.
    let called_as = std::env::args_os().next().unwrap_or_default();
    if outrigger_network::cni::is_plugin(Path::new(&called_as)) {
        std::process::exit(outrigger_network::cni_main());
    }
    let options = match config::Command::parse() {
        config::Command::Run(options) => options,
        config::Command::Status(socket) => return local::status(&socket),
        config::Command::Mode(options) => return local::mode(&options),
        config::Command::Services(options) => return local::services(&options),
        config::Command::Trace(options) => return local::trace(&options),
        config::Command::Monitor(options) => return local::monitor(&options),
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    // Only one provider is built in; a second installation can't happen this early.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().thread_name("agent").build()?;
    runtime.block_on(app::run(*options))
}
