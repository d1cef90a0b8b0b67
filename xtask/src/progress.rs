//! Long work shown as it goes: a spinner on a terminal, a line per step elsewhere.
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

/// Runs one step and says how long it took; `work` may change the shown text.
pub fn step<T>(what: &str, work: impl FnOnce(&ProgressBar) -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {elapsed} {wide_msg:.dim}") {
        bar.set_style(style);
    }
    bar.set_prefix(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    let result = work(&bar);
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    match &result {
        Ok(_) => println!("  ✓ {what} ({seconds:.1} s)"),
        Err(_) => println!("  ✗ {what} ({seconds:.1} s)"),
    }
    result.with_context(|| what.to_owned())
}

/// Asks `done` until it says yes; `done` answers `Err(text)` with what is still missing.
pub fn wait(bar: &ProgressBar, limit: Duration, mut done: impl FnMut() -> Result<(), String>) -> Result<()> {
    wait_while(bar, limit, || Ok(()), &mut done)
}

/// Like [`wait`], but gives up at once when `alive` fails.
pub fn wait_while(
    bar: &ProgressBar,
    limit: Duration,
    mut alive: impl FnMut() -> Result<()>,
    mut done: impl FnMut() -> Result<(), String>,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        alive()?;
        match done() {
            Ok(()) => return Ok(()),
            Err(missing) if Instant::now() > deadline => anyhow::bail!("after {} s: {missing}", limit.as_secs()),
            Err(missing) => bar.set_message(missing),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
