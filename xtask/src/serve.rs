//! `cargo xtask lab …`: the lab's first process, and ways into a running lab.
use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Subcommand;
use nix::sys::signal::{SigSet, Signal};
use outrigger_lab::{Lab as Hosts, LabSpec, Running, host, init, netns};

use crate::cluster::{Cluster, SECURE_PORT};
use crate::{demo, paths, tools};

#[derive(Subcommand)]
pub enum Lab {
    /// Run a command in a host of the lab, in all of its namespaces
    Exec {
        /// The cluster's name
        #[arg(long, default_value = "outrigger")]
        name: String,
        /// The host: node-1, node-2, …, or outside
        host: String,
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// List the hosts of a lab
    Hosts {
        #[arg(long, default_value = "outrigger")]
        name: String,
    },
    /// The lab's first process; started by `up`
    #[command(hide = true)]
    Serve { name: String },
    #[command(hide = true)]
    Host { spec: String },
    #[command(hide = true)]
    Init { spec: String },
}

pub fn run(command: Lab) -> Result<()> {
    match command {
        Lab::Exec { name, host, command } => exec(&name, &host, &command),
        Lab::Hosts { name } => {
            for host in Running::read(&paths::lab(&name))?.hosts {
                println!("{:<10} {:<12} pid {}", host.name, host.address.map(|address| address.to_string()).unwrap_or_default(), host.pid);
            }
            Ok(())
        }
        Lab::Serve { name } => serve(&name),
        Lab::Host { spec } => host::outer(&spec),
        Lab::Init { spec } => init::run(&spec),
    }
}

fn exec(name: &str, host: &str, command: &[String]) -> Result<()> {
    let running = Running::read(&paths::lab(name))?;
    let status = running.host(host)?.command(&command[0]).args(&command[1..]).status().context("run nsenter (package util-linux)")?;
    std::process::exit(status.code().unwrap_or(1));
}

/// Holds the lab until it is told to end. Everything in it dies with this process.
fn serve(name: &str) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    // Before any thread is made, so that all of them have the signals blocked and wait() below gets them.
    signals.thread_block().context("block signals")?;

    let directory = paths::lab(name);
    let cluster: Cluster = serde_json::from_reader(File::open(directory.join("cluster.json")).context("open cluster.json")?)?;
    let executable = Path::new("/proc/self/exe");
    let api = listen(cluster.api_port)?;
    let demo = listen(cluster.demo_port)?;
    let mut lab = Hosts::start(executable, LabSpec { name: name.to_owned(), directory: directory.clone(), hosts: Vec::new() })?;

    let mut first = cluster.node(0, Some(&api))?;
    let rest = first.programs.split_off(1);
    // The agents need credentials that the control plane makes, so its host starts with the control plane alone
    // and the agents' programs wait for their kubeconfig.
    first.programs.extend(rest.into_iter().map(|program| after_kubeconfig(program, &cluster, 0)));
    lab.add(executable, first)?;
    lab.add(executable, cluster.outside())?;
    let outside = Running::read(&directory)?.host("outside")?.net_namespace();
    std::thread::spawn(move || forward(&demo, &outside, SocketAddr::from((Cluster::node_address(0), demo::NODE_PORT))));

    let control = directory.join("control");
    wait_for_file(&control.join("admin.kubeconfig"))?;
    kubeconfig(&cluster, "kubernetes-admin", "system:masters", &format!("https://127.0.0.1:{}", cluster.api_port), &cluster.kubeconfig())?;
    for index in 0..cluster.nodes {
        std::fs::create_dir_all(cluster.node_directory(index))?;
        let server = format!("https://{}:{SECURE_PORT}", Cluster::node_address(0));
        let user = format!("system:node:{}", Cluster::node_name(index));
        kubeconfig(&cluster, &user, "system:nodes", &server, &cluster.node_directory(index).join("kubeconfig"))?;
        if index > 0 {
            lab.add(executable, cluster.node(index, None)?)?;
        }
    }
    let signal = signals.wait().context("wait for a signal")?;
    eprintln!("{signal}: the lab ends");
    Ok(())
}

fn after_kubeconfig(mut program: outrigger_lab::Program, cluster: &Cluster, index: u8) -> outrigger_lab::Program {
    if program.name == "outrigger-node" {
        let file = cluster.node_directory(index).join("kubeconfig").display().to_string();
        let wait = "while [ ! -e \"$0\" ]; do sleep 0.05; done; exec \"$@\"";
        program.command.splice(0..0, ["/bin/sh".into(), "-c".into(), wait.into(), file]);
    }
    program
}

fn kubeconfig(cluster: &Cluster, user: &str, group: &str, server: &str, output: &Path) -> Result<()> {
    let directory = cluster.directory();
    let mut command = Command::new(directory.join("bin/outrigger-control"));
    command.args(["kubeconfig", "--user", user, "--group", group, "--server", server, "--data-dir"]).arg(directory.join("control"));
    tools::run(command.arg("--output").arg(output))
}

fn listen(port: u16) -> Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).with_context(|| format!("listen on 127.0.0.1:{port}"))
}

fn wait_for_file(path: &Path) -> Result<()> {
    for _ in 0..600 {
        if path.exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    anyhow::bail!("{} did not appear within 30 s: see the logs of outrigger-control", path.display())
}

/// Carries connections from the machine's loopback to `to`, dialled inside a namespace of the lab.
fn forward(listener: &TcpListener, namespace: &Path, to: SocketAddr) {
    for client in listener.incoming().flatten() {
        let namespace = namespace.to_owned();
        std::thread::spawn(move || {
            let server = netns::within(&namespace, || Ok(TcpStream::connect_timeout(&to, Duration::from_secs(5))?));
            let Ok(server) = server else { return };
            let (Ok(from_client), Ok(to_client)) = (client.try_clone(), server.try_clone()) else { return };
            let back = std::thread::spawn(move || pump(to_client, client));
            pump(from_client, server);
            let _ = back.join();
        });
    }
}

/// One direction of a connection, its end passed on as a half-close.
fn pump(mut from: TcpStream, mut to: TcpStream) {
    let _ = std::io::copy(&mut from.by_ref(), &mut to);
    let _ = to.shutdown(std::net::Shutdown::Write);
}
