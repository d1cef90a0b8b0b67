//! The CNI configuration that the container runtime reads, and the plugin's place in its binary folder.
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use ipnet::IpNet;
use serde_json::json;

use crate::cni::{LOOPBACK_NAME, PLUGIN_NAME};

const FILE_NAME: &str = "10-outrigger.conflist";
/// What Debian's containerd 1.6 speaks; newer runtimes take it as well.
const VERSION: &str = "1.0.0";

/// Puts the configuration into `directory`; the runtime sees the old file or the new one, never a part.
/// Returns whether anything changed.
pub fn write(directory: &Path, data_dir: &Path, agent_socket: &Path, pod_cidrs: &[IpNet], mtu: u32) -> io::Result<bool> {
    let text = render(data_dir, agent_socket, pod_cidrs, mtu);
    let path = directory.join(FILE_NAME);
    if fs::read_to_string(&path).is_ok_and(|current| current == text) {
        return Ok(false);
    }
    fs::create_dir_all(directory)?;
    // The runtime reads every *.conflist in the folder, so the unfinished file must not look like one.
    let temporary = directory.join(format!(".{FILE_NAME}.new"));
    fs::write(&temporary, text)?;
    fs::rename(&temporary, &path)?;
    Ok(true)
}

fn render(data_dir: &Path, agent_socket: &Path, pod_cidrs: &[IpNet], mtu: u32) -> String {
    let document = json!({
        "cniVersion": VERSION,
        "name": "outrigger",
        "plugins": [{
            "type": PLUGIN_NAME,
            "podCIDRs": pod_cidrs,
            "dataDir": data_dir,
            "agentSocket": agent_socket,
            "mtu": mtu,
            // Declared so that the runtime hands them over; the data path takes host ports from the pods themselves.
            "capabilities": {"portMappings": true},
        }],
    });
    format!("{document:#}\n")
}

/// Makes `directory/outrigger-cni` lead to `binary`, and `directory/loopback` too unless somebody installed one.
pub fn install_plugin(directory: &Path, binary: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    link(&directory.join(PLUGIN_NAME), binary)?;
    let loopback = directory.join(LOOPBACK_NAME);
    let is_foreign = match fs::read_link(&loopback) {
        Ok(target) => target.file_name() != binary.file_name(),
        // No link: a file, or nothing.
        Err(_) => loopback.exists(),
    };
    if is_foreign { Ok(()) } else { link(&loopback, binary) }
}

fn link(path: &Path, target: &Path) -> io::Result<()> {
    if fs::read_link(path).is_ok_and(|current| current == target) {
        return Ok(());
    }
    let temporary = path.with_extension("new");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(target, &temporary)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_only_what_changed() {
        let directory = tempfile::tempdir().unwrap();
        let socket = Path::new("/var/lib/agent.sock");
        let write = |cidr: &str| write(directory.path(), Path::new("/var/lib/x"), socket, &[cidr.parse().unwrap()], 1450).unwrap();
        assert!(write("10.0.0.0/24"));
        assert!(!write("10.0.0.0/24"));
        assert!(write("10.0.1.0/24"));
        let text = fs::read_to_string(directory.path().join(FILE_NAME)).unwrap();
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(document["plugins"][0]["podCIDRs"], json!(["10.0.1.0/24"]));
        assert_eq!(document["plugins"][0]["type"], "outrigger-cni");
    }

    #[test]
    fn the_plugin_is_a_link_that_can_move() {
        let directory = tempfile::tempdir().unwrap();
        for binary in ["/a/outrigger-node", "/b/outrigger-node"] {
            install_plugin(directory.path(), Path::new(binary)).unwrap();
            assert_eq!(fs::read_link(directory.path().join(PLUGIN_NAME)).unwrap(), Path::new(binary));
            assert_eq!(fs::read_link(directory.path().join("loopback")).unwrap(), Path::new(binary));
        }
        let other = tempfile::tempdir().unwrap();
        fs::write(other.path().join("loopback"), "another's").unwrap();
        install_plugin(other.path(), Path::new("/a/outrigger-node")).unwrap();
        assert_eq!(fs::read_to_string(other.path().join("loopback")).unwrap(), "another's");
    }
}
