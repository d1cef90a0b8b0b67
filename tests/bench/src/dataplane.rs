//! The whole run: all contenders in their beds at once, one number of Services after the other.
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::api::{self, Hub};
use crate::bed::memory;
use crate::contender::{Contender, Entrant, Programs};
use crate::report::{Report, Scale};
use crate::{endure, program, rounds};

#[derive(clap::Args)]
pub struct Dataplane {
    /// Where outrigger-control and outrigger-node are
    #[arg(long)]
    binaries: PathBuf,
    /// Upstream's kube-proxy
    #[arg(long)]
    kube_proxy: PathBuf,
    #[arg(long)]
    report: PathBuf,
    #[arg(long, value_delimiter = ',')]
    services: Vec<u32>,
    #[arg(long)]
    rounds: usize,
    #[arg(long)]
    millis: u64,
    #[arg(long, value_delimiter = ',', value_enum)]
    contenders: Vec<Contender>,
    #[arg(long)]
    restarts: usize,
    #[arg(long)]
    switches: usize,
    /// Leave out how fast the kernel is programmed
    #[arg(long)]
    no_programming: bool,
}

pub fn run(options: &Dataplane) -> Result<()> {
    ensure!(options.rounds >= 5, "fewer than 5 rounds say nothing");
    let directory = std::env::temp_dir().join(format!("outrigger-bench-{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    fs::create_dir_all(&options.report)?;
    let mut report = Report { about: about(options), ..Report::default() };
    let result = measure(options, &directory, &mut report);
    // What was measured before a failure is worth reading, too.
    fs::write(options.report.join("dataplane.md"), report.markdown())?;
    fs::write(options.report.join("dataplane.svg"), report.svg())?;
    if result.is_ok() {
        fs::remove_dir_all(&directory)?;
    } else {
        eprintln!("logs are left in {}", directory.display());
    }
    result
}

fn about(options: &Dataplane) -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo").lines().find_map(|line| line.strip_prefix("model name\t: ").map(str::to_owned)).unwrap_or_default();
    format!(
        "{} rounds, {} ms per measurement (throughput 1 s), all contenders interleaved; {} CPUs ({cpu}), Linux {}. Client and server are \
         pinned to a core each and go before other work. Each contender has its own namespaces: client pod, node, another node with the \
         backends, a client outside; all watch one API server. kube-proxy is upstream's v1.35.4.",
        options.rounds,
        options.millis,
        std::thread::available_parallelism().map_or(1, usize::from),
        read("/proc/sys/kernel/osrelease").trim(),
    )
}

fn measure(options: &Dataplane, directory: &std::path::Path, report: &mut Report) -> Result<()> {
    let hub = Hub::start(&options.binaries, directory)?;
    let names: Vec<String> = options.contenders.iter().map(|contender| contender.node()).collect();
    hub.with(async |client| api::prepare(client, &names).await)?;
    let programs = Programs { binaries: options.binaries.clone(), kube_proxy: options.kube_proxy.clone() };
    let mut entrants = Vec::new();
    for (number, contender) in (1..).zip(&options.contenders) {
        entrants.push(Entrant::new(*contender, number, &hub, &programs, directory)?);
    }
    let mut services = 1;
    for &wanted in &options.services {
        let begin = Instant::now();
        hub.with(async |client| api::grow(client, services, wanted).await)?;
        eprintln!("{wanted} Services created in {:.1} s", begin.elapsed().as_secs_f64());
        services = wanted;
        let agents = settle(&mut entrants, services)?;
        let figures = rounds::measure(&entrants, options.rounds, options.millis, |round| {
            eprintln!("{services} Services: round {round} of {}", options.rounds);
        })?;
        report.scales.push(Scale { services, figures, agents });
        fs::write(options.report.join("dataplane.md"), report.markdown())?;
    }
    for entrant in entrants.iter().filter(|entrant| entrant.contender.is_ours()) {
        let times = (0..5).map(|_| endure::freed(entrant, &hub)).collect::<Result<Vec<_>>>()?;
        report.freed.push((entrant.contender, times));
    }
    for entrant in entrants.iter_mut().filter(|entrant| matches!(entrant.contender, Contender::Ebpf | Contender::Nftables)) {
        if options.restarts > 0 {
            report.endured.push(endure::restarts(entrant, options.restarts)?);
        }
        if options.switches > 0 && entrant.contender == Contender::Ebpf {
            report.endured.push(endure::switches(entrant, options.switches)?);
        }
    }
    drop(entrants);
    if !options.no_programming {
        report.programmed = program::all(&hub.namespace, directory)?;
    }
    Ok(())
}

fn settle(entrants: &mut [Entrant], services: u32) -> Result<Vec<(Contender, f64, u64, u64)>> {
    let mut agents = Vec::new();
    for entrant in entrants {
        let took = entrant.settle(services, Duration::from_secs(900))?;
        eprintln!("{}: served after another {:.1} s", entrant.contender.name(), took.as_secs_f64());
        if let Some(pid) = entrant.pid() {
            let (resident, maps) = memory(pid)?;
            agents.push((entrant.contender, took.as_secs_f64(), resident, maps));
        }
    }
    // Late work of the agents is over when the measuring begins.
    std::thread::sleep(Duration::from_secs(3));
    Ok(agents)
}
