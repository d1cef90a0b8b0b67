//! How fast the kernel follows: one endpoint changed among many Services, and all Services at once.
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use outrigger_dataplane::{Config, Proxy};
use outrigger_desired::{Change, Watched};
use outrigger_scenarios::netns::Namespace;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::api::{CLUSTER_CIDR, filler, node};
use crate::bed::{Bed, NODE_IP, Place, memory};
use crate::report::Report;

/// How often each case is measured, each time by a new process; the medians count.
const RUNS: usize = 5;
/// What it is called, mode, Services, endpoints of each, single changes that follow.
const CASES: [(&str, &str, u32, u32, u32); 5] = [
    ("ebpf, 10,000 Services x 4", "ebpf", 10_000, 4, 200),
    ("nftables, 10,000 Services x 4", "nftables", 10_000, 4, 200),
    ("ebpf, 50,000 Services x 1", "ebpf", 50_000, 1, 0),
    ("ebpf, 30,000 Services x 4", "ebpf", 30_000, 4, 0),
    ("nftables, cold start of 44,000 x 4", "nftables", 44_000, 4, 0),
];

/// Objects in memory in, the kernel brought up to them; in this process and namespace.
#[derive(clap::Args)]
pub struct Program {
    #[arg(long)]
    mode: String,
    #[arg(long)]
    services: u32,
    #[arg(long, default_value_t = 4)]
    endpoints: u32,
    /// How many single changes follow
    #[arg(long, default_value_t = 0)]
    changes: u32,
    #[arg(long)]
    cgroup: PathBuf,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Programmed {
    /// From the objects being handed over to the kernel having them.
    pub bulk_ms: f64,
    pub change_p50_ms: f64,
    pub change_p99_ms: f64,
    pub map_bytes: u64,
}

impl Programmed {
    fn median(runs: &[Self]) -> Self {
        let of = |figure: &dyn Fn(&Self) -> f64| {
            let mut all: Vec<f64> = runs.iter().map(figure).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied().unwrap_or_default()
        };
        Self {
            bulk_ms: of(&|run| run.bulk_ms),
            change_p50_ms: of(&|run| run.change_p50_ms),
            change_p99_ms: of(&|run| run.change_p99_ms),
            map_bytes: of(&|run| run.map_bytes as f64) as u64,
        }
    }
}

/// All cases, with nothing else around, written to `dataplane.md` in the folder.
pub fn report(folder: &Path) -> Result<()> {
    let directory = std::env::temp_dir().join(format!("outrigger-bench-{}", std::process::id()));
    let programmed = all(&Namespace::new()?, &directory)?;
    std::fs::remove_dir_all(&directory)?;
    std::fs::create_dir_all(folder)?;
    let report = Report { about: format!("Medians of {RUNS} runs."), programmed, ..Report::default() };
    Ok(std::fs::write(folder.join("dataplane.md"), report.markdown())?)
}

/// All cases, each in a bed of its own, linked to `hub`.
pub fn all(hub: &Namespace, directory: &Path) -> Result<Vec<(String, Programmed)>> {
    let mut all = Vec::new();
    for (number, (what, mode, services, endpoints, changes)) in (100..).zip(CASES) {
        let bed = Bed::new(&format!("program-{number}"), number, hub, directory)?;
        let mut runs = Vec::new();
        for _ in 0..RUNS {
            let mut command = bed.plain(Place::Node, std::env::current_exe()?)?;
            command.args(["program", "--mode", mode, "--services", &services.to_string(), "--endpoints", &endpoints.to_string()]);
            command.args(["--changes", &changes.to_string(), "--cgroup"]).arg(&bed.cgroup);
            let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
            ensure!(output.status.success(), "{what}: {}", output.status);
            let programmed: Programmed = serde_json::from_slice(&output.stdout).with_context(|| format!("{what}: read the figures"))?;
            eprintln!("{what}: {programmed:?}");
            runs.push(programmed);
        }
        all.push((what.into(), Programmed::median(&runs)));
    }
    Ok(all)
}

pub fn run(options: &Program) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(measure(options))?;
    println!("{}", serde_json::to_string(&result)?);
    Ok(())
}

async fn measure(options: &Program) -> Result<Programmed> {
    let instance = format!("bench-program-{}", std::process::id());
    let config = Config {
        mode: options.mode.parse()?,
        node_name: "bench".into(),
        node_ips: vec![NODE_IP.parse()?],
        cluster_cidrs: vec![CLUSTER_CIDR.parse()?],
        cgroup2_path: options.cgroup.clone(),
        pin_dir: PathBuf::from("/sys/fs/bpf/outrigger").join(&instance),
        instance,
        ..Config::default()
    };
    let (services, slices): (Vec<_>, Vec<_>) = (1..=options.services)
        .map(|number| filler(number, options.endpoints, false))
        .map(|(service, slice)| (Arc::new(service), Arc::new(slice)))
        .unzip();
    let sample = slices.last().context("no Services")?.clone();
    let (services, slices) = (Arc::new(services), Arc::new(slices));
    // The agent's mirrors hold the objects for as long as they are.
    let _mirrors = (services.clone(), slices.clone());
    let (sender, changes) = mpsc::unbounded_channel();
    let proxy = Proxy::start(config, changes).await?;
    let begin = Instant::now();
    sender.send(Change::Service(Watched::Replaced(services)))?;
    sender.send(Change::EndpointSlice(Watched::Replaced(slices)))?;
    sender.send(Change::Pod(Watched::Replaced(Arc::default())))?;
    sender.send(Change::Node(Watched::Replaced(Arc::new(vec![Arc::new(node("bench"))]))))?;
    proxy.synced().await;
    let bulk = begin.elapsed();
    let mut health = proxy.watch_health();
    let mut applied = proxy.health().applies;
    let mut times = Vec::new();
    for change in 0..options.changes {
        let mut slice = (*sample).clone();
        // One endpoint comes or goes.
        if change % 2 == 0 {
            slice.endpoints.pop();
        }
        let begin = Instant::now();
        sender.send(Change::EndpointSlice(Watched::Applied(Arc::new(slice))))?;
        let health = health.wait_for(|health| health.applies > applied || health.error.is_some()).await?.clone();
        times.push(begin.elapsed());
        ensure!(health.error.is_none(), "{:?}", health.error);
        applied = health.applies;
        // As they come in life, not as a stream.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    times.sort_unstable();
    let at = |share: usize| times.get((times.len().max(1) - 1) * share / 100).map_or(0.0, |time| time.as_secs_f64() * 1e3);
    let (_, map_bytes) = memory(std::process::id())?;
    proxy.teardown().await?;
    Ok(Programmed { bulk_ms: bulk.as_secs_f64() * 1e3, change_p50_ms: at(50), change_p99_ms: at(99), map_bytes })
}
