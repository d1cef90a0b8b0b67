//! `cargo xtask up`: from a fresh machine to a cluster that answers.
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use outrigger_lab::{Lab, Running, check_name, netns};
use serde_json::Value;

use crate::cluster::{CLUSTER_DNS, CLUSTER_DOMAIN, Cluster};
use crate::kubectl::Kubectl;
use crate::progress::{step, wait, wait_while};
use crate::{build_ebpf, demo, images, paths, tools};

#[derive(clap::Args, Clone)]
pub struct Options {
    /// How many nodes the cluster gets
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub nodes: u8,
    /// The cluster's name
    #[arg(long, default_value = "outrigger")]
    pub name: String,
    /// How Services are carried: auto takes the best that the kernel can do
    #[arg(long, default_value = "auto", value_parser = ["auto", "ebpf", "nftables", "userspace"])]
    pub proxy_mode: String,
    /// The API server's port on 127.0.0.1 (the first free one from 6443 when not given)
    #[arg(long)]
    pub api_port: Option<u16>,
    /// Leave the demo out
    #[arg(long)]
    pub no_demo: bool,
    /// Cargo's profile to build with
    #[arg(long, default_value = "release")]
    pub profile: String,
}

pub fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    ensure!(nix::unistd::geteuid().is_root(), "the lab makes namespaces, mounts and cgroups: run this as root");
    let cluster = start(options)?;
    let kubectl = Kubectl::new(tools::kubectl()?, &cluster.kubeconfig());
    if !options.no_demo {
        run_demo(&kubectl)?;
    }
    summary(&cluster, &kubectl, options, started.elapsed())
}

/// Brings a cluster up to Ready nodes and an answering DNS. What a failed start has made stays for a look.
pub fn start(options: &Options) -> Result<Cluster> {
    check_name(&options.name)?;
    tools::install_runtime()?;
    let kubectl = tools::kubectl()?;
    build_ebpf::run()?;
    let binaries = build(&options.profile)?;
    let images = images::build(&images::demo::recipes())?;
    let directory = paths::lab(&options.name);
    if Running::is_there(&directory) {
        anyhow::bail!("the cluster {0} runs already: use it, or `cargo xtask down --name {0}` first", options.name);
    }
    Lab::destroy(&options.name, &directory)?;
    let cluster = Cluster {
        name: options.name.clone(),
        nodes: options.nodes,
        proxy_mode: options.proxy_mode.clone(),
        api_port: options.api_port.map_or_else(|| free_port(6443), Ok)?,
        demo_port: free_port(8080)?,
    };
    let result = bring_up(&cluster, &binaries, &images, &Kubectl::new(kubectl, &cluster.kubeconfig()));
    if result.is_err() {
        eprintln!("The start failed. What the parts said is in {0}/lab.log and {0}/hosts/*/log;", directory.display());
        eprintln!("`cargo xtask down --name {}` takes everything away.", cluster.name);
    }
    result.map(|()| cluster)
}

fn build(profile: &str) -> Result<PathBuf> {
    step(&format!("build outrigger-control and outrigger-node ({profile})"), |bar| {
        bar.set_message("cargo build");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(paths::workspace()).args(["build", "--profile", profile, "-p", "outrigger-control", "-p", "outrigger-node"]);
        tools::run(&mut cargo)?;
        Ok(paths::target().join(if profile == "dev" { "debug" } else { profile }))
    })
}

fn free_port(first: u16) -> Result<u16> {
    (first..first + 100)
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .with_context(|| format!("no free port on 127.0.0.1 from {first} to {}", first + 99))
}

fn bring_up(cluster: &Cluster, binaries: &Path, images: &[PathBuf], kubectl: &Kubectl) -> Result<()> {
    let directory = cluster.directory();
    fs::create_dir_all(directory.join("bin")).with_context(|| format!("create {}", directory.display()))?;
    for program in ["outrigger-control", "outrigger-node"] {
        fs::copy(binaries.join(program), directory.join("bin").join(program)).with_context(|| format!("install {program}"))?;
    }
    fs::write(directory.join("cluster.json"), serde_json::to_vec_pretty(cluster)?)?;
    let log = File::create(directory.join("lab.log"))?;
    // The lab outlives this command, so it runs from a copy that a later build can't replace, in a session of its own.
    let xtask = directory.join("bin/xtask");
    fs::copy(std::env::current_exe()?, &xtask)?;
    let mut lab = Command::new("setsid");
    lab.arg(xtask).args(["lab", "serve", &cluster.name]).current_dir("/");
    lab.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).env_remove("CARGO_TARGET_DIR");
    let mut lab = lab.spawn().context("start the lab")?;
    step("start the control plane", |bar| {
        let alive = || match lab.try_wait() {
            Ok(Some(status)) => anyhow::bail!("the lab ended ({status}): see {}/lab.log", directory.display()),
            _ => Ok(()),
        };
        let ready = || kubectl.run(&["get", "--raw", "/readyz"]).map(drop).map_err(|error| last_line(&error));
        wait_while(bar, Duration::from_secs(60), alive, ready)
    })?;
    step("import images", |bar| import(cluster, images, bar))?;
    step(&format!("wait for {} node(s)", cluster.nodes), |bar| {
        wait(bar, Duration::from_secs(120), || nodes_ready(kubectl, cluster.nodes))
    })?;
    step("wait for DNS", |bar| wait(bar, Duration::from_secs(60), || dns_answers(cluster)))
}

fn last_line(error: &anyhow::Error) -> String {
    error.to_string().lines().last().unwrap_or_default().to_owned()
}

/// Imports the images into every node's containerd.
pub fn import(cluster: &Cluster, images: &[PathBuf], bar: &ProgressBar) -> Result<()> {
    for index in 0..cluster.nodes {
        let socket = cluster.containerd_socket(index);
        wait(bar, Duration::from_secs(30), || if socket.exists() { Ok(()) } else { Err(format!("no {}", socket.display())) })?;
        for image in images {
            let mut ctr = Command::new("ctr");
            ctr.arg("--address").arg(&socket).args(["--namespace", "k8s.io", "images", "import"]).arg(image);
            tools::run(&mut ctr)?;
        }
    }
    Ok(())
}

fn nodes_ready(kubectl: &Kubectl, expected: u8) -> Result<(), String> {
    let nodes = kubectl.json(&["get", "nodes"]).map_err(|error| last_line(&error))?;
    let ready = |node: &&Value| {
        let conditions = node["status"]["conditions"].as_array();
        conditions.is_some_and(|all| all.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True"))
    };
    let count = nodes["items"].as_array().map_or(0, |items| items.iter().filter(ready).count());
    if count >= usize::from(expected) { Ok(()) } else { Err(format!("{count} of {expected} nodes are Ready")) }
}

/// Asks the cluster's DNS, from the first node, for the API server's name.
fn dns_answers(cluster: &Cluster) -> Result<(), String> {
    let running = Running::read(&cluster.directory()).map_err(|error| error.to_string())?;
    let host = running.host(&Cluster::node_name(0)).map_err(|error| error.to_string())?;
    let answer = netns::within(&host.net_namespace(), || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        socket.send_to(&dns_query(&format!("kubernetes.default.svc.{CLUSTER_DOMAIN}")), SocketAddr::from((CLUSTER_DNS, 53)))?;
        let mut answer = [0; 512];
        let length = socket.recv(&mut answer)?;
        Ok(answer[..length].to_vec())
    });
    let answer = answer.map_err(|error| format!("DNS at {CLUSTER_DNS}: {error:#}"))?;
    // RFC 1035, 4.1.1: RCODE in the fourth byte's low half, ANCOUNT in the seventh and eighth.
    let good = answer.len() > 12 && answer[3] & 0xf == 0 && answer[6..8] != [0, 0];
    if good { Ok(()) } else { Err("DNS answers, but does not know the API server yet".into()) }
}

/// A query for a name's A records (RFC 1035, 4.1).
fn dns_query(name: &str) -> Vec<u8> {
    let mut query = vec![0x4f, 0x52, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len()).unwrap_or_default());
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    query
}

fn run_demo(kubectl: &Kubectl) -> Result<()> {
    kubectl.apply(&demo::manifest()).context("apply the demo")?;
    step("run the demo", |bar| {
        wait(bar, Duration::from_secs(180), || {
            let job = kubectl.json(&["get", "job", "client", "-n", demo::NAMESPACE]).map_err(|error| last_line(&error))?;
            if job["status"]["succeeded"].as_u64() == Some(1) { Ok(()) } else { Err("the client has no answer yet".into()) }
        })
    })?;
    let answer = kubectl.run(&["logs", "job/client", "-n", demo::NAMESPACE])?;
    println!("    hello.{}.svc.{CLUSTER_DOMAIN} answered: {}", demo::NAMESPACE, answer.lines().last().unwrap_or_default());
    Ok(())
}

fn summary(cluster: &Cluster, kubectl: &Kubectl, options: &Options, took: Duration) -> Result<()> {
    let nodes = kubectl.json(&["get", "nodes"])?;
    println!(
        "\nThe cluster {} is up after {:.1} s: {} node(s), Kubernetes {}.",
        cluster.name,
        took.as_secs_f64(),
        cluster.nodes,
        tools::UPSTREAM
    );
    for node in nodes["items"].as_array().into_iter().flatten() {
        let annotations = &node["metadata"]["annotations"];
        let text = |key: &str| annotations[key].as_str().unwrap_or("?").to_owned();
        println!(
            "  {}  {}  Services by {} ({})",
            node["metadata"]["name"].as_str().unwrap_or_default(),
            node["status"]["addresses"][0]["address"].as_str().unwrap_or_default(),
            text("outrigger.dev/proxy-mode"),
            text("outrigger.dev/proxy-mode-reason"),
        );
    }
    println!("  kubeconfig: {}", cluster.kubeconfig().display());
    println!("  kubectl:    {}", tools::kubectl()?.display());
    println!("\nTry:");
    println!(
        "  export KUBECONFIG={} PATH={}:$PATH",
        cluster.kubeconfig().display(),
        tools::kubectl()?.parent().unwrap_or(Path::new("")).display()
    );
    println!("  kubectl get pods --all-namespaces --output wide");
    if !options.no_demo {
        println!("  curl http://127.0.0.1:{}/", cluster.demo_port);
    }
    println!("  cargo xtask down{}", if cluster.name == "outrigger" { String::new() } else { format!(" --name {}", cluster.name) });
    Ok(())
}
