//! What the kernel's table does with one frontend, read back from it: single elements and chains, never the whole.
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use outrigger_desired::{Address, Frontend};

use super::ops::{Set, TABLE};
use super::render::key;
use crate::backend::{BackendError, Result};

/// Chains lead to chains of endpoints (affinity), and those to nothing more.
const DEPTH: usize = 3;

pub(super) fn lookup(frontend: Frontend, outside: bool) -> Result<Option<Vec<SocketAddr>>> {
    let sets: &[Set] = match frontend.address {
        // The kernel refuses and drops before it translates.
        Address::Ip(_) => &[Set::NoEndpoints, Set::ServiceIps],
        Address::Node(_) => &[Set::NoEndpointPorts, Set::HostPorts, Set::NodePorts],
    };
    for set in sets {
        let name = set.name(frontend.address.family());
        let Some(text) = nft(&format!("get element inet {TABLE} {name} {{ {} }}", key(frontend)))? else { continue };
        let Some(chain) = goto(&text) else { return Ok(Some(Vec::new())) };
        // Only strangers are kept out by it.
        if chain == "drop-outside" && !outside {
            continue;
        }
        let mut found = Vec::new();
        collect(chain, outside, DEPTH, &mut found)?;
        found.sort();
        found.dedup();
        return Ok(Some(found));
    }
    Ok(None)
}

fn collect(chain: &str, outside: bool, depth: usize, found: &mut Vec<SocketAddr>) -> Result<()> {
    let Some(text) = nft(&format!("list chain inet {TABLE} {chain}"))?.filter(|_| depth > 0) else { return Ok(()) };
    for rule in text.lines() {
        if is_for_inside(rule) {
            match goto(rule) {
                Some(inside) if !outside => return collect(inside, outside, depth - 1, found),
                _ => continue,
            }
        }
        found.extend(endpoints(rule));
        for chain in rule.split("goto ").skip(1) {
            collect(word(chain), outside, depth - 1, found)?;
        }
    }
    Ok(())
}

/// Rules that tell the node and its pods from others.
fn is_for_inside(rule: &str) -> bool {
    rule.contains("goto ") && ["saddr @cluster-cidrs", "fib saddr type local", "iifname @pod-interfaces"].iter().any(|by| rule.contains(by))
}

fn goto(text: &str) -> Option<&str> {
    text.split("goto ").nth(1).map(word)
}

fn word(text: &str) -> &str {
    text.split([' ', ',', '\n', '}']).next().unwrap_or_default()
}

/// `dnat ip to A:P`, or `… map { 0 : A . P, 1 : A . P }`.
fn endpoints(rule: &str) -> Vec<SocketAddr> {
    let Some((_, target)) = rule.split_once(" dnat ") else { return Vec::new() };
    if let Some((_, map)) = target.split_once("map {") {
        let pair = |element: &str| {
            let (ip, port) = element.split_once(" : ")?.1.split_once(" . ")?;
            Some(SocketAddr::new(ip.trim().parse::<IpAddr>().ok()?, port.trim_matches([' ', '}']).parse().ok()?))
        };
        return map.split(',').filter_map(pair).collect();
    }
    target.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// `None` when there is no such thing.
fn nft(command: &str) -> Result<Option<String>> {
    let output = Command::new("nft").args(["--numeric", command]).output().map_err(|error| BackendError::kernel("run nft", error))?;
    Ok(output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_from_rules() {
        let texts = |rule: &str| endpoints(rule).iter().map(SocketAddr::to_string).collect::<Vec<_>>();
        assert_eq!(texts("meta l4proto 6 dnat ip to 10.0.0.1:80"), ["10.0.0.1:80"]);
        assert_eq!(texts("meta l4proto 6 dnat ip6 to [fd00::1]:80"), ["[fd00::1]:80"]);
        let map = "meta l4proto 6 dnat ip addr . port to numgen random mod 2 map { 0 : 10.0.0.1 . 80, 1 : 10.0.0.2 . 81 }";
        assert_eq!(texts(map), ["10.0.0.1:80", "10.0.0.2:81"]);
        assert!(texts("meta mark set meta mark | 0x00004000").is_empty());
    }

    #[test]
    fn chains_are_read_from_elements_and_rules() {
        assert_eq!(goto("elements = { 10.96.0.1 . 6 . 80 : goto svc/a/b//tcp4 }"), Some("svc/a/b//tcp4"));
        assert!(is_for_inside("ip saddr @cluster-cidrs4 goto in/x") && !is_for_inside("fib saddr type local meta mark set 1"));
    }
}
