//! `cargo xtask bench dataplane`: what a Service costs against going to the pod directly, in each proxy mode.
//!
//! One lab of two nodes per mode, all up at once; every round measures every mode, direct and through the ClusterIP,
//! one after the other, so that whatever else the machine does meets all of them. Figures are ratios to direct.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::images::{self, PATH, Recipe, base, link_applets, unpack_closure};
use crate::kubectl::Kubectl;
use crate::progress::{step, wait};
use crate::{down, paths, tools, up};

const IMAGE: &str = "outrigger.dev/bench:1";

#[derive(clap::Args)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Requests over new connections, requests over one, and throughput: to a pod and through its Service
    Dataplane {
        /// How often every measurement is taken; the median counts
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// How long one measurement takes
        #[arg(long, default_value_t = 2)]
        seconds: u64,
        #[arg(long, value_delimiter = ',', default_value = "ebpf,nftables,userspace")]
        modes: Vec<String>,
    },
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

pub fn run(options: &Options) -> Result<()> {
    match &options.what {
        What::Dataplane { rounds, seconds, modes } => dataplane(*rounds, *seconds, modes),
        What::Pods { count, parallel } => pods(*count, *parallel),
    }
}

/// One node, so that the reference runs on the same runtime.
fn pods(count: usize, parallel: usize) -> Result<()> {
    const NAME: &str = "bench-pods";
    build_client()?;
    let cluster = up::start(&up::Options {
        nodes: 1,
        name: NAME.into(),
        proxy_mode: "auto".into(),
        api_port: None,
        no_demo: true,
        profile: "release".into(),
    })?;
    let output = Command::new(paths::target().join("release/pods"))
        .arg("--kubeconfig")
        .arg(cluster.kubeconfig())
        .args(["--runtime-endpoint", &format!("unix://{}", cluster.containerd_socket(0).display())])
        .args(["--cgroup-parent", &format!("/{}/bench", cluster.cgroup(&Cluster::node_name(0)))])
        .args(["--image", images::demo::BUSYBOX, "--count", &count.to_string(), "--parallel", &parallel.to_string()])
        .output()
        .context("run the bench's client");
    down::run(&down::Options { name: NAME.into() })?;
    let output = output?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    report("pods.md", &String::from_utf8_lossy(&output.stdout))
}

fn report(file: &str, table: &str) -> Result<()> {
    let report = paths::target().join("bench");
    fs::create_dir_all(&report)?;
    fs::write(report.join(file), table)?;
    println!("{table}");
    Ok(())
}

fn dataplane(rounds: usize, seconds: u64, modes: &[String]) -> Result<()> {
    tools::install(&[("iperf3", "iperf3")])?;
    let image = image()?;
    let mut labs = Vec::new();
    let result = (|| {
        for mode in modes {
            labs.push(Bed::start(mode, &image)?);
        }
        measure(&labs, rounds, seconds)
    })();
    for mode in modes {
        down::run(&down::Options { name: lab_name(mode) })?;
    }
    report("dataplane.md", &render(&result?))
}

fn lab_name(mode: &str) -> String {
    format!("bench-{mode}")
}

fn build_client() -> Result<()> {
    step("build the bench's client", |_| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        tools::run(cargo.current_dir(paths::workspace()).args(["build", "--release", "--package", "outrigger-bench"]))
    })
}

fn image() -> Result<std::path::PathBuf> {
    build_client()?;
    // The client changes with the checkout, so the cache's copy is never taken.
    let _ = fs::remove_file(images::file("bench"));
    let config = json!({"Cmd": ["/outrigger-bench", "serve"], "Env": [PATH]});
    images::build(&[Recipe { file: "bench", names: vec![IMAGE.into()], config, fill }]).map(|mut files| files.remove(0))
}

fn fill(root: &Path) -> Result<()> {
    unpack_closure(root, &["iperf3", "libgcc-s1", "busybox-static"])?;
    base(root)?;
    link_applets(root)?;
    fs::copy(paths::target().join("release/outrigger-bench"), root.join("outrigger-bench")).context("copy the bench's client")?;
    Ok(())
}

/// A lab in one mode with a server on one node and a client on the other.
struct Bed {
    mode: String,
    kubectl: Kubectl,
    pod: String,
    service: String,
}

impl Bed {
    fn start(mode: &str, image: &Path) -> Result<Self> {
        down::run(&down::Options { name: lab_name(mode) })?;
        let cluster = up::start(&up::Options {
            nodes: 2,
            name: lab_name(mode),
            proxy_mode: mode.into(),
            api_port: None,
            no_demo: true,
            profile: "release".into(),
        })?;
        step("import the bench's image", |bar| up::import(&cluster, &[image.to_owned()], bar))?;
        let kubectl = Kubectl::new(tools::kubectl()?, &cluster.kubeconfig());
        kubectl.apply(&manifest())?;
        step(&format!("wait for the bench's pods ({mode})"), |bar| {
            wait(bar, Duration::from_secs(90), || {
                kubectl.run(&["wait", "pod", "--all", "--for=condition=Ready", "--timeout=5s"]).map(drop).map_err(|error| error.to_string())
            })
        })?;
        let text = |words: &[&str], pointer: &str| -> Result<String> {
            let object = kubectl.json(words)?;
            Ok(object.pointer(pointer).and_then(Value::as_str).with_context(|| format!("{words:?} has no {pointer}"))?.to_owned())
        };
        let pod = text(&["get", "pod", "server"], "/status/podIP")?;
        let service = text(&["get", "service", "server"], "/spec/clusterIP")?;
        let bed = Self { mode: mode.into(), kubectl, pod, service };
        step("wait for the Service", |bar| {
            wait(bar, Duration::from_secs(30), || {
                bed.requests("connect-request-response", &bed.service, 1).map(drop).map_err(|error| error.to_string())
            })
        })?;
        Ok(bed)
    }

    fn requests(&self, how: &str, to: &str, seconds: u64) -> Result<f64> {
        let (to, seconds) = (format!("{to}:7000"), seconds.to_string());
        let answer = self.kubectl.run(&["exec", "client", "--", "/outrigger-bench", how, "--to", &to, "--seconds", &seconds])?;
        serde_json::from_str::<Value>(&answer)?["rate"].as_f64().context("the client gave no rate")
    }

    fn throughput(&self, to: &str, seconds: u64) -> Result<f64> {
        let seconds = seconds.to_string();
        let answer = self.kubectl.run(&["exec", "client", "--", "iperf3", "--json", "--client", to, "--time", &seconds])?;
        let report: Value = serde_json::from_str(&answer).context("parse iperf3's report")?;
        report.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64).context("iperf3 gave no rate")
    }
}

fn manifest() -> String {
    let pod = |name: &str, node: &str, command: &str| {
        format!(
            r#"apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: main, image: "{IMAGE}", command: ["sh", "-c", "{command}"]}}
---
"#
        )
    };
    let server = pod("server", &Cluster::node_name(0), "iperf3 --server --port 5201 & exec /outrigger-bench serve");
    let client = pod("client", &Cluster::node_name(1), "exec sleep 86400");
    format!(
        "{server}{client}apiVersion: v1\nkind: Service\nmetadata: {{name: server}}\nspec:\n  selector: {{app: server}}\n  ports:\n  - {{name: requests, port: 7000}}\n  - {{name: iperf, port: 5201}}\n"
    )
}

const MEASURES: [&str; 3] = ["connect-request-response, 1/s", "request-response, 1/s", "throughput, Gbit/s"];

/// mode -> measure -> (direct, through the Service), one entry a round.
type Figures = BTreeMap<String, [Vec<(f64, f64)>; 3]>;

fn measure(beds: &[Bed], rounds: usize, seconds: u64) -> Result<Figures> {
    let mut figures = Figures::new();
    for round in 1..=rounds {
        step(&format!("round {round} of {rounds}"), |bar| {
            for bed in beds {
                bar.set_message(bed.mode.clone());
                let all = figures.entry(bed.mode.clone()).or_default();
                for (index, how) in ["connect-request-response", "request-response"].into_iter().enumerate() {
                    all[index].push((bed.requests(how, &bed.pod, seconds)?, bed.requests(how, &bed.service, seconds)?));
                }
                let gigabits = |to: &str| bed.throughput(to, seconds).map(|bits| bits / 1e9);
                all[2].push((gigabits(&bed.pod)?, gigabits(&bed.service)?));
            }
            Ok(())
        })?;
    }
    Ok(figures)
}

fn render(figures: &Figures) -> String {
    let mut table =
        String::from("| mode | measure | direct | through the Service | ratio | lowest | highest |\n|---|---|---|---|---|---|---|\n");
    for (mode, measures) in figures {
        for (measure, rounds) in MEASURES.iter().zip(measures) {
            let ratios = sorted(rounds.iter().map(|(direct, service)| service / direct));
            let (direct, service) = (sorted(rounds.iter().map(|round| round.0)), sorted(rounds.iter().map(|round| round.1)));
            let _ = writeln!(
                table,
                "| {mode} | {measure} | {:.1} | {:.1} | {:.3} | {:.3} | {:.3} |",
                median(&direct),
                median(&service),
                median(&ratios),
                ratios.first().copied().unwrap_or_default(),
                ratios.last().copied().unwrap_or_default(),
            );
        }
    }
    table
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}
