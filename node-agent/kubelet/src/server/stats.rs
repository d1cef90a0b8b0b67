//! What containers and the node use, as measured by the runtime and the kernel.
use std::collections::HashMap;
use std::sync::Mutex;

use crate::cri::{Cri, Error, Result, v1};

/// CPU time since a container's start at two moments gives its present rate.
#[derive(Default)]
pub struct Rates(Mutex<HashMap<String, Sample>>);

#[derive(Clone, Copy)]
struct Sample {
    /// Nanoseconds since the epoch.
    time: i64,
    used: u64,
    rate: Option<u64>,
}

/// Shorter intervals make the rate jump.
const MIN_INTERVAL: i64 = 1_000_000_000;
const MAX_SAMPLES: usize = 4096;

impl Rates {
    /// Nanocores in use between this measurement and the last one; `None` at the first.
    pub fn rate(&self, id: &str, time: i64, used: u64) -> Option<u64> {
        let mut samples = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(last) = samples.get(id).copied().filter(|last| used >= last.used && time >= last.time) else {
            if samples.len() >= MAX_SAMPLES {
                // Containers come and go; the living ones are back at the next measurement.
                samples.clear();
            }
            samples.insert(id.to_owned(), Sample { time, used, rate: None });
            return None;
        };
        let interval = time - last.time;
        if interval < MIN_INTERVAL {
            return last.rate;
        }
        let rate = u128::from(used - last.used) * 1_000_000_000 / u128::from(interval.unsigned_abs());
        let rate = u64::try_from(rate).ok();
        samples.insert(id.to_owned(), Sample { time, used, rate });
        rate
    }
}

/// Both lists of one moment, from which everything else is made.
pub struct Measured {
    pub sandboxes: Vec<v1::PodSandbox>,
    pub containers: Vec<v1::Container>,
    pub stats: HashMap<String, v1::ContainerStats>,
}

pub async fn measure(cri: &Cri) -> Result<Measured> {
    let ready = v1::PodSandboxStateValue { state: v1::PodSandboxState::SandboxReady as i32 };
    let running = v1::ContainerStateValue { state: v1::ContainerState::ContainerRunning as i32 };
    let sandboxes = cri.list_sandboxes(v1::PodSandboxFilter { state: Some(ready), ..Default::default() });
    let containers = cri.list_containers(v1::ContainerFilter { state: Some(running), ..Default::default() });
    let mut runtime = cri.runtime();
    let stats = async {
        let answer = runtime.list_container_stats(v1::ListContainerStatsRequest::default()).await;
        answer.map(tonic::Response::into_inner).map_err(|status| Error {
            call: "ListContainerStats",
            code: status.code(),
            message: status.message().to_owned(),
        })
    };
    let (sandboxes, containers, stats) = tokio::try_join!(sandboxes, containers, stats)?;
    let stats = stats.stats.into_iter().filter_map(|stats| Some((stats.attributes.as_ref()?.id.clone(), stats))).collect();
    Ok(Measured { sandboxes, containers, stats })
}

/// The node's own figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeUsage {
    pub cpu_nanoseconds: u64,
    pub memory_total: u64,
    pub memory_available: u64,
    pub memory_free: u64,
    pub cached: u64,
    pub swap_total: u64,
    pub swap_free: u64,
    pub processes: u64,
    pub max_pid: u64,
}

impl NodeUsage {
    /// Read from /proc; what can't be read is zero.
    pub fn read() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let mut usage = Self::parse(&read("/proc/stat"), &read("/proc/meminfo"));
        usage.max_pid = read("/proc/sys/kernel/pid_max").trim().parse().unwrap_or_default();
        let load = read("/proc/loadavg");
        usage.processes = load.split_whitespace().nth(3).and_then(|tasks| tasks.split_once('/')?.1.parse().ok()).unwrap_or_default();
        usage
    }

    fn parse(stat: &str, meminfo: &str) -> Self {
        // user nice system idle iowait irq softirq steal, in hundredths of a second
        let ticks: Vec<u64> =
            stat.lines().next().unwrap_or_default().split_whitespace().skip(1).take(8).filter_map(|ticks| ticks.parse().ok()).collect();
        let busy: u64 = ticks.iter().enumerate().filter(|(index, _)| !matches!(index, 3 | 4)).map(|(_, ticks)| ticks).sum();
        let memory = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default() * 1024
        };
        Self {
            cpu_nanoseconds: busy * 10_000_000,
            memory_total: memory("MemTotal"),
            memory_available: memory("MemAvailable"),
            memory_free: memory("MemFree"),
            cached: memory("Cached") + memory("Buffers"),
            swap_total: memory("SwapTotal"),
            swap_free: memory("SwapFree"),
            processes: 0,
            max_pid: 0,
        }
    }
}

pub fn value(value: &Option<v1::UInt64Value>) -> Option<u64> {
    value.as_ref().map(|value| value.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_from_two_measurements() {
        let rates = Rates::default();
        let cases = [
            (0, 1000, None),
            (500_000_000, 2000, None),
            (2_000_000_000, 1_000_001_000, Some(500_000_000)),
            (2_500_000_000, 1_000_002_000, Some(500_000_000)),
            (3_000_000_000, 5, None),
        ];
        for (time, used, expected) in cases {
            assert_eq!(rates.rate("a", time, used), expected, "at {time}");
        }
    }

    #[test]
    fn reads_proc() {
        let stat = "cpu  100 1 200 5000 300 4 5 6 7 8\ncpu0 1 1 1 1\n";
        let meminfo = "MemTotal:        1000 kB\nMemFree:  100 kB\nMemAvailable:  600 kB\nBuffers: 1 kB\nCached: 2 kB\nSwapTotal: 0 kB\n";
        let usage = NodeUsage::parse(stat, meminfo);
        assert_eq!(usage.cpu_nanoseconds, 316 * 10_000_000);
        assert_eq!((usage.memory_total, usage.memory_available, usage.cached), (1_024_000, 614_400, 3072));
    }
}
