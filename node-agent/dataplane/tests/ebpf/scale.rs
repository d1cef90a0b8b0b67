//! Many Services at once, then changes one by one. `SERVICES` says how many; with `--nocapture` it tells how long they took.
use std::time::{Duration, Instant};

use outrigger_dataplane::Mode;
use serde_json::{Value, json};

use crate::lab::{Lab, service, slice};

/// Endpoint changes whose times are taken.
const CHANGES: usize = 100;

fn objects(number: usize) -> [Value; 2] {
    let name = format!("s{number}");
    let ip = format!("10.{}.{}.{}", 96 + number / 65536, number / 256 % 256, number % 256);
    [service(&name, &ip, "80/TCP", json!({})), endpoints(number, 0)]
}

fn endpoints(number: usize, generation: usize) -> Value {
    let ip = |n: usize| format!("10.{}.{}.{}", 128 + n / 65536, n / 256 % 256, n % 256);
    let mut ips: Vec<String> = (0..4).map(|n| ip(number * 4 + n)).collect();
    ips[0] = format!("10.0.{}.{}", 1 + generation / 250, 1 + generation % 250);
    slice(&format!("s{number}"), "8080/TCP", &ips.iter().map(String::as_str).collect::<Vec<_>>())
}

fn measure(mode: Mode) {
    let count: usize = std::env::var("SERVICES").ok().and_then(|text| text.parse().ok()).unwrap_or(2000);
    Lab::run(&[], move |lab| {
        let mut agent = lab.agent_in(mode);
        let all: Vec<Value> = (0..count).flat_map(objects).collect();
        agent.learn(&all);
        let start = Instant::now();
        assert_eq!(agent.apply(&[]).upserted, count);
        let full = start.elapsed();
        let mut times: Vec<Duration> = (0..CHANGES)
            .map(|change| {
                agent.learn(&[endpoints(change * 37 % count, change + 1)]);
                let start = Instant::now();
                assert_eq!(agent.apply(&[]).upserted, 1);
                start.elapsed()
            })
            .collect();
        times.sort();
        println!(
            "{mode}: {count} Services in {full:.1?}; one endpoint changed: median {:.1?}, p99 {:.1?}",
            times[CHANGES / 2],
            times[CHANGES * 99 / 100]
        );
    });
}

#[test]
fn many_services_in_ebpf() {
    measure(Mode::Ebpf);
}

#[test]
fn many_services_in_nftables() {
    measure(Mode::Nftables);
}
