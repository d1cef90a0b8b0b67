//! Where things are: the workspace, the cache outside of it, a lab's directory.
use std::env;
use std::path::{Path, PathBuf};

/// The checkout.
pub fn workspace() -> PathBuf {
    // xtask is one level below the workspace's root.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// Tools and images, keyed by version; survives the checkout. `OUTRIGGER_CACHE` moves it.
pub fn cache() -> PathBuf {
    if let Some(path) = env::var_os("OUTRIGGER_CACHE") {
        return path.into();
    }
    let home = || env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    env::var_os("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from).join("outrigger")
}

/// Cargo's output directory.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), |path| workspace().join(PathBuf::from(path)))
}

/// What the cluster `name` keeps. Short, because sockets below it have at most 107 bytes.
pub fn lab(name: &str) -> PathBuf {
    Path::new("/var/lib/outrigger").join(name)
}
