//! The processes of a lab's hosts, for tests that make a lab without `cargo xtask`.
use anyhow::{Result, bail};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["lab", "host", spec] => outrigger_lab::host::outer(spec),
        ["lab", "init", spec] => outrigger_lab::init::run(spec),
        _ => bail!("this program is started by a lab: `outrigger-lab lab host|init SPEC`"),
    }
}
