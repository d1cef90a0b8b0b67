//! The hash that connections and backends get their places by. It knows no seed and no byte order: every node, of whatever age and
//! make, has to come to the same place.

use outrigger_abi::{Addr, Endpoint, Port};

/// One round of SplitMix64: each bit of the word changes about half of the result's.
#[inline(always)]
pub const fn mix(hash: u64, word: u64) -> u64 {
    let mut mixed = hash ^ word;
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// The start has no meaning but that of being none of the words.
const START: u64 = 0x6f75_7472_6967_6765;

/// A backend's.
#[inline(always)]
pub const fn endpoint(endpoint: &Endpoint) -> u64 {
    let (high, low, port) = endpoint.sort_key();
    mix(mix(mix(START, high), low), port as u64)
}

/// A connection's. The address that is dialled has no part in it, since a node port has another on each node.
#[inline(always)]
pub const fn connection(source: &Addr, sport: Port, dport: Port, protocol: u8) -> u32 {
    let (high, low) = source.sort_key();
    let rest = (protocol as u64) << 32 | (sport.host() as u64) << 16 | dport.host() as u64;
    (mix(mix(mix(START, high), low), rest) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::endpoint as at;

    #[test]
    fn places_never_change() {
        let from = at("192.168.0.9:40000");
        let found = (endpoint(&at("10.0.0.1:8080")), endpoint(&at("[fd00::1]:8080")));
        assert_eq!(found, (0xc81bc28f6e4387fa, 0xfbcace80bb726529));
        assert_eq!(connection(&from.addr, from.port, Port::new(80), 6), 0xdc0d91be);
    }
}
