//! Keeps the kernel from giving the node's own sockets the ports that connections are sent on from: both would meet at a backend.
use std::io;

use outrigger_abi::MASQUERADE_PORTS;

/// Ports that are only had by asking for them by number; one list for each network namespace, for both families.
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// To be called in the node's network namespace.
pub fn reserve() -> io::Result<()> {
    change(with)
}

/// Gives them back.
pub fn release() -> io::Result<()> {
    change(without)
}

fn change(to: impl Fn(&str) -> String) -> io::Result<()> {
    let present = std::fs::read_to_string(RESERVED)?;
    let wanted = to(present.trim());
    if wanted == present.trim() { Ok(()) } else { std::fs::write(RESERVED, format!("{wanted}\n")) }
}

fn own() -> String {
    format!("{}-{}", MASQUERADE_PORTS.0, MASQUERADE_PORTS.1)
}

fn with(present: &str) -> String {
    match present {
        "" => own(),
        _ if present.split(',').any(|range| range == own()) => present.to_owned(),
        _ => format!("{present},{}", own()),
    }
}

/// Where somebody else's ports touch ours the kernel has made one range of both, which is left.
fn without(present: &str) -> String {
    present.split(',').filter(|range| *range != own()).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_reservations_are_kept() {
        for (present, reserved) in [("", own()), ("8080,9000-9010", format!("8080,9000-9010,{}", own())), (&own(), own())] {
            assert_eq!(with(present), reserved);
        }
        assert_eq!(without(&format!("80,{},60000", own())), "80,60000");
        assert_eq!(without(&own()), "");
    }
}
