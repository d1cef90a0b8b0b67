//! `cargo xtask conformance`: upstream's own suite against a two-node lab, its result as a table per SIG.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use outrigger_lab::Running;
use serde::Deserialize;

use crate::cluster::{Cluster, SECURE_PORT};
use crate::progress::step;
use crate::tools::{self, Upstream, run};
use crate::{down, images, paths, up};

#[derive(clap::Args)]
pub struct Options {
    /// Run only the specs whose text matches this regular expression
    #[arg(long)]
    focus: Option<String>,
    /// Leave out the specs whose text matches this regular expression
    #[arg(long)]
    skip: Option<String>,
    /// How many specs run at once; those that need the cluster for themselves run alone after the others
    #[arg(long, default_value_t = 4)]
    procs: u8,
    /// The lab to use; it is made when it doesn't run
    #[arg(long, default_value = "conformance")]
    name: String,
    /// Leave the lab running afterwards
    #[arg(long)]
    keep: bool,
    /// Run also the specs that are not part of the conformance suite
    #[arg(long)]
    all: bool,
    #[arg(long, default_value = "auto", value_parser = ["auto", "ebpf", "nftables", "userspace"])]
    proxy_mode: String,
    /// Cargo's profile to build with
    #[arg(long, default_value = "release")]
    profile: String,
    /// Where the report goes (default: target/conformance)
    #[arg(long)]
    report: Option<PathBuf>,
    /// End a run after this many minutes
    #[arg(long, default_value_t = 180)]
    minutes: u64,
}

pub fn run_suite(options: &Options) -> Result<()> {
    tools::install_runtime()?;
    let suite = Upstream::E2eTest.get()?;
    let ginkgo = Upstream::Ginkgo.get()?;
    let images = images::build(&images::conformance::recipes())?;
    let report = options.report.clone().unwrap_or_else(|| paths::target().join("conformance"));
    fs::create_dir_all(&report).with_context(|| format!("create {}", report.display()))?;
    let found = Running::is_there(&paths::lab(&options.name));
    let outcome = lab(options, found, &images).and_then(|cluster| phases(options, &cluster, &ginkgo, &suite, &report));
    if !options.keep && !found {
        down::run(&down::Options { name: options.name.clone() })?;
    }
    let (specs, not_run) = outcome?;
    let (table, failures) = render(&specs);
    fs::write(report.join("table.md"), &table)?;
    fs::write(report.join("failures.txt"), &failures)?;
    println!("{table}\nThe failures' messages are in {}.", report.join("failures.txt").display());
    let failed = specs.iter().filter(|spec| spec.outcome == Outcome::Failed).count();
    ensure!(!specs.is_empty(), "no spec ran: does any match --focus and --skip?");
    ensure!(failed == 0 && not_run.is_empty(), "{failed} spec(s) failed{}", not_run.concat());
    Ok(())
}

/// The lab of that name as it was `found`, or a new one.
fn lab(options: &Options, found: bool, images: &[PathBuf]) -> Result<Cluster> {
    let cluster = if found {
        let text = fs::read(paths::lab(&options.name).join("cluster.json")).context("read cluster.json")?;
        serde_json::from_slice::<Cluster>(&text).context("parse cluster.json")?
    } else {
        up::start(&up::Options {
            nodes: 2,
            name: options.name.clone(),
            proxy_mode: options.proxy_mode.clone(),
            api_port: None,
            no_demo: true,
            profile: options.profile.clone(),
        })?
    };
    ensure!(cluster.nodes >= 2, "the suite needs two nodes, and {} has {}", cluster.name, cluster.nodes);
    let fits = options.proxy_mode == "auto" || cluster.proxy_mode == options.proxy_mode;
    ensure!(fits, "{} was started with --proxy-mode {}", cluster.name, cluster.proxy_mode);
    step("import the suite's images", |bar| up::import(&cluster, images, bar))?;
    Ok(cluster)
}

fn phases(options: &Options, cluster: &Cluster, ginkgo: &Path, suite: &Path, report: &Path) -> Result<(Vec<Spec>, Vec<String>)> {
    let conformance = if options.all { "" } else { "Conformance && " };
    let (mut specs, mut not_run) = (Vec::new(), Vec::new());
    for (phase, filter, procs) in [("parallel", "!Serial", options.procs), ("serial", "Serial", 1)] {
        let json = report.join(format!("{phase}.json"));
        let log = report.join(format!("{phase}.log"));
        let _ = fs::remove_file(&json);
        step(&format!("run the {phase} specs ({})", log.display()), |_| {
            // Its exit code says only that a spec failed, which the report says better.
            let _ = phase_command(options, cluster, ginkgo, suite, report, &format!("{conformance}{filter}"), procs, phase)?
                .stdin(Stdio::null())
                .stdout(File::create(&log)?)
                .stderr(File::options().append(true).open(&log)?)
                .status()
                .context("run ginkgo")?;
            Ok(())
        })?;
        match fs::read(&json) {
            Ok(text) => {
                let (phase_specs, left) = parse(&text)?;
                specs.extend(phase_specs);
                not_run.extend(left.map(|left| format!("; {phase}: {left}")));
            }
            Err(error) => bail!("the {phase} run made no report ({error}); see {}", log.display()),
        }
    }
    Ok((specs, not_run))
}

#[expect(clippy::too_many_arguments, reason = "one call, and each argument is another part of one command line")]
fn phase_command(
    options: &Options,
    cluster: &Cluster,
    ginkgo: &Path,
    suite: &Path,
    report: &Path,
    filter: &str,
    procs: u8,
    phase: &str,
) -> Result<Command> {
    // The suite runs on a host of the lab that is no node, from where it reaches nodes and NodePorts as a user's machine does.
    let kubeconfig = report.join("kubeconfig");
    let text = fs::read_to_string(cluster.kubeconfig()).context("read the kubeconfig")?;
    let (outer, inner) = (format!("127.0.0.1:{}", cluster.api_port), format!("{}:{SECURE_PORT}", Cluster::node_address(0)));
    fs::write(&kubeconfig, text.replace(&outer, &inner))?;
    run(Command::new("chmod").arg("600").arg(&kubeconfig))?;
    let outside = Running::read(&cluster.directory())?;
    let namespace = outside.host("outside")?.net_namespace();
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", namespace.display())).arg("--").arg(ginkgo);
    command.arg(format!("--procs={procs}")).arg(format!("--label-filter={filter}")).arg(format!("--timeout={}m", options.minutes));
    command.args(["--no-color", "--succinct", "--silence-skips", "--grace-period=5s"]);
    command.arg(format!("--json-report={phase}.json")).arg("--output-dir").arg(report);
    command.args(options.focus.iter().map(|focus| format!("--focus={focus}")));
    command.args(options.skip.iter().map(|skip| format!("--skip={skip}")));
    command.arg(suite).args([
        "--",
        "--provider=skeleton",
        "--kube-api-content-type=application/json",
        "--disable-log-dump",
        "--num-nodes=2",
    ]);
    command.arg("--kubeconfig").arg(&kubeconfig).arg("--kubectl-path").arg(Upstream::Kubectl.get()?);
    command.arg("--report-dir").arg(report.join("suite"));
    Ok(command)
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum Outcome {
    Passed,
    Failed,
    Skipped,
}

struct Spec {
    /// Not something that runs before or after the specs.
    is_it: bool,
    sig: String,
    name: String,
    outcome: Outcome,
    time: Duration,
    message: String,
}

// The parts of ginkgo's types.Report that the table needs.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SuiteReport {
    #[serde(default)]
    pre_run_stats: PreRunStats,
    #[serde(default)]
    special_suite_failure_reasons: Option<Vec<String>>,
    #[serde(default)]
    spec_reports: Option<Vec<SpecReport>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PreRunStats {
    #[serde(default)]
    specs_that_will_run: usize,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SpecReport {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    #[serde(default)]
    run_time: u64,
    failure: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(default)]
    message: String,
}

/// The specs that ran, and how many didn't and why.
fn parse(text: &[u8]) -> Result<(Vec<Spec>, Option<String>)> {
    let suites: Vec<SuiteReport> = serde_json::from_slice(text).context("parse ginkgo's report")?;
    let planned: usize = suites.iter().map(|suite| suite.pre_run_stats.specs_that_will_run).sum();
    let reasons: Vec<_> = suites.iter().flat_map(|suite| suite.special_suite_failure_reasons.iter().flatten().cloned()).collect();
    let reports = suites.into_iter().flat_map(|suite| suite.spec_reports.unwrap_or_default());
    let specs: Vec<Spec> = reports.filter_map(spec).collect();
    let left = planned.saturating_sub(specs.iter().filter(|spec| spec.is_it).count());
    let left = (left > 0).then(|| format!("{left} of {planned} did not run ({})", reasons.join(", ")));
    Ok((specs, left))
}

/// A line of the table; none for what the filters left out.
fn spec(report: SpecReport) -> Option<Spec> {
    let message = report.failure.map(|failure| failure.message).unwrap_or_default();
    let outcome = match report.state.as_str() {
        "passed" => Outcome::Passed,
        "skipped" if message.is_empty() => return None,
        "skipped" => Outcome::Skipped,
        "pending" => return None,
        _ => Outcome::Failed,
    };
    let is_it = report.leaf_node_type == "It";
    let mut words = report.container_hierarchy_texts.unwrap_or_default();
    // What runs before and after the specs is listed only when it failed: then nothing else is worth reading.
    if !is_it {
        if outcome == Outcome::Passed {
            return None;
        }
        words.push(report.leaf_node_type);
    }
    words.push(report.leaf_node_text);
    let name = words.join(" ");
    let sig = name.split(['[', ']']).find(|word| word.starts_with("sig-")).unwrap_or("suite").to_owned();
    Some(Spec { is_it, sig, name, outcome, time: Duration::from_nanos(report.run_time), message })
}

fn render(specs: &[Spec]) -> (String, String) {
    let mut rows: BTreeMap<&str, ([usize; 3], Duration)> = BTreeMap::new();
    for spec in specs {
        for sig in [spec.sig.as_str(), "~all"] {
            let row = rows.entry(sig).or_default();
            row.0[spec.outcome as usize] += 1;
            row.1 += spec.time;
        }
    }
    let mut table = String::from("| SIG | passed | failed | skipped | time, s |\n|---|---|---|---|---|\n");
    for (sig, ([passed, failed, skipped], time)) in rows {
        let _ = writeln!(table, "| {} | {passed} | {failed} | {skipped} | {:.0} |", sig.trim_start_matches('~'), time.as_secs_f64());
    }
    let mut failures = String::new();
    for spec in specs.iter().filter(|spec| spec.outcome == Outcome::Failed) {
        let _ = writeln!(failures, "## {} ({:.0} s)\n{}\n", spec.name, spec.time.as_secs_f64(), spec.message);
    }
    (table, failures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_becomes_a_table_and_messages() {
        let text = r#"[{"PreRunStats": {"SpecsThatWillRun": 5}, "SpecialSuiteFailureReasons": ["Suite Timeout Elapsed"], "SpecReports": [
            {"ContainerHierarchyTexts": ["[sig-node] Pods"], "LeafNodeType": "It", "LeafNodeText": "run", "State": "passed", "RunTime": 2000000000},
            {"ContainerHierarchyTexts": ["[sig-node] Pods"], "LeafNodeType": "It", "LeafNodeText": "stop", "State": "timedout", "RunTime": 1000000000, "Failure": {"Message": "too slow"}},
            {"ContainerHierarchyTexts": ["[sig-apps] Job"], "LeafNodeType": "It", "LeafNodeText": "left out", "State": "skipped"},
            {"ContainerHierarchyTexts": ["[sig-apps] Job"], "LeafNodeType": "It", "LeafNodeText": "gives up", "State": "skipped", "Failure": {"Message": "needs two zones"}},
            {"ContainerHierarchyTexts": null, "LeafNodeType": "SynchronizedBeforeSuite", "LeafNodeText": "", "State": "passed"}
        ]}]"#;
        let (specs, left) = parse(text.as_bytes()).expect("the report is well formed");
        assert_eq!(left.as_deref(), Some("2 of 5 did not run (Suite Timeout Elapsed)"));
        let (table, failures) = render(&specs);
        assert!(table.contains("| sig-node | 1 | 1 | 0 | 3 |"), "{table}");
        assert!(table.contains("| sig-apps | 0 | 0 | 1 | 0 |"), "{table}");
        assert!(table.contains("| all | 1 | 1 | 1 | 3 |"), "{table}");
        assert!(failures.contains("## [sig-node] Pods stop (1 s)\ntoo slow"), "{failures}");
    }
}
