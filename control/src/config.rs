//! The command line.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser};
use ipnet::IpNet;

#[derive(Parser)]
#[command(name = "outrigger-control", version, about = "Outrigger's control plane in one process")]
pub enum Command {
    /// Serves the API and runs the controllers and the scheduler.
    Run(Run),
    /// Writes a kubeconfig for a user, signed by the cluster's CA.
    Kubeconfig(Kubeconfig),
}

#[derive(Args)]
pub struct Run {
    /// Where certificates and the store are kept.
    #[arg(long)]
    pub data_dir: PathBuf,
    /// The address to listen on; sockets passed by LISTEN_FDS are served too.
    #[arg(long, default_value = "0.0.0.0")]
    pub bind_address: IpAddr,
    /// Port 0 opens no socket: only those passed by LISTEN_FDS are served.
    #[arg(long, default_value_t = 6443)]
    pub secure_port: u16,
    /// Where the `kubernetes` Service leads; the bind address if that is a specific one.
    #[arg(long)]
    pub advertise_address: Option<IpAddr>,
    #[arg(long, default_value = "10.96.0.0/12", value_delimiter = ',')]
    pub service_cluster_ip_range: Vec<IpNet>,
    #[arg(long, default_value = "10.244.0.0/16")]
    pub cluster_cidr: IpNet,
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Further names and addresses of the server's certificate.
    #[arg(long)]
    pub tls_san: Vec<String>,
}

#[derive(Args)]
pub struct Kubeconfig {
    #[arg(long)]
    pub data_dir: PathBuf,
    #[arg(long)]
    pub user: String,
    #[arg(long)]
    pub group: Vec<String>,
    #[arg(long)]
    pub server: String,
    #[arg(long)]
    pub output: PathBuf,
}
