//! emptyDir and hostPath.
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, Pod};
use nix::mount::{MsFlags, mount};

use super::{mounts, ownership};
use crate::pod::resources::pod_limit_milli;
use crate::quantity::{self, Resources};

/// A volume's own folder, with folders above it that everybody may pass but not list.
pub fn make_volume_dir(dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o777))
}

/// The work that makes an emptyDir at that place.
pub fn empty_dir(
    dir: PathBuf,
    ready: PathBuf,
    pod: &Pod,
    source: &EmptyDirVolumeSource,
    allocatable: &Resources,
) -> impl FnOnce() -> std::io::Result<()> + Send + 'static + use<> {
    let medium = source.medium.clone().unwrap_or_default();
    let limit = source.size_limit.as_ref().map(quantity::value).filter(|limit| *limit > 0);
    let size = memory_size(pod, limit, allocatable);
    let group = ownership::fs_group(pod);
    move || make_empty_dir(&dir, &ready, &medium, size, group)
}

/// The smallest of the volume's limit, the pod's memory limit and the node's memory.
fn memory_size(pod: &Pod, limit: Option<i64>, allocatable: &Resources) -> i64 {
    let pod_limit = pod_limit_milli(pod, "memory").map(|milli| milli / 1000).filter(|limit| *limit > 0);
    let node = quantity::value_of(Some(allocatable), "memory");
    [limit, pod_limit, node].into_iter().flatten().min().unwrap_or(0)
}

/// Notes that the volume needs no more setting up.
pub fn mark_ready(ready: &Path) -> std::io::Result<()> {
    if let Some(parent) = ready.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::write(ready, "")
}

/// `ready` is the file that tells that all of it has been done: until then it's done again, since the agent may have ended in between.
fn make_empty_dir(dir: &Path, ready: &Path, medium: &str, size: i64, group: Option<u32>) -> std::io::Result<()> {
    let mounted = mounts::is_mount_point(dir)?;
    if ready.exists() && dir.exists() && (medium.is_empty() || mounted) {
        return Ok(());
    }
    make_volume_dir(dir)?;
    match medium {
        "" => {}
        _ if mounted => {}
        "Memory" => {
            let options = if size > 0 { format!("size={size},mode=0777") } else { "mode=0777".into() };
            mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))?;
        }
        other => {
            let page = other
                .strip_prefix("HugePages")
                .map(|page| page.trim_start_matches('-'))
                .ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidInput, format!("unknown storage medium {other:?}")))?;
            let bytes = if page.is_empty() { 2 << 20 } else { quantity::nano(page).unwrap_or(0) / 1_000_000_000 };
            let options = format!("pagesize={bytes}");
            mount(Some("nodev"), dir, Some("hugetlbfs"), MsFlags::empty(), Some(options.as_str()))?;
        }
    }
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o777))?;
    if let Some(group) = group {
        ownership::give_to_group(dir, group, true)?;
    }
    mark_ready(ready)
}

/// What the path must be, by the volume's type; makes it where the type says so.
pub async fn check_host_path(path: &Path, kind: &str) -> Result<(), String> {
    let shown = path.display();
    let found = tokio::fs::metadata(path).await.ok();
    let is = |ok: bool, what: &str| if ok { Ok(()) } else { Err(format!("hostPath type check failed: {shown} is not a {what}")) };
    let file_type = found.as_ref().map(std::fs::Metadata::file_type);
    match kind {
        "" => Ok(()),
        "DirectoryOrCreate" => {
            if found.is_none() {
                tokio::fs::create_dir_all(path).await.map_err(|error| format!("failed to create {shown}: {error}"))?;
                return Ok(());
            }
            is(file_type.is_some_and(|kind| kind.is_dir()), "directory")
        }
        "Directory" => is(file_type.is_some_and(|kind| kind.is_dir()), "directory"),
        "FileOrCreate" => {
            if found.is_none() {
                let made = tokio::fs::OpenOptions::new().create(true).append(true).mode(0o644).open(path).await;
                return made.map(drop).map_err(|error| format!("failed to create {shown}: {error}"));
            }
            is(file_type.is_some_and(|kind| kind.is_file()), "file")
        }
        "File" => is(file_type.is_some_and(|kind| kind.is_file()), "file"),
        "Socket" => is(file_type.is_some_and(|kind| kind.is_socket()), "socket file"),
        "CharDevice" => is(file_type.is_some_and(|kind| kind.is_char_device()), "character device"),
        "BlockDevice" => is(file_type.is_some_and(|kind| kind.is_block_device()), "block device"),
        other => Err(format!("{other} is an invalid hostPath type")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn host_path_types() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        assert!(check_host_path(&file, "File").await.is_err());
        assert!(check_host_path(&file, "FileOrCreate").await.is_ok());
        assert!(check_host_path(&file, "File").await.is_ok());
        assert!(check_host_path(&file, "Directory").await.unwrap_err().contains("is not a directory"));
        assert!(check_host_path(&dir.path().join("a/b"), "DirectoryOrCreate").await.is_ok());
        assert!(check_host_path(Path::new("/dev/null"), "CharDevice").await.is_ok());
        assert!(check_host_path(&dir.path().join("none"), "").await.is_ok());
    }

    #[test]
    fn a_disk_empty_dir_keeps_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, ready) = (dir.path().join("v"), dir.path().join("plugins/v/ready"));
        make_empty_dir(&volume, &ready, "", 0, None).unwrap();
        std::fs::write(volume.join("x"), "1").unwrap();
        make_empty_dir(&volume, &ready, "", 0, None).unwrap();
        assert_eq!(std::fs::read_to_string(volume.join("x")).unwrap(), "1");
        assert_eq!(std::fs::metadata(&volume).unwrap().permissions().mode() & 0o777, 0o777);
    }

    #[test]
    fn an_empty_dir_left_half_made_is_finished_and_then_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, ready) = (dir.path().join("v"), dir.path().join("plugins/v/ready"));
        let group = std::fs::metadata(dir.path()).unwrap().gid();
        let mode = || std::fs::metadata(&volume).unwrap().mode() & 0o7777;
        make_volume_dir(&volume).unwrap();
        make_empty_dir(&volume, &ready, "", 0, Some(group)).unwrap();
        assert_eq!(mode(), 0o2777);
        std::fs::set_permissions(&volume, std::fs::Permissions::from_mode(0o700)).unwrap();
        make_empty_dir(&volume, &ready, "", 0, Some(group)).unwrap();
        assert_eq!(mode(), 0o700);
    }
}
