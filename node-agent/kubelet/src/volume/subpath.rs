//! A part of a volume, mounted so that a link inside the volume can't lead the mount out of it.
//!
//! The path is opened by openat2(2) beneath the volume's root, and what was opened (not the name) is bind-mounted to a place of the
//! pod's own; only that place is given to the runtime.
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fchmod, fstat, mkdirat};

use super::{mounts, path_of};

/// Whose mount it is: `<pod>/volume-subpaths/<volume>/<container>/<index>`.
#[derive(Clone, Debug)]
pub struct Place {
    pub pod_dir: PathBuf,
    pub container: String,
    pub index: usize,
}

/// The host path to mount for that part of the volume; the part is made as a folder when it isn't there.
pub fn prepare(volume: &Path, volume_name: &str, sub_path: &str, place: &Place) -> io::Result<PathBuf> {
    let root = open(volume, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let part = open_or_make(&root, sub_path)?;
    let target = place.pod_dir.join("volume-subpaths").join(volume_name).join(&place.container).join(place.index.to_string());
    let source = path_of(&part);
    let wanted = std::fs::metadata(&source)?;
    if mounts::is_mount_point(&target)? {
        let current = std::fs::metadata(&target)?;
        if (current.dev(), current.ino()) == (wanted.dev(), wanted.ino()) {
            return Ok(target);
        }
        // The file was replaced since the last start: what is mounted is the old one.
        umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    }
    if wanted.is_dir() {
        std::fs::create_dir_all(&target)?;
    } else {
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::OpenOptions::new().create(true).append(true).open(&target)?;
    }
    mount(Some(&source), &target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    Ok(target)
}

fn beneath() -> OpenHow {
    OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS)
}

fn open_or_make(root: &OwnedFd, path: &str) -> io::Result<OwnedFd> {
    match openat2(root, path, beneath()) {
        Ok(found) => return Ok(found),
        Err(Errno::ENOENT) => {}
        Err(Errno::EXDEV) => return Err(io::Error::other(format!("subpath \"{path}\" not within volume path"))),
        Err(error) => return Err(error.into()),
    }
    let mut current = openat2(root, ".", beneath())?;
    // A folder made here is as open as the volume itself, so that whoever may use the volume may use it.
    let mode = Mode::from_bits_truncate(fstat(root)?.st_mode & 0o777);
    let mut walked = PathBuf::new();
    for part in Path::new(path).components() {
        walked.push(part);
        let next = match openat2(root, &walked, beneath()) {
            Err(Errno::ENOENT) => {
                match mkdirat(&current, part.as_os_str(), mode) {
                    // Once more, as the umask took some of it.
                    Ok(()) => set_mode(&current, part.as_os_str(), mode | setgid(&current)?)?,
                    Err(Errno::EEXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                openat2(root, &walked, beneath())
            }
            other => other,
        };
        current = next?;
    }
    Ok(current)
}

/// Whoever uses the volume already may have put a link in the new folder's place: only a folder of that very name is changed.
fn set_mode(dir: &OwnedFd, name: &OsStr, mode: Mode) -> io::Result<()> {
    let how = beneath().flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC);
    fchmod(openat2(dir, name, how)?, mode)?;
    Ok(())
}

/// The bit that passes the folder's group on, where the folder above has it.
fn setgid(dir: &OwnedFd) -> io::Result<Mode> {
    Ok(Mode::from_bits_truncate(fstat(dir)?.st_mode) & Mode::S_ISGID)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_made_and_links_cannot_escape() {
        let volume = tempfile::tempdir().unwrap();
        let root = open(volume.path(), OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty()).unwrap();
        open_or_make(&root, "a/b").unwrap();
        assert!(volume.path().join("a/b").is_dir());
        std::os::unix::fs::symlink("a", volume.path().join("inside")).unwrap();
        open_or_make(&root, "inside/c").unwrap();
        assert!(volume.path().join("a/c").is_dir());
        std::os::unix::fs::symlink("/etc", volume.path().join("outside")).unwrap();
        assert!(open_or_make(&root, "outside").is_err());
        assert!(open_or_make(&root, "outside/x").is_err());
        std::os::unix::fs::symlink("../..", volume.path().join("up")).unwrap();
        assert!(open_or_make(&root, "up/etc").is_err());
    }

    #[test]
    fn a_link_in_the_new_folders_place_changes_nothing() {
        let (volume, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let before = outside.path().metadata().unwrap().mode();
        let root = open(volume.path(), OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty()).unwrap();
        std::fs::create_dir(volume.path().join("made")).unwrap();
        std::os::unix::fs::symlink(outside.path(), volume.path().join("link")).unwrap();
        std::fs::create_dir(volume.path().join("inside")).unwrap();
        std::os::unix::fs::symlink("inside", volume.path().join("near")).unwrap();
        let mode = Mode::from_bits_truncate(0o2777);
        set_mode(&root, OsStr::new("made"), mode).unwrap();
        assert_eq!(volume.path().join("made").metadata().unwrap().mode() & 0o7777, 0o2777);
        assert!(set_mode(&root, OsStr::new("link"), mode).is_err());
        assert!(set_mode(&root, OsStr::new("near"), mode).is_err());
        assert_eq!(outside.path().metadata().unwrap().mode(), before);
    }
}
