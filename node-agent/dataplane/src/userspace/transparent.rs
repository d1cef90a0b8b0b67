//! Connections to endpoints in the client's name (TPROXY): what an endpoint answers to the client's address has to come here.
//!
//! Packets that belong to one of our sockets are marked, and what is marked is routed to this host.
use std::io::{self, Write};
use std::net::IpAddr;
use std::process::{Command, Stdio};

use netlink_sys::constants::NETLINK_ROUTE;
use outrigger_desired::{Entry, Family, Masquerade};

use super::table::Inside;
use crate::netlink::{self, Builder, Connection};

const MARK: u32 = 0x800;
/// Of the routing table and, so that it comes before the main one, of the rule that leads to it.
const ROUTES: u32 = 7932;
const PRIORITY: u32 = 7932;
const TABLE: &str = "outrigger-transparent";

const NEW_ROUTE: u16 = 24;
const NEW_RULE: u16 = 32;
const DELETE_RULE: u16 = 33;
const RTA_OIF: u16 = 4;
const RTA_TABLE: u16 = 15;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const TO_TABLE: u8 = 1;
const LOOPBACK_INDEX: u32 = 1;

/// Prepares the kernel; the error says what it lacks.
pub(super) fn enable() -> io::Result<()> {
    let connection = Connection::open(NETLINK_ROUTE)?;
    for family in Family::ALL {
        let (rule, route) = (rule(NEW_RULE, family), route(family));
        match connection.request(&route).and_then(|()| connection.request(&rule)) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            // A kernel without IPv6 has no such connections.
            Err(error) if family == Family::V6 && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            outcome => outcome?,
        }
    }
    nft(&format!(
        "add table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
	chain prerouting {{
		type filter hook prerouting priority mangle; policy accept;
		# Never matches; with it the kernel puts fragments together first.
		meta length 0 meta l4proto udp tproxy to :1
		meta l4proto {{ tcp, udp }} socket transparent 1 meta mark set meta mark | {MARK:#x}
	}}
}}
"
    ))
}

pub(super) fn disable() -> io::Result<()> {
    let connection = Connection::open(NETLINK_ROUTE)?;
    for family in Family::ALL {
        match connection.request(&rule(DELETE_RULE, family)) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EAFNOSUPPORT)) => {}
            outcome => outcome?,
        }
    }
    nft(&format!("add table inet {TABLE}\ndelete table inet {TABLE}\n"))
}

/// Whose name a connection to `endpoint` is made in, when not the node's: what the other modes wouldn't masquerade.
pub(super) fn source(entry: &Entry, inside: &Inside, client: IpAddr, endpoint: IpAddr) -> Option<IpAddr> {
    let keeps = match entry.masquerade {
        Masquerade::Always => false,
        Masquerade::OffCluster => inside.is_pod(client),
        Masquerade::FromNode => !inside.is_node(client),
    };
    // A pod drops what seems to come from itself.
    (keeps && client != endpoint).then_some(client)
}

/// Everything that is marked is routed to this host.
fn route(family: Family) -> Vec<u8> {
    let mut builder = Builder::default();
    let header = [number(family), 0, 0, 0, 0, 0, libc::RT_SCOPE_HOST, libc::RTN_LOCAL, 0, 0, 0, 0];
    builder.begin(NEW_ROUTE, netlink::ACK | netlink::CREATE | netlink::REPLACE, &header);
    builder.attribute(RTA_TABLE, &ROUTES.to_ne_bytes());
    builder.attribute(RTA_OIF, &LOOPBACK_INDEX.to_ne_bytes());
    builder.end();
    builder.take()
}

fn rule(kind: u16, family: Family) -> Vec<u8> {
    let flags = netlink::ACK | if kind == NEW_RULE { netlink::CREATE | netlink::EXCLUSIVE } else { 0 };
    let mut builder = Builder::default();
    builder.begin(kind, flags, &[number(family), 0, 0, 0, 0, 0, 0, TO_TABLE, 0, 0, 0, 0]);
    for (attribute, value) in [(FRA_PRIORITY, PRIORITY), (FRA_FWMARK, MARK), (FRA_FWMASK, MARK), (FRA_TABLE, ROUTES)] {
        builder.attribute(attribute, &value.to_ne_bytes());
    }
    builder.end();
    builder.take()
}

fn number(family: Family) -> u8 {
    (if family == Family::V4 { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn nft(text: &str) -> io::Result<()> {
    let mut child = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() { Ok(()) } else { Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())) }
}
