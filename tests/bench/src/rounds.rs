//! The measurements: every round has every contender once for every measure, in another order each time, so that whatever else the
//! machine does meets all of them; figures are compared with the direct one of their own round.
use std::collections::BTreeMap;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::bed::Place;
use crate::contender::{Contender, Entrant};
use crate::load::{IPERF_PORT, LONG_PORT, Outcome, SHORT_PORT};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    ConnectRequestResponse,
    RequestResponse,
    Throughput,
}

#[derive(Clone, Copy, Debug)]
pub struct Measure {
    place: Place,
    kind: Kind,
    pub name: &'static str,
    pub unit: &'static str,
}

pub const MEASURES: [Measure; 7] = [
    Measure { place: Place::Pod, kind: Kind::ConnectRequestResponse, name: "pod, connect-request-response", unit: "1/s" },
    Measure { place: Place::Pod, kind: Kind::RequestResponse, name: "pod, request-response", unit: "1/s" },
    Measure { place: Place::Pod, kind: Kind::Throughput, name: "pod, throughput", unit: "Gbit/s" },
    Measure { place: Place::Node, kind: Kind::ConnectRequestResponse, name: "node, connect-request-response", unit: "1/s" },
    Measure { place: Place::Node, kind: Kind::RequestResponse, name: "node, request-response", unit: "1/s" },
    Measure { place: Place::Outside, kind: Kind::ConnectRequestResponse, name: "NodePort, connect-request-response", unit: "1/s" },
    Measure { place: Place::Outside, kind: Kind::Throughput, name: "NodePort, throughput", unit: "Gbit/s" },
];

/// What one contender did at one measure.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// One a round.
    pub values: Vec<f64>,
    pub slow: usize,
    pub failed: usize,
}

/// By measure (its index) and contender.
pub type Figures = BTreeMap<(usize, Contender), Series>;

pub fn measure(entrants: &[Entrant], rounds: usize, millis: u64, tell: impl Fn(usize)) -> Result<Figures> {
    let mut figures = Figures::new();
    for round in 0..rounds {
        tell(round + 1);
        for (index, measure) in MEASURES.iter().enumerate() {
            for turn in 0..entrants.len() {
                let entrant = &entrants[(turn + round + index) % entrants.len()];
                let series = figures.entry((index, entrant.contender)).or_default();
                let what = || format!("{} by {}", measure.name, entrant.contender.name());
                if measure.kind == Kind::Throughput {
                    series.values.push(throughput(entrant, measure.place).with_context(what)?);
                } else {
                    let outcome = exchanges(entrant, measure, millis).with_context(what)?;
                    series.values.push(outcome.rate);
                    series.slow += outcome.slow;
                    series.failed += outcome.failed;
                }
            }
        }
    }
    Ok(figures)
}

fn exchanges(entrant: &Entrant, measure: &Measure, millis: u64) -> Result<Outcome> {
    let (how, port) = match measure.kind {
        Kind::ConnectRequestResponse => ("connect-request-response", SHORT_PORT),
        _ => ("request-response", LONG_PORT),
    };
    let (ip, port) = entrant.address(measure.place, port);
    let mut client = entrant.bed.client(measure.place, std::env::current_exe()?)?;
    client.args([how, "--to", &format!("{ip}:{port}"), "--millis", &millis.to_string()]);
    let output = client.stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("read the client's figures")
}

/// In gigabits per second, as the receiver counts them.
fn throughput(entrant: &Entrant, place: Place) -> Result<f64> {
    let (ip, port) = entrant.address(place, IPERF_PORT);
    let mut client = entrant.bed.client(place, "iperf3")?;
    client.args(["--json", "--client", &ip, "--port", &port.to_string(), "--time", "1", "--omit", "0"]);
    let output = client.stdin(Stdio::null()).output()?;
    let report: Value = serde_json::from_slice(&output.stdout).context("parse iperf3's report")?;
    let rate = report.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64);
    Ok(rate.with_context(|| format!("iperf3 gave no rate: {}", report["error"]))? / 1e9)
}

/// Least, median, greatest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

impl Spread {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { *values.get(middle)? } else { (values.get(middle.checked_sub(1)?)? + values.get(middle)?) / 2.0 };
        Some(Self { low: *values.first()?, median, high: *values.last()? })
    }
}

/// A contender's figures, each as a share of the direct one of its round.
pub fn ratios(figures: &Figures, index: usize, contender: Contender) -> Option<Spread> {
    let direct = figures.get(&(index, Contender::Direct))?;
    let series = figures.get(&(index, contender))?;
    Spread::of(series.values.iter().zip(&direct.values).map(|(value, direct)| value / direct))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_least_median_greatest() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { low: 1.0, median: 2.0, high: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0]), Some(Spread { low: 1.0, median: 2.5, high: 4.0 }));
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let series = |values: &[f64]| Series { values: values.to_vec(), ..Series::default() };
        let figures = [((0, Contender::Direct), series(&[100.0, 10.0, 50.0])), ((0, Contender::Ebpf), series(&[90.0, 10.0, 40.0]))];
        let spread = ratios(&figures.into(), 0, Contender::Ebpf).unwrap();
        assert_eq!((spread.low, spread.median, spread.high), (0.8, 0.9, 1.0));
    }
}
