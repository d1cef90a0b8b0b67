//! Eviction signals: what is watched, from when on it counts as short, and what follows for the node. Pure.
use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::quantity;

/// Something of the node's that can run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Signal {
    /// First, as memory is reclaimed before everything else.
    MemoryAvailable,
    NodefsAvailable,
    NodefsInodesFree,
    ImagefsAvailable,
    ImagefsInodesFree,
    PidAvailable,
}

/// Upstream's names, the node conditions, and the resources as messages call them.
const SIGNALS: [(Signal, &str, &str, &str); 6] = [
    (Signal::MemoryAvailable, "memory.available", MEMORY_PRESSURE, "memory"),
    (Signal::NodefsAvailable, "nodefs.available", DISK_PRESSURE, "ephemeral-storage"),
    (Signal::NodefsInodesFree, "nodefs.inodesFree", DISK_PRESSURE, "inodes"),
    (Signal::ImagefsAvailable, "imagefs.available", DISK_PRESSURE, "ephemeral-storage"),
    (Signal::ImagefsInodesFree, "imagefs.inodesFree", DISK_PRESSURE, "inodes"),
    (Signal::PidAvailable, "pid.available", PID_PRESSURE, "pids"),
];

pub const MEMORY_PRESSURE: &str = "MemoryPressure";
pub const DISK_PRESSURE: &str = "DiskPressure";
pub const PID_PRESSURE: &str = "PIDPressure";

impl Signal {
    fn entry(self) -> (&'static str, &'static str, &'static str) {
        let found = SIGNALS.iter().find(|(signal, ..)| *signal == self);
        found.map_or(("", "", ""), |(_, name, condition, resource)| (name, condition, resource))
    }

    pub fn condition(self) -> &'static str {
        self.entry().1
    }

    pub fn resource(self) -> &'static str {
        self.entry().2
    }

    fn counts_bytes(self) -> bool {
        matches!(self, Self::MemoryAvailable | Self::NodefsAvailable | Self::ImagefsAvailable)
    }

    /// An amount of it, as upstream prints quantities.
    pub fn amount(self, amount: i64) -> String {
        if self.counts_bytes() { quantity::binary(amount) } else { quantity::decimal(amount) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    Amount(i64),
    /// A part of the capacity.
    Share(f64),
}

/// Less than the limit is too little.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold {
    pub signal: Signal,
    pub limit: Limit,
}

/// How much there is of a signal's resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    pub available: i64,
    pub capacity: i64,
}

impl Threshold {
    pub fn quantity(&self, capacity: i64) -> i64 {
        match self.limit {
            Limit::Amount(amount) => amount,
            // Exact for any disk: 2^53 bytes are 8 PiB.
            #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
            Limit::Share(share) => (capacity as f64 * share) as i64,
        }
    }
}

/// The thresholds, written as upstream's `--eviction-hard`: `memory.available<100Mi,nodefs.available<10%`.
#[derive(Clone, Debug, PartialEq)]
pub struct Thresholds(pub Vec<Threshold>);

impl Default for Thresholds {
    fn default() -> Self {
        let threshold = |signal, limit| Threshold { signal, limit };
        Self(vec![
            threshold(Signal::MemoryAvailable, Limit::Amount(100 << 20)),
            threshold(Signal::NodefsAvailable, Limit::Share(0.1)),
            threshold(Signal::NodefsInodesFree, Limit::Share(0.05)),
            threshold(Signal::ImagefsAvailable, Limit::Share(0.15)),
            threshold(Signal::ImagefsInodesFree, Limit::Share(0.05)),
        ])
    }
}

impl FromStr for Thresholds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let statements = text.split(',').map(str::trim).filter(|statement| !statement.is_empty());
        Ok(Self(statements.map(parse).collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect()))
    }
}

/// `None`: a limit of 0% or 100%, which turns the signal off.
fn parse(statement: &str) -> Result<Option<Threshold>, String> {
    let (name, value) = statement.split_once('<').ok_or_else(|| format!("invalid eviction threshold syntax {statement}"))?;
    let signal = SIGNALS.iter().find(|(_, known, ..)| *known == name).map(|(signal, ..)| *signal);
    let signal = signal.ok_or_else(|| format!("unsupported eviction signal {name}"))?;
    let limit = match value.strip_suffix('%') {
        Some(percent) => {
            let percent: f64 = percent.parse().map_err(|error| format!("invalid eviction threshold {value}: {error}"))?;
            if percent == 0.0 || percent == 100.0 {
                return Ok(None);
            }
            if !(0.0..100.0).contains(&percent) {
                return Err(format!("eviction percentage threshold {name} must be between 0% and 100%: {value}"));
            }
            Limit::Share(percent / 100.0)
        }
        None => {
            let amount = quantity::nano(value).ok_or_else(|| format!("invalid eviction threshold {value}"))?;
            if amount < 0 {
                return Err(format!("eviction threshold {name} cannot be negative: {value}"));
            }
            Limit::Amount(i64::try_from(amount / 1_000_000_000).unwrap_or(i64::MAX))
        }
    };
    Ok(Some(Threshold { signal, limit }))
}

pub type Observations = BTreeMap<Signal, Observation>;

/// The thresholds that are crossed, the most urgent first.
pub fn met(thresholds: &Thresholds, observations: &Observations) -> Vec<Threshold> {
    let short =
        |threshold: &&Threshold| observations.get(&threshold.signal).is_some_and(|seen| seen.available < threshold.quantity(seen.capacity));
    let mut met: Vec<Threshold> = thresholds.0.iter().filter(short).copied().collect();
    met.sort_by_key(|threshold| threshold.signal);
    met
}

/// The node's pressure conditions: each stays for a while after it was last seen, so that pods don't come and go with every breath.
#[derive(Debug, Default)]
pub struct Pressure(std::sync::Mutex<BTreeMap<&'static str, Instant>>);

impl Pressure {
    pub fn observe(&self, met: &[Threshold], transition: Duration, now: Instant) {
        let mut seen = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        seen.retain(|_, last| now.saturating_duration_since(*last) < transition);
        seen.extend(met.iter().map(|threshold| (threshold.signal.condition(), now)));
    }

    pub fn conditions(&self) -> Vec<&'static str> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_read_as_upstream_writes_them() {
        let read = |text: &str| text.parse::<Thresholds>();
        let Ok(Thresholds(list)) = read("memory.available<100Mi, nodefs.available<10%,imagefs.available<0%") else { panic!("valid") };
        assert_eq!(list.len(), 2);
        assert_eq!((list[0].signal, list[0].quantity(0)), (Signal::MemoryAvailable, 100 << 20));
        assert_eq!((list[1].signal, list[1].quantity(1000)), (Signal::NodefsAvailable, 100));
        for bad in ["memory.available", "swap.available<1Mi", "memory.available<x", "memory.available<-1", "nodefs.available<120%"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_short_comes_memory_first() {
        let seen = |available| Observation { available, capacity: 1000 };
        let observations = [(Signal::NodefsAvailable, seen(99)), (Signal::MemoryAvailable, seen(1)), (Signal::ImagefsAvailable, seen(150))];
        let met = met(&Thresholds::default(), &observations.into());
        assert_eq!(met.iter().map(|threshold| threshold.signal).collect::<Vec<_>>(), [Signal::MemoryAvailable, Signal::NodefsAvailable]);
    }

    #[test]
    fn pressure_lasts_for_the_transition_period() {
        let pressure = Pressure::default();
        let (start, transition) = (Instant::now(), Duration::from_secs(300));
        let short = [Threshold { signal: Signal::MemoryAvailable, limit: Limit::Amount(1) }];
        pressure.observe(&short, transition, start);
        pressure.observe(&[], transition, start + Duration::from_secs(299));
        assert_eq!(pressure.conditions(), [MEMORY_PRESSURE]);
        pressure.observe(&[], transition, start + transition);
        assert!(pressure.conditions().is_empty());
    }
}
