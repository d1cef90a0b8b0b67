//! What connections live through: agents killed and started again, modes switched, backends that vanish.
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::api::{Hub, set_backends};
use crate::bed::{BACKENDS, Place, Running};
use crate::contender::Entrant;
use crate::load::LONG_PORT;

const CONNECTIONS: usize = 50;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, Serialize)]
pub struct Endured {
    pub what: String,
    pub times: usize,
    pub connections: usize,
    pub exchanges: u64,
    pub lost: u64,
    pub longest_ms: f64,
}

/// Connections under load while `shake` is done to the agent.
fn under_load(
    entrant: &mut Entrant,
    what: String,
    times: usize,
    mut shake: impl FnMut(&mut Entrant, usize) -> Result<()>,
) -> Result<Endured> {
    let mut holders = Vec::new();
    for place in [Place::Pod, Place::Outside] {
        let (ip, port) = entrant.address(place, LONG_PORT);
        let mut client = entrant.bed.plain(place, std::env::current_exe()?)?;
        client.args(["hold", "--connections", &CONNECTIONS.to_string(), "--to", &format!("{ip}:{port}")]);
        let mut child = client.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut output = BufReader::new(child.stdout.take().context("no output")?);
        ensure!(line(&mut output)? == "ready", "{what}: the connections can't be opened");
        holders.push((Running(child), output));
    }
    for time in 0..times {
        shake(entrant, time).with_context(|| format!("{what}, number {}", time + 1))?;
    }
    let mut endured = Endured { what, times, connections: 2 * CONNECTIONS, exchanges: 0, lost: 0, longest_ms: 0.0 };
    for (mut child, mut output) in holders {
        drop(child.0.stdin.take());
        let report: Value = serde_json::from_str(&line(&mut output)?)?;
        endured.lost += report["lost"].as_u64().unwrap_or_default();
        endured.exchanges += report["exchanges"].as_u64().unwrap_or_default();
        endured.longest_ms = endured.longest_ms.max(report["longest_ms"].as_f64().unwrap_or_default());
    }
    Ok(endured)
}

fn line(output: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    output.read_line(&mut line)?;
    Ok(line.trim().to_owned())
}

pub fn restarts(entrant: &mut Entrant, times: usize) -> Result<Endured> {
    let mode = entrant.contender.name();
    under_load(entrant, format!("{mode}: the agent killed and started again"), times, |entrant, _| {
        entrant.start(mode)?;
        healthy(entrant)
    })
}

pub fn switches(entrant: &mut Entrant, times: usize) -> Result<Endured> {
    let modes = ["nftables", "userspace", "ebpf"];
    under_load(entrant, "live switches of the mode".into(), times, |entrant, time| {
        ask(entrant, &["mode", modes[time % modes.len()]])?;
        std::thread::sleep(Duration::from_millis(200));
        Ok(())
    })
}

fn ask(entrant: &Entrant, words: &[&str]) -> Result<String> {
    let mut command = entrant.bed.plain(Place::Node, entrant.program())?;
    let output = command.args(words).arg("--data-dir").arg(entrant.data_dir()).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn healthy(entrant: &Entrant) -> Result<()> {
    let begin = Instant::now();
    while let Err(error) = ask(entrant, &["status"]) {
        ensure!(begin.elapsed() < PATIENCE, "the agent doesn't get healthy: {error:#}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// From the API being told that a backend is gone to its client being freed, in milliseconds; `None` when it was not.
pub fn freed(entrant: &Entrant, hub: &Hub) -> Result<Option<f64>> {
    let (ip, port) = entrant.address(Place::Pod, LONG_PORT);
    // One backend, so that it is known who has the connection.
    let only = BACKENDS[0];
    hub.with(async |client| set_backends(client, &[only]).await)?;
    std::thread::sleep(Duration::from_secs(1));
    let mut client = entrant.bed.plain(Place::Pod, std::env::current_exe()?)?;
    client.args(["until-freed", "--seconds", "10", "--to", &format!("{ip}:{port}")]);
    let mut child: Child = client.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut output = BufReader::new(child.stdout.take().context("no output")?);
    let _child = Running(child);
    line(&mut output)?;
    std::thread::sleep(Duration::from_millis(200));
    entrant.bed.silence(only)?;
    let begin = Instant::now();
    hub.with(async |client| set_backends(client, &BACKENDS[1..]).await)?;
    let mut text = String::new();
    output.read_to_string(&mut text)?;
    let waited = begin.elapsed();
    entrant.bed.restore(only)?;
    hub.with(async |client| set_backends(client, &BACKENDS).await)?;
    let report: Value = serde_json::from_str(text.trim()).context("read the client's figures")?;
    Ok((report["freed"] == true).then_some(waited.as_secs_f64() * 1e3))
}
