//! `cargo xtask`: everything that is done to the project and with it, each as one command.
mod bench;
mod build_ebpf;
mod cluster;
mod conformance;
mod debian;
mod demo;
mod down;
mod images;
mod kubectl;
mod paths;
mod progress;
mod serve;
mod test;
mod tidy;
mod tools;
mod up;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, runs and tests Outrigger", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Set everything up, start a cluster in a lab of namespaces, run a small demo and say how to use it
    Up(up::Options),
    /// Take a cluster and everything that it left away
    Down(down::Options),
    /// Set up what the tests need and run all of them
    Test(test::Options),
    /// Build the eBPF programs, with their toolchain installed into the cache when it is missing
    BuildEbpf,
    /// Make the container images of the demo from Debian packages, into the cache
    Images {
        /// Make those of the conformance suite too
        #[arg(long)]
        conformance: bool,
    },
    /// Measure against a named reference
    Bench(bench::Options),
    /// Run upstream's conformance suite against a two-node lab and report per SIG
    Conformance(conformance::Options),
    /// Check the project's invariants that no compiler checks
    Tidy,
    /// Work with the hosts of a running cluster
    #[command(subcommand)]
    Lab(serve::Lab),
}

fn main() -> Result<()> {
    match Cli::parse().task {
        Task::Up(options) => up::run(&options),
        Task::Down(options) => down::run(&options),
        Task::Test(options) => test::run(&options),
        Task::BuildEbpf => build_ebpf::run(),
        Task::Images { conformance } => make_images(conformance),
        Task::Bench(options) => bench::run(&options),
        Task::Conformance(options) => conformance::run_suite(&options),
        Task::Tidy => tidy::run(),
        Task::Lab(lab) => serve::run(lab),
    }
}

fn make_images(conformance: bool) -> Result<()> {
    let mut recipes = images::demo::recipes();
    if conformance {
        recipes.extend(images::conformance::recipes());
    }
    images::build(&recipes)?.iter().for_each(|file| println!("  {}", file.display()));
    Ok(())
}
