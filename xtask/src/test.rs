//! `cargo xtask test`: everything that has to pass, from formatting to a two-node cluster in each proxy mode.
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cluster::Cluster;
use crate::progress::step;
use crate::tools::Upstream;
use crate::{build_ebpf, down, images, paths, tidy, tools, up};

const LAB: &str = "e2e";

#[derive(clap::Args)]
pub struct Options {
    /// Run only the end-to-end tests
    #[arg(long)]
    e2e_only: bool,
    /// Leave the end-to-end tests out
    #[arg(long, conflicts_with = "e2e_only")]
    no_e2e: bool,
    /// Run the end-to-end tests in these proxy modes only
    #[arg(long, value_delimiter = ',', default_value = "ebpf,nftables,userspace")]
    modes: Vec<String>,
}

pub fn run(options: &Options) -> Result<()> {
    tools::install_runtime()?;
    build_ebpf::run()?;
    if !options.e2e_only {
        step("check the formatting", |_| tools::run(cargo().args(["fmt", "--all", "--check"])))?;
        step("check the invariants", |_| tidy::run())?;
        step("clippy", |_| tools::run(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"])))?;
        println!("unit and scenario tests");
        tools::show(cargo().args(["test", "--workspace", "--exclude", "outrigger-e2e", "--no-fail-fast"]))?;
    }
    let mut left_out = None;
    if !options.no_e2e {
        left_out = alone()?;
        for (index, mode) in options.modes.iter().enumerate() {
            // What does not depend on the mode runs in the first one. In userspace mode the agent itself carries the
            // connections, so they can't outlive it: there the crash test has nothing to show.
            let tests: &[&str] = match (index, mode.as_str()) {
                (_, "userspace") => &["services", "policy"],
                (0, _) => &["workloads", "images", "services", "policy", "crash"],
                _ => &["services", "policy", "crash"],
            };
            end_to_end(mode, tests)?;
        }
    }
    if let Some(what) = left_out {
        println!("{what}");
    }
    Ok(())
}

/// The Service proxy by itself, against upstream's own API server. Gives what has to be said at the end.
fn alone() -> Result<Option<&'static str>> {
    let upstream = [Upstream::KubeApiserver, Upstream::Etcd, Upstream::Kubectl];
    if tools::find("go").is_none() && !upstream.into_iter().all(Upstream::is_cached) {
        return Ok(Some("NOT TESTED: the Service proxy alone. Its API server is built from Go modules: install Go 1.25 or later"));
    }
    println!("the Service proxy alone, against kube-apiserver {}", tools::UPSTREAM);
    let upstream = upstream.map(Upstream::get);
    let programs = upstream.into_iter().collect::<Result<Vec<_>>>()?;
    tools::run(cargo().args(["build", "--package", "outrigger-node", "--package", "outrigger-scenarios"]))?;
    let mut command = cargo();
    command.args(["test", "--package", "outrigger-e2e", "--test", "alone"]).env("OUTRIGGER_BIN", paths::target().join("debug"));
    tools::show(command.env("OUTRIGGER_UPSTREAM", programs[0].parent().unwrap_or(&programs[0])))?;
    Ok(None)
}

fn end_to_end(mode: &str, tests: &[&str]) -> Result<()> {
    println!("end-to-end tests, proxy mode {mode}");
    down::run(&down::Options { name: LAB.into() })?;
    let cluster = up::start(&up::Options {
        nodes: 2,
        name: LAB.into(),
        proxy_mode: mode.into(),
        api_port: None,
        no_demo: true,
        profile: "dev".into(),
    })?;
    let result = run_tests(&cluster, tests);
    if result.is_err() {
        bail!(
            "the end-to-end tests failed in mode {mode}; the cluster is left for a look: logs are in {}/hosts/*/log, \
             `cargo xtask down --name {LAB}` takes it away",
            cluster.directory().display()
        );
    }
    down::run(&down::Options { name: LAB.into() })
}

fn run_tests(cluster: &Cluster, tests: &[&str]) -> Result<()> {
    let mut command = cargo();
    command.args(["test", "--package", "outrigger-e2e", "--no-fail-fast"]);
    command.args(tests.iter().flat_map(|test| ["--test", *test]));
    command.env("OUTRIGGER_LAB", cluster.directory()).env("OUTRIGGER_KUBECTL", tools::kubectl()?);
    tools::show(command.env("OUTRIGGER_PROXY_MODE", &cluster.proxy_mode).env("OUTRIGGER_REGISTRY", registry()?))
}

/// A registry that can run anywhere: unpacked into the cache, not installed, since its package would start it at boot.
fn registry() -> Result<PathBuf> {
    let root = paths::cache().join("debian/docker-registry");
    if !root.is_dir() {
        let draft = root.with_file_name(format!(".docker-registry.{}", std::process::id())).join("root");
        std::fs::create_dir_all(&draft).with_context(|| format!("create {}", draft.display()))?;
        step("unpack a registry for the tests", |_| images::unpack(&draft, &["docker-registry"]))?;
        std::fs::rename(&draft, &root).with_context(|| format!("install {}", root.display()))?;
        std::fs::remove_dir_all(draft.with_file_name(""))?;
    }
    Ok(root.join("usr/bin/docker-registry"))
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::workspace());
    command
}
