//! The control plane in one process.

mod addons;
mod app;
mod config;
mod loops;

use clap::Parser;

fn main() -> anyhow::Result<()> {
    let command = config::Command::parse();
    // Only one provider is built in; a second installation can't happen this early.
    let _ = rustls::crypto::ring::default_provider().install_default();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .init();
    match command {
        config::Command::Run(options) => {
            tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("control").build()?.block_on(app::run(options))
        }
        config::Command::Kubeconfig(options) => app::kubeconfig(options),
    }
}
