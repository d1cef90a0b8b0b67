//! `cargo xtask tidy`: the invariants of ARCHITECTURE.md that no compiler checks.
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::paths;

/// Crates that do no I/O, and what their manifests may therefore not name.
const PURE: [&str; 5] = ["control/api", "control/cel", "node-agent/desired", "ebpf/abi", "ebpf/logic"];
const IO: [&str; 8] = ["tokio", "nix", "libc", "aya", "kube", "hyper", "rtnetlink", "nftables"];

/// Longest file, in lines, before it has to be cut into rooms of its own.
const LONGEST_FILE: usize = 900;

/// Where `unsafe` may stand: where the kernel is touched.
const UNSAFE: [&str; 11] = [
    // Takes over the sockets that the starter opened (LISTEN_FDS).
    "control/src/app.rs",
    "ebpf/abi/",
    "ebpf/programs/",
    "node-agent/dataplane/src/ebpf/",
    "node-agent/dataplane/src/namespace.rs",
    "node-agent/dataplane/src/userspace/",
    "node-agent/dataplane/src/sys/",
    "node-agent/kubelet/src/sys/",
    "node-agent/network/src/sys/",
    "node-agent/src/sys/",
    "tests/",
];

pub fn run() -> Result<()> {
    let mut found = Vec::new();
    let root = paths::workspace();
    pure_manifests(&root, &mut found)?;
    let mut files = Vec::new();
    for part in ["control", "node-agent", "ebpf", "tests", "xtask"] {
        sources(&root.join(part), &mut files)?;
    }
    for file in &files {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        let name = file.strip_prefix(&root).unwrap_or(file).display().to_string();
        source(&name, &text, &mut found);
    }
    readers_and_writers(&root, &mut found)?;
    if !found.is_empty() {
        bail!("{} finding(s):\n  {}", found.len(), found.join("\n  "));
    }
    println!("  ✓ tidy: {} files", files.len());
    Ok(())
}

fn pure_manifests(root: &Path, found: &mut Vec<String>) -> Result<()> {
    for part in PURE {
        let manifest = root.join(part).join("Cargo.toml");
        let text = fs::read_to_string(&manifest).with_context(|| format!("read {}", manifest.display()))?;
        let dependencies = text.split("[dependencies]").nth(1).unwrap_or_default().split("\n[").next().unwrap_or_default();
        for line in dependencies.lines() {
            let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
            // ebpf/abi implements aya's marker trait behind a feature, which is no I/O.
            if IO.contains(&name) && !(part == "ebpf/abi" && line.contains("optional = true")) {
                found.push(format!("{part}/Cargo.toml: a crate without I/O depends on {name} (invariant 1)"));
            }
        }
    }
    Ok(())
}

/// Only outrigger-cluster speaks to the API in the agent.
fn readers_and_writers(root: &Path, found: &mut Vec<String>) -> Result<()> {
    for part in ["desired", "dataplane", "streaming"] {
        let manifest = root.join("node-agent").join(part).join("Cargo.toml");
        let text = fs::read_to_string(&manifest).with_context(|| format!("read {}", manifest.display()))?;
        if text.lines().any(|line| line.starts_with("kube.") || line.starts_with("kube ")) {
            found.push(format!("node-agent/{part}/Cargo.toml: only node-agent/cluster reads and writes the API (invariant 2)"));
        }
    }
    Ok(())
}

fn source(name: &str, text: &str, found: &mut Vec<String>) {
    let generated = text.starts_with("// @generated");
    if !generated && !text.starts_with("//!") && !text.starts_with("#!") {
        found.push(format!("{name}: no `//!` line at its head"));
    }
    let lines = text.lines().count();
    if !generated && lines > LONGEST_FILE {
        found.push(format!("{name}: {lines} lines, more than {LONGEST_FILE}"));
    }
    let has_unsafe = text.lines().any(|line| {
        let code = line.split("//").next().unwrap_or_default();
        // The word as code, not in a string or in a lint's name.
        code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")
    });
    if has_unsafe && !name.starts_with("xtask/src/tidy") && !UNSAFE.iter().any(|part| name.starts_with(part)) {
        found.push(format!("{name}: `unsafe` outside the files that touch the kernel (invariant 3)"));
    }
    for (index, line) in text.lines().enumerate() {
        if line.contains("#[ignore") && !name.starts_with("xtask/src/tidy") {
            found.push(format!("{name}:{}: a test that doesn't run", index + 1));
        }
    }
}

fn sources(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "target") {
                sources(&path, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}
