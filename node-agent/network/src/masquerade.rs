//! Source addresses of packets that leave the cluster, in a table of our own.
//!
//! Pods are routable for every node, so only what goes elsewhere is rewritten: a reply to a pod's address would not
//! come back from there. The table is replaced as a whole in one transaction and never read.
use std::collections::BTreeSet;
use std::fmt::Write;
use std::io;
use std::net::IpAddr;
use std::process::Stdio;

use ipnet::IpNet;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

const TABLE: &str = "outrigger-network";

/// What the rules depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    pub own_cidrs: Vec<IpNet>,
    /// Destinations that know the way back to a pod: the cluster's pods and its nodes.
    pub cluster_cidrs: Vec<IpNet>,
    pub nodes: BTreeSet<IpAddr>,
}

/// The whole transaction. nft before 1.0.7 has no `destroy`, so the table is added before it is deleted.
pub fn render(rules: &Rules) -> String {
    let mut text = format!("add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
    for (name, kind, v4) in [("inside4", "ipv4_addr", true), ("inside6", "ipv6_addr", false)] {
        let cidrs = rules.cluster_cidrs.iter().chain(&rules.own_cidrs).map(|cidr| cidr.trunc());
        let nodes = rules.nodes.iter().map(|address| IpNet::from(*address));
        // The kernel refuses overlapping intervals.
        let inside = IpNet::aggregate(&cidrs.chain(nodes).filter(|net| net.addr().is_ipv4() == v4).collect::<Vec<_>>());
        let elements = inside.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let elements = if elements.is_empty() { String::new() } else { format!("\n\t\telements = {{ {elements} }}") };
        // Writing to a String can't fail.
        let _ = writeln!(text, "\tset {name} {{\n\t\ttype {kind}\n\t\tflags interval{elements}\n\t}}");
    }
    text.push_str("\tchain postrouting {\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n");
    for cidr in &rules.own_cidrs {
        let (family, set) = if cidr.addr().is_ipv4() { ("ip", "inside4") } else { ("ip6", "inside6") };
        let multicast = if cidr.addr().is_ipv4() { "224.0.0.0/4" } else { "ff00::/8" };
        let _ = writeln!(
            text,
            "\t\t{family} saddr {cidr} {family} daddr != @{set} {family} daddr != {multicast} oifname != \"lo\" counter masquerade random"
        );
    }
    text.push_str("\t}\n\tchain forward {\n\t\ttype filter hook forward priority filter; policy accept;\n");
    for cidr in &rules.own_cidrs {
        let family = if cidr.addr().is_ipv4() { "ip" } else { "ip6" };
        let _ = writeln!(text, "\t\t{family} saddr {cidr} counter accept\n\t\t{family} daddr {cidr} counter accept");
    }
    text.push_str("\t}\n}\n");
    text
}

/// Puts the rules into the current namespace's kernel.
pub async fn apply(rules: &Rules) -> io::Result<()> {
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = nft.stdin.take() {
        stdin.write_all(render(rules).as_bytes()).await?;
    }
    let output = nft.wait_with_output().await?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("nft: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_pods_to_the_outside_are_rewritten() {
        let rules = Rules {
            own_cidrs: vec!["10.244.1.0/24".parse().unwrap()],
            cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            nodes: ["192.168.0.1", "192.168.0.7"].map(|address| address.parse().unwrap()).into(),
        };
        let text = render(&rules);
        assert!(text.contains("elements = { 10.244.0.0/16, 192.168.0.1/32, 192.168.0.7/32 }"), "{text}");
        assert!(text.contains("ip saddr 10.244.1.0/24 ip daddr != @inside4 ip daddr != 224.0.0.0/4"), "{text}");
        assert!(!text.contains("ip6 saddr"), "{text}");
    }
}
