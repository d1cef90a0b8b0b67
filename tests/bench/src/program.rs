//! How fast the kernel follows: one endpoint changed among many Services, and all Services at once.
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use outrigger_dataplane::{Config, Proxy};
use outrigger_desired::{Change, Watched};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::api::{CLUSTER_CIDR, filler, node};
use crate::bed::{NODE_IP, memory};

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
    let (sender, changes) = mpsc::unbounded_channel();
    let proxy = Proxy::start(config, changes).await?;
    let begin = Instant::now();
    sender.send(Change::Service(Watched::Replaced(Arc::new(services))))?;
    sender.send(Change::EndpointSlice(Watched::Replaced(Arc::new(slices))))?;
    sender.send(Change::Pod(Watched::Replaced(Arc::default())))?;
    sender.send(Change::Node(Watched::Replaced(Arc::new(vec![Arc::new(node("bench"))]))))?;
    proxy.synced().await;
    let bulk = begin.elapsed();
    let mut times = Vec::new();
    for change in 0..options.changes {
        let mut slice = (*sample).clone();
        // One endpoint comes or goes.
        if change % 2 == 0 {
            slice.endpoints.pop();
        }
        let begin = Instant::now();
        sender.send(Change::EndpointSlice(Watched::Applied(Arc::new(slice))))?;
        let health = proxy.settle().await;
        times.push(begin.elapsed());
        ensure!(health.error.is_none(), "{:?}", health.error);
        // As they come in life, not as a stream.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    times.sort_unstable();
    let at = |share: usize| times.get((times.len().max(1) - 1) * share / 100).map_or(0.0, |time| time.as_secs_f64() * 1e3);
    let (_, map_bytes) = memory(std::process::id())?;
    proxy.teardown().await?;
    Ok(Programmed { bulk_ms: bulk.as_secs_f64() * 1e3, change_p50_ms: at(50), change_p99_ms: at(99), map_bytes })
}
