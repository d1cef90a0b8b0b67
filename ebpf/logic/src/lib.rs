//! The decisions of the eBPF programs, free of the kernel: tested on the host, compiled into the programs.
//!
//! [`service`] finds the frontend behind an address and chooses a backend; [`socket`] is what happens to a socket at connect,
//! send and receive; [`packet`] is what happens to a packet that no socket hook saw; [`policy`] says whether a pod's packet may
//! pass; [`hash`] gives connections and backends their places; [`sight`] is what is counted of it all. What they need of maps, clock and
//! chance comes through the traits, which the programs implement by helper calls and the tests by plain collections.
#![no_std]

pub mod hash;
pub mod packet;
pub mod policy;
pub mod service;
pub mod sight;
pub mod socket;

#[cfg(test)]
mod fake;
