//! The eBPF programs: thin entry points around `outrigger-logic`. Built by `cargo xtask build-ebpf`.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod maps;
mod packet;
mod sight;
mod socket;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// By it an agent knows an object that was built for another version of the maps.
#[used]
#[unsafe(link_section = "outrigger_abi")]
#[unsafe(no_mangle)]
static MARKER: [u8; 16] = outrigger_abi::MARKER;
