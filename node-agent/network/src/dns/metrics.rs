//! Counters of the DNS server.
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use hickory_proto::op::ResponseCode;

use super::upstream::Transport;

#[derive(Default)]
pub struct Metrics {
    udp_requests: AtomicU64,
    tcp_requests: AtomicU64,
    no_error: AtomicU64,
    no_such_name: AtomicU64,
    server_failure: AtomicU64,
    other: AtomicU64,
    forwarded: AtomicU64,
    turns: AtomicUsize,
}

impl Metrics {
    pub fn count_request(&self, transport: Transport) {
        let counter = match transport {
            Transport::Udp => &self.udp_requests,
            Transport::Tcp => &self.tcp_requests,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// A reply of our own with its code.
    pub fn count_answer(&self, code: ResponseCode) {
        let counter = match code {
            ResponseCode::NoError => &self.no_error,
            ResponseCode::NXDomain => &self.no_such_name,
            ResponseCode::ServFail => &self.server_failure,
            _ => &self.other,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// A reply that an upstream wrote.
    pub fn count_forwarded(&self) {
        self.forwarded.fetch_add(1, Ordering::Relaxed);
    }

    /// Goes up by one per call: whose turn it is among equal answers.
    pub fn turn(&self) -> usize {
        self.turns.fetch_add(1, Ordering::Relaxed)
    }

    pub fn render(&self) -> String {
        let mut text = String::new();
        let mut family = |name: &str, help: &str, label: &str, values: &[(&str, &AtomicU64)]| {
            // Writing to a String can't fail.
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
            for (value, counter) in values {
                let labels = if label.is_empty() { String::new() } else { format!("{{{label}=\"{value}\"}}") };
                let _ = writeln!(text, "{name}{labels} {}", counter.load(Ordering::Relaxed));
            }
        };
        family(
            "outrigger_dns_requests_total",
            "DNS questions received.",
            "proto",
            &[("udp", &self.udp_requests), ("tcp", &self.tcp_requests)],
        );
        let codes =
            [("NOERROR", &self.no_error), ("NXDOMAIN", &self.no_such_name), ("SERVFAIL", &self.server_failure), ("other", &self.other)];
        family("outrigger_dns_responses_total", "DNS replies written by this node.", "rcode", &codes);
        family("outrigger_dns_forwarded_total", "DNS replies passed on from an upstream resolver.", "", &[("", &self.forwarded)]);
        text
    }
}
