//! What is mounted where, and taking it away.
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

/// The mount points of this process's mount namespace, in the order in which they were made.
pub fn mount_points() -> io::Result<Vec<PathBuf>> {
    Ok(parse(&std::fs::read_to_string("/proc/self/mountinfo")?))
}

fn parse(mountinfo: &str) -> Vec<PathBuf> {
    mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(|path| PathBuf::from(unescape(path))).collect()
}

/// `\040` and the like.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let raw = text.as_bytes();
    let mut at = 0;
    while at < raw.len() {
        let octal = raw.get(at + 1..at + 4).filter(|_| raw[at] == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                at += 4;
            }
            None => {
                bytes.push(raw[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    Ok(mount_points()?.iter().any(|point| point == path))
}

/// Unmounts everything at or below the folder, the last mounted first. Fails when something stays, so that a later removal
/// can't reach into a mounted file system.
pub fn unmount_below(dir: &Path) -> io::Result<()> {
    let below = |points: Vec<PathBuf>| points.into_iter().filter(|point| point.starts_with(dir)).collect::<Vec<_>>();
    for point in below(mount_points()?).iter().rev() {
        umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    }
    match below(mount_points()?).first() {
        None => Ok(()),
        Some(left) => Err(io::Error::other(format!("{} is still mounted", left.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        let text = "36 35 98:0 / /mnt/a\\040b rw,noatime master:1 - ext3 /dev/root rw\n37 35 0:5 /x /y rw - tmpfs tmpfs rw\n";
        assert_eq!(parse(text), [PathBuf::from("/mnt/a b"), PathBuf::from("/y")]);
    }
}
