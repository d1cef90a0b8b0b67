//! Embeds the eBPF object that `cargo xtask build-ebpf` left in the workspace's target folder.
//!
//! Without one the crate builds all the same, with an empty object: the agent then says so at start and takes another mode.
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let manifest = std::env::var("CARGO_MANIFEST_DIR")?;
    let folder = Path::new(&manifest).join("../../target/bpf");
    std::fs::create_dir_all(&folder)?;
    let object = folder.canonicalize()?.join("outrigger.bpf.o");
    // A path that doesn't exist would make cargo rebuild this crate each time.
    if !object.exists() {
        std::fs::write(&object, [])?;
    }
    println!("cargo::rerun-if-changed={}", object.display());
    println!("cargo::rustc-env=OUTRIGGER_BPF_OBJECT={}", object.display());
    Ok(())
}
