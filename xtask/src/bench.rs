//! `cargo xtask bench`: builds what is measured, in release, and the references; the measuring itself is `tests/bench`.
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cluster::Cluster;
use crate::progress::step;
use crate::tools::Upstream;
use crate::{build_ebpf, down, images, paths, tools, up};

#[derive(clap::Args)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Requests over new connections, requests over one, and throughput; how fast the kernel follows; what connections live through
    Dataplane(Dataplane),
    /// From creating a pod to seeing it Running, beside what the runtime alone takes for it
    Pods {
        /// Pods one after another; the median counts
        #[arg(long, default_value_t = 20)]
        count: usize,
        /// Pods at once, after that
        #[arg(long, default_value_t = 10)]
        parallel: usize,
    },
}

#[derive(clap::Args)]
struct Dataplane {
    /// How many Services there are, one run after the other
    #[arg(long, value_delimiter = ',', default_value = "10,1000")]
    services: Vec<u32>,
    /// How often every measurement is taken; the median counts
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(5..))]
    rounds: u32,
    /// How long one measurement of requests takes
    #[arg(long, default_value_t = 300)]
    millis: u64,
    #[arg(long, value_delimiter = ',', default_value = "direct,ebpf,nftables,userspace,kube-proxy-nftables,kube-proxy-iptables")]
    contenders: Vec<String>,
    /// How often the agent is killed under load
    #[arg(long, default_value_t = 20)]
    restarts: usize,
    /// How often the mode is switched under load
    #[arg(long, default_value_t = 9)]
    switches: usize,
    /// Leave out how fast the kernel is programmed
    #[arg(long)]
    no_programming: bool,
    /// Measure nothing but how fast the kernel is programmed
    #[arg(long, conflicts_with = "no_programming")]
    only_programming: bool,
    /// Where the report goes (default: target/bench)
    #[arg(long)]
    report: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<()> {
    match &options.what {
        What::Dataplane(options) => dataplane(options),
        What::Pods { count, parallel } => pods(*count, *parallel),
    }
}

/// What a Service costs against going to the pod directly, by Outrigger's three ways and by upstream's kube-proxy, in one run.
fn dataplane(options: &Dataplane) -> Result<()> {
    let binaries = paths::target().join("release");
    let report = options.report.clone().unwrap_or_else(|| paths::target().join("bench"));
    if options.only_programming {
        tools::install(&[("iperf3", "iperf3")])?;
        build_ebpf::run()?;
        build(&["outrigger-bench"])?;
        tools::show(Command::new(binaries.join("outrigger-bench")).arg("programming").arg("--report").arg(&report))?;
        println!("{}", fs::read_to_string(report.join("dataplane.md"))?);
        return Ok(());
    }
    tools::install_runtime()?;
    tools::install(&[("iperf3", "iperf3"), ("iptables", "iptables")])?;
    let kube_proxy = Upstream::KubeProxy.get()?;
    build_ebpf::run()?;
    build(&["outrigger-control", "outrigger-node", "outrigger-bench"])?;
    let mut bench = Command::new(binaries.join("outrigger-bench"));
    bench.arg("dataplane").arg("--binaries").arg(&binaries).arg("--kube-proxy").arg(kube_proxy).arg("--report").arg(&report);
    let list = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    for (flag, value) in [
        ("--services", list(&options.services)),
        ("--rounds", options.rounds.to_string()),
        ("--millis", options.millis.to_string()),
        ("--contenders", options.contenders.join(",")),
        ("--restarts", options.restarts.to_string()),
        ("--switches", options.switches.to_string()),
    ] {
        bench.args([flag, &value]);
    }
    if options.no_programming {
        bench.arg("--no-programming");
    }
    tools::show(&mut bench)?;
    println!("{}", fs::read_to_string(report.join("dataplane.md"))?);
    println!("The report and its picture are in {}.", report.display());
    Ok(())
}

fn build(packages: &[&str]) -> Result<()> {
    step("build what is measured (release)", |_| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(paths::workspace()).args(["build", "--release"]);
        tools::run(cargo.args(packages.iter().flat_map(|package| ["--package", *package])))
    })
}

/// One node, so that the reference runs on the same runtime.
fn pods(count: usize, parallel: usize) -> Result<()> {
    const NAME: &str = "bench-pods";
    build(&["outrigger-bench"])?;
    let started = up::start(&up::Options {
        nodes: 1,
        name: NAME.into(),
        proxy_mode: "auto".into(),
        api_port: None,
        no_demo: true,
        profile: "release".into(),
    });
    let output = started.and_then(|cluster| {
        Command::new(paths::target().join("release/pods"))
            .arg("--kubeconfig")
            .arg(cluster.kubeconfig())
            .args(["--runtime-endpoint", &format!("unix://{}", cluster.containerd_socket(0).display())])
            .args(["--cgroup-parent", &format!("/{}/bench", cluster.cgroup(&Cluster::node_name(0)))])
            .args(["--image", images::demo::BUSYBOX, "--count", &count.to_string(), "--parallel", &parallel.to_string()])
            .output()
            .context("run the bench's client")
    });
    down::run(&down::Options { name: NAME.into() })?;
    let output = output?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (report, table) = (paths::target().join("bench"), String::from_utf8_lossy(&output.stdout));
    fs::create_dir_all(&report)?;
    fs::write(report.join("pods.md"), &*table)?;
    println!("{table}");
    Ok(())
}
