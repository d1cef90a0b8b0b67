//! The scenario list over each backend. Needs root; `SCENARIO=words` narrows it to the scenarios with these words in their name.
use std::path::Path;

use outrigger_dataplane::Mode;
use outrigger_scenarios::run::play_all;

fn play(mode: Mode) {
    let filter = std::env::var("SCENARIO").ok();
    if let Err(error) = play_all(Path::new(env!("CARGO_BIN_EXE_outrigger-scenario-host")), mode, filter.as_deref()) {
        panic!("{error:#}");
    }
}

#[test]
fn nftables() {
    play(Mode::Nftables);
}

#[test]
fn userspace() {
    play(Mode::Userspace);
}

#[test]
fn ebpf() {
    play(Mode::Ebpf);
}
