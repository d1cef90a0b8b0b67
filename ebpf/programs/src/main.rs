//! The eBPF programs: thin entry points around `outrigger-logic`. Built by `cargo xtask build-ebpf`.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod base;
mod header;
mod maps;
mod packet;
mod sight;
mod socket;

/// By it an agent knows an object that was built for another version of the maps.
#[used]
#[unsafe(link_section = "outrigger_abi")]
#[unsafe(no_mangle)]
static MARKER: [u8; 16] = outrigger_abi::MARKER;
