//! `cargo xtask down`: takes a cluster away, whatever state it is in.
use anyhow::Result;
use outrigger_lab::Lab;

use crate::paths;
use crate::progress::step;

#[derive(clap::Args)]
pub struct Options {
    /// The cluster's name
    #[arg(long, default_value = "outrigger")]
    pub name: String,
}

pub fn run(options: &Options) -> Result<()> {
    let directory = paths::lab(&options.name);
    step(&format!("take the cluster {} down", options.name), |_| Lab::destroy(&options.name, &directory))?;
    // The folder of all clusters goes with the last one.
    let _ = directory.parent().map(std::fs::remove_dir);
    Ok(())
}
