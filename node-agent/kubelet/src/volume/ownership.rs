//! Who may use a volume: fsGroup and the token's user.
use std::ffi::OsString;
use std::fs::Permissions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{Gid, fchownat};

use super::path_of;
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

/// Whether the pod's volumes are only given to its group where their own folder isn't yet.
pub fn only_on_root_mismatch(pod: &Pod) -> bool {
    spec(pod).security_context.as_ref().and_then(|context| context.fs_group_change_policy.as_deref()) == Some("OnRootMismatch")
}

fn bits(write: bool, is_dir: bool) -> u32 {
    (if write { 0o660 } else { 0o440 }) | if is_dir { SETGID | 0o110 } else { 0 }
}

/// Whether the volume's own folder is as [`give_to_group`] leaves it, which changes it last.
pub fn is_given(path: &Path, group: u32, write: bool) -> bool {
    let wanted = bits(write, true);
    std::fs::metadata(path).is_ok_and(|found| found.is_dir() && found.gid() == group && found.mode() & wanted == wanted)
}

/// Gives everything below to the group, readable (and writable where `write`), folders passing the group on.
///
/// Whoever uses the volume may change it meanwhile, so that no link below is followed, and what was opened is changed instead of
/// what has its name by then. Goes on after a failure; the first one is told.
pub fn give_to_group(path: &Path, group: u32, write: bool) -> io::Result<()> {
    let root = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut result = Ok(());
    // Each path, and whether all below it has been seen to.
    let mut pending = vec![(PathBuf::from("."), false)];
    while let Some((at, below_done)) = pending.pop() {
        if below_done {
            result = result.and(give_one(&root, &at, group, write));
            continue;
        }
        pending.push((at.clone(), true));
        match names_in(&root, &at) {
            Ok(names) => pending.extend(names.iter().map(|name| (at.join(name), false))),
            Err(error) => result = result.and(Err(error)),
        }
    }
    result
}

/// `None` when it has vanished.
fn open_below(root: &OwnedFd, at: &Path) -> io::Result<Option<OwnedFd>> {
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC);
    match openat2(root, at, how.resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS)) {
        Err(Errno::ENOENT) => Ok(None),
        opened => Ok(Some(opened?)),
    }
}

fn kind_of(mode: u32) -> SFlag {
    SFlag::from_bits_truncate(mode) & SFlag::S_IFMT
}

/// What is in the folder; nothing when it isn't one.
fn names_in(root: &OwnedFd, at: &Path) -> io::Result<Vec<OsString>> {
    let Some(opened) = open_below(root, at)? else { return Ok(Vec::new()) };
    if kind_of(fstat(&opened)?.st_mode) != SFlag::S_IFDIR {
        return Ok(Vec::new());
    }
    std::fs::read_dir(path_of(&opened))?.map(|entry| entry.map(|entry| entry.file_name())).collect()
}

fn give_one(root: &OwnedFd, at: &Path, group: u32, write: bool) -> io::Result<()> {
    let Some(opened) = open_below(root, at)? else { return Ok(()) };
    let mode = fstat(&opened)?.st_mode;
    let owned = fchownat(&opened, "", None, Some(Gid::from_raw(group)), AtFlags::AT_EMPTY_PATH).map_err(io::Error::from);
    if kind_of(mode) == SFlag::S_IFLNK {
        return owned;
    }
    let mode = (mode & 0o7777) | bits(write, kind_of(mode) == SFlag::S_IFDIR);
    owned.and(std::fs::set_permissions(path_of(&opened), Permissions::from_mode(mode)))
}

/// The folder alone.
pub fn give_dir_to_group(path: &Path, group: u32) -> io::Result<()> {
    let mode = std::fs::metadata(path)?.permissions().mode();
    std::os::unix::fs::chown(path, None, Some(group))?;
    std::fs::set_permissions(path, Permissions::from_mode(mode | SETGID | 0o550))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_below_is_given_but_what_links_point_to() {
        let (volume, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o7777;
        let set = |path: &Path, mode: u32| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        let (target, file, sub) = (outside.path().join("target"), volume.path().join("sub/file"), volume.path().join("sub"));
        std::fs::create_dir(&sub).unwrap();
        std::fs::write(&file, "").unwrap();
        std::fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(&target, volume.path().join("link")).unwrap();
        std::os::unix::fs::symlink(outside.path(), volume.path().join("sub/folder")).unwrap();
        nix::unistd::mkfifo(&volume.path().join("fifo"), Mode::from_bits_truncate(0o600)).unwrap();
        for (path, mode) in
            [(volume.path(), 0o700), (outside.path(), 0o700), (sub.as_path(), 0o700), (file.as_path(), 0o600), (target.as_path(), 0o600)]
        {
            set(path, mode);
        }
        // One's own group, so that the test needs no privileges.
        let group = volume.path().metadata().unwrap().gid();
        assert!(!is_given(volume.path(), group, true));
        give_to_group(volume.path(), group, true).unwrap();
        assert!(is_given(volume.path(), group, true) && !is_given(volume.path(), group + 1, true));
        assert_eq!((mode(volume.path()), mode(&sub), mode(&file)), (0o2770, 0o2770, 0o660));
        assert_eq!(mode(&volume.path().join("fifo")), 0o660);
        assert_eq!((mode(outside.path()), mode(&target)), (0o700, 0o600));
    }

    #[test]
    fn only_what_lacks_for_reading_is_added() {
        let volume = tempfile::tempdir().unwrap();
        let file = volume.path().join("f");
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, Permissions::from_mode(0o400)).unwrap();
        give_to_group(volume.path(), volume.path().metadata().unwrap().gid(), false).unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o440);
    }
}
