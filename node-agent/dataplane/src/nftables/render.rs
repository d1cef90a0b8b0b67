//! The part of the table that doesn't depend on Services, as nft text.
//!
//! The chains that lead to endpoints (`to4`, …) are filled with rules as they are needed; see `ops::Rule`.
use std::fmt::Write;

use ipnet::IpNet;
use outrigger_desired::Family;

use super::Surroundings;
use super::count::Tally;
use super::ops::{By, Chain, MASQUERADE_MARK, Set, Whom, digit, ip_word};
use crate::config::PodInterfaces;

/// A table that is asleep: what it holds takes effect when it is woken.
pub(super) fn skeleton(table: &str, around: &Surroundings) -> String {
    let mut text = format!("table inet {table} {{\n\tflags dormant;\n");
    for family in Family::ALL {
        for set in Set::all() {
            let _ = writeln!(text, "\t{}", set.declaration(family));
        }
        text.push_str(&interval_set("cluster-cidrs", family, &around.cluster_cidrs));
        text.push_str(&interval_set("nodeport-cidrs", family, &around.nodeport_addresses));
        Tally::ALL.into_iter().for_each(|tally| _ = writeln!(text, "\t{}", tally.declaration(family)));
    }
    // Rejecting in prerouting (Linux 5.9) needs no route to the Service's address.
    text.push_str(
        "	chain refuse {
		meta l4proto tcp reject with tcp reset
		reject with icmpx type port-unreachable
	}
",
    );
    counting(&mut text);
    drop_outside(&mut text, around);
    filter(&mut text, around);
    for family in Family::ALL {
        for inside in Chain::all(family).into_iter().filter(|chain| chain.whom == Whom::Inside) {
            let _ = writeln!(text, "\tchain {} {{\n\t}}", inside.name());
        }
        for chain in Chain::all(family).into_iter().filter(|chain| chain.whom == Whom::All) {
            entrance(&mut text, chain, around);
        }
    }
    services(&mut text, around);
    text.push_str(BASE);
    text.push_str("}\n");
    text
}

/// Each chain counts, and some have the last word. The kernel adds what it meets to the sets; once per connection, never per packet.
fn counting(text: &mut String) {
    let tally = |text: &mut String, tally: Tally| {
        for family in Family::ALL {
            let _ = writeln!(text, "\t\t{}", tally.rule(family));
        }
    };
    text.push_str("\tchain led {\n");
    for family in Family::ALL {
        for protocol in ["tcp", "udp", "sctp"] {
            let (ip, digit) = (ip_word(family), digit(family));
            // For a tuple's port nft has to know the protocol.
            let _ = writeln!(
                text,
                "\t\tmeta nfproto ipv{digit} meta l4proto {protocol} update @{} {{ ct original {ip} daddr . meta l4proto . ct original proto-dst . {ip} daddr . th dport counter }}",
                Tally::Led.name(family)
            );
        }
    }
    text.push_str("\t}\n\tchain no-endpoint {\n");
    tally(text, Tally::NoEndpoint);
    text.push_str("\t\tgoto refuse\n\t}\n\tchain no-port {\n");
    tally(text, Tally::NoPort);
    text.push_str("\t\tgoto refuse\n\t}\n\tchain not-local {\n");
    tally(text, Tally::LocalPolicy);
    text.push_str("\t\tdrop\n\t}\n\tchain not-allowed {\n");
    tally(text, Tally::SourceRange);
    text.push_str("\t\tdrop\n\t}\n");
}

/// With policy Local and no endpoint here, only clients inside are served.
fn drop_outside(text: &mut String, around: &Surroundings) {
    text.push_str("\tchain drop-outside {\n\t\tfib saddr type local return\n");
    for family in Family::ALL {
        if let Some(pods) = pods(around, family) {
            let _ = writeln!(text, "\t\t{pods}return");
        }
    }
    text.push_str("\t\tgoto not-local\n\t}\n");
}

/// Where a node port may be reached.
fn nodeport(around: &Surroundings, family: Family) -> String {
    if around.nodeport_addresses.is_empty() {
        String::new()
    } else {
        format!("{} daddr @nodeport-cidrs{} ", ip_word(family), digit(family))
    }
}

fn filter(text: &mut String, around: &Surroundings) {
    text.push_str("\tchain check {\n");
    for family in Family::ALL {
        let (ip, digit, nodeport) = (ip_word(family), digit(family), nodeport(around, family));
        let _ = writeln!(
            text,
            "		{ip} daddr . meta l4proto . th dport @firewall{digit} {ip} daddr . meta l4proto . th dport . {ip} saddr != @allowed{digit} goto not-allowed
		{ip} daddr . meta l4proto . th dport vmap @no-endpoints{digit}
		meta nfproto ipv{digit} {nodeport}fib daddr type local meta l4proto . th dport vmap @port-no-endpoints{digit}"
        );
    }
    text.push_str("\t}\n\tchain unknown-port {\n");
    for family in Family::ALL {
        let (ip, digit) = (ip_word(family), digit(family));
        let _ = writeln!(text, "\t\t{ip} daddr @cluster-ips{digit} fib daddr type != local goto no-port");
    }
    text.push_str("\t}\n");
}

/// The chain that a frontend's connections enter by.
fn entrance(text: &mut String, chain: Chain, around: &Surroundings) {
    let Chain { family, by, .. } = chain;
    let digit = digit(family);
    let (key, prefix) = match by {
        By::Address => (format!("{} daddr . meta l4proto . th dport", ip_word(family)), ""),
        By::Port => ("meta l4proto . th dport".into(), "port-"),
    };
    let mark = mark();
    let inside = Chain { whom: Whom::Inside, ..chain }.name();
    let _ = writeln!(text, "\tchain {} {{\n\t\t{key} @{prefix}masquerade{digit} {mark}", chain.name());
    if let Some(pods) = pods(around, family) {
        let _ = writeln!(text, "\t\t{key} @{prefix}split{digit} {pods}goto {inside}");
    }
    let _ = writeln!(
        text,
        "		{key} @{prefix}masquerade-node{digit} fib saddr type local {mark}
		{key} @{prefix}split{digit} fib saddr type local goto {inside}
	}}"
    );
}

fn services(text: &mut String, around: &Surroundings) {
    // TCP packets that begin no connection are never translated: they belong to a connection that is known to conntrack, or to one
    // that has to be refused.
    text.push_str("\tchain services {\n\t\tmeta l4proto tcp tcp flags & (fin | syn | rst | ack) != syn return\n");
    for family in Family::ALL {
        let (ip, digit, nodeport, mark) = (ip_word(family), digit(family), nodeport(around, family), mark());
        if let Some(strangers) = strangers(around, family) {
            let _ = writeln!(text, "\t\t{strangers}{ip} daddr @cluster-ips{digit} {mark}");
        }
        let loopback = if family == Family::V4 { "127.0.0.0/8" } else { "::1" };
        let _ = writeln!(
            text,
            "		{ip} daddr . meta l4proto . th dport @frontends{digit} goto to{digit}
		{ip} daddr != {loopback} fib daddr type local meta l4proto . th dport @host-ports{digit} goto to-port{digit}
		{ip} daddr != {loopback} {nodeport}fib daddr type local meta l4proto . th dport @node-ports{digit} goto to-port{digit}"
        );
    }
    text.push_str("\t}\n");
}

fn mark() -> String {
    format!("meta mark set meta mark | {MASQUERADE_MARK:#x}")
}

/// Matches this node's pods (by `--cluster-cidr`: the cluster's).
fn pods(around: &Surroundings, family: Family) -> Option<String> {
    detect(around, family, "")
}

/// Matches those who reach ClusterIPs by this node's grace; `None` when nobody can be told apart, so that nobody is masqueraded.
fn strangers(around: &Surroundings, family: Family) -> Option<String> {
    if around.masquerade_all { Some(String::new()) } else { detect(around, family, "!= ") }
}

fn detect(around: &Surroundings, family: Family, not: &str) -> Option<String> {
    let (ip, digit) = (ip_word(family), digit(family));
    match &around.pod_interfaces {
        Some(PodInterfaces::Bridge(name)) => Some(format!("iifname {not}\"{name}\" ")),
        Some(PodInterfaces::Prefix(prefix)) => Some(format!("iifname {not}\"{prefix}*\" ")),
        None if around.cluster_cidrs.iter().any(|net| Family::of(net.addr()) == family) => {
            Some(format!("{ip} saddr {not}@cluster-cidrs{digit} "))
        }
        None => None,
    }
}

const BASE: &str = "	chain filter-prerouting {
		type filter hook prerouting priority dstnat - 10; policy accept;
		ct state new jump check
	}
	chain filter-output {
		type filter hook output priority -110; policy accept;
		ct state new jump check
	}
	chain filter-prerouting-after {
		type filter hook prerouting priority dstnat + 10; policy accept;
		ct state new jump unknown-port
	}
	chain filter-output-after {
		type filter hook output priority -90; policy accept;
		ct state new jump unknown-port
	}
	chain nat-prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		jump services
	}
	chain nat-output {
		type nat hook output priority -100; policy accept;
		jump services
	}
	chain nat-postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ct status dnat jump led
		meta mark & 0x4000 == 0x4000 meta mark set meta mark ^ 0x4000 masquerade fully-random
		ct status dnat ip saddr . ip daddr @hairpin4 masquerade fully-random
		ct status dnat ip6 saddr . ip6 daddr @hairpin6 masquerade fully-random
	}
	chain nat-input {
		type nat hook input priority 100; policy accept;
		ct status dnat jump led
	}
";

/// What is left when another backend takes over. Translation of established connections needs some nat chain on each hook, and
/// connection tracking needs some rule that asks for it: the kernel takes it away with the last such rule.
pub(super) fn handover(table: &str) -> String {
    format!(
        "table inet {table} {{
	chain nat-prerouting {{ type nat hook prerouting priority dstnat; policy accept; }}
	chain nat-output {{ type nat hook output priority -100; policy accept; }}
	chain nat-input {{ type nat hook input priority 100; policy accept; }}
	chain nat-postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		ct state established accept
	}}
}}
"
    )
}

fn interval_set(name: &str, family: Family, nets: &[IpNet]) -> String {
    let (digit, kind) = match family {
        Family::V4 => ('4', "ipv4_addr"),
        Family::V6 => ('6', "ipv6_addr"),
    };
    let members: Vec<String> = nets.iter().filter(|net| Family::of(net.addr()) == family).map(|net| net.trunc().to_string()).collect();
    let elements = if members.is_empty() { String::new() } else { format!(" elements = {{ {} }}", members.join(", ")) };
    format!("\tset {name}{digit} {{ type {kind}; flags interval; auto-merge;{elements} }}\n")
}
