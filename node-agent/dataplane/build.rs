//! Embeds the eBPF objects that `cargo xtask build-ebpf` left in the workspace's target folder.
//!
//! Without them the crate builds all the same, with empty objects: the agent then says so at start and takes another mode.
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let manifest = std::env::var("CARGO_MANIFEST_DIR")?;
    let folder = Path::new(&manifest).join("../../target/bpf");
    std::fs::create_dir_all(&folder)?;
    for (name, variable) in [("outrigger", "OUTRIGGER_BPF_OBJECT"), ("outrigger-police", "OUTRIGGER_POLICE_OBJECT")] {
        let object = folder.canonicalize()?.join(format!("{name}.bpf.o"));
        // A path that doesn't exist would make cargo rebuild this crate each time.
        if !object.exists() {
            std::fs::write(&object, [])?;
        }
        println!("cargo::rerun-if-changed={}", object.display());
        println!("cargo::rustc-env={variable}={}", object.display());
    }
    Ok(())
}
