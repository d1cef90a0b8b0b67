//! Who may use a volume: fsGroup and the token's user.
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use k8s_openapi::api::core::v1::Pod;

use crate::pod::meta::{containers, ephemeral_containers, init_containers, spec};

const SETGID: u32 = 0o2000;

pub fn fs_group(pod: &Pod) -> Option<u32> {
    spec(pod).security_context.as_ref()?.fs_group.and_then(|group| u32::try_from(group).ok())
}

/// The one user that all containers of the pod run as, if there is one.
pub fn common_user(pod: &Pod) -> Option<u32> {
    let pod_user = spec(pod).security_context.as_ref().and_then(|context| context.run_as_user);
    let ephemeral = ephemeral_containers(pod);
    let mut users = containers(pod)
        .iter()
        .chain(init_containers(pod))
        .chain(&ephemeral)
        .map(|container| container.security_context.as_ref().and_then(|context| context.run_as_user).or(pod_user));
    let first = users.next()??;
    users.all(|user| user == Some(first)).then(|| u32::try_from(first).ok()).flatten()
}

/// Gives everything below to the group, readable (and writable where `write`), folders passing the group on.
pub fn give_to_group(path: &Path, group: u32, write: bool) -> io::Result<()> {
    let metadata = std::fs::symlink_metadata(path)?;
    if metadata.is_symlink() {
        return std::os::unix::fs::lchown(path, None, Some(group));
    }
    let bits = if write { 0o660 } else { 0o440 };
    let mode = metadata.permissions().mode() | bits;
    std::os::unix::fs::chown(path, None, Some(group))?;
    if metadata.is_dir() {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode | SETGID | 0o110))?;
        for entry in std::fs::read_dir(path)? {
            give_to_group(&entry?.path(), group, write)?;
        }
    } else {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// The folder alone.
pub fn give_dir_to_group(path: &Path, group: u32) -> io::Result<()> {
    let mode = std::fs::metadata(path)?.permissions().mode();
    std::os::unix::fs::chown(path, None, Some(group))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode | SETGID | 0o550))
}
