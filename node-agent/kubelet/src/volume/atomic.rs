//! A folder of files that a reader sees change as a whole: a new folder is written, then one symbolic link is swapped.
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use super::ownership;

/// The link that is swapped; all others point through it.
const DATA: &str = "..data";
const DATA_NEXT: &str = "..data_tmp";

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    pub bytes: Vec<u8>,
    pub mode: u32,
    /// The owner, where it isn't root.
    pub user: Option<u32>,
}

/// Relative paths and what is in them.
pub type Payload = BTreeMap<String, File>;

/// Makes the folder show exactly the payload. False when it did already.
pub fn write(dir: &Path, payload: &Payload, group: Option<u32>) -> io::Result<bool> {
    for path in payload.keys() {
        check_path(path)?;
    }
    let data = dir.join(DATA);
    let current = match fs::read_link(&data) {
        Ok(target) => Some(dir.join(target)),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    if let Some(current) = &current
        && same(current, payload)?
    {
        // A crash may have left links undone.
        link_entries(dir, payload)?;
        return Ok(false);
    }
    let next = dir.join(format!("..{}", stamp()));
    fs::create_dir(&next)?;
    fs::set_permissions(&next, fs::Permissions::from_mode(0o755))?;
    write_files(&next, payload)?;
    if let Some(group) = group {
        ownership::give_to_group(&next, group, false)?;
    }
    let next_link = dir.join(DATA_NEXT);
    match fs::remove_file(&next_link) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(next.file_name().unwrap_or_default(), &next_link)?;
    fs::rename(&next_link, &data)?;
    link_entries(dir, payload)?;
    unlink_stale(dir, payload)?;
    if let Some(current) = current
        && current != next
    {
        fs::remove_dir_all(current)?;
    }
    if let Some(group) = group {
        ownership::give_dir_to_group(dir, group)?;
    }
    Ok(true)
}

fn stamp() -> String {
    let now = jiff::Zoned::now();
    format!("{}.{:010}", now.strftime("%Y_%m_%d_%H_%M_%S"), now.subsec_nanosecond())
}

/// Relative, without `..`, and not in the way of the writer's own names.
fn check_path(path: &str) -> io::Result<()> {
    let parts: Vec<Component<'_>> = Path::new(path).components().collect();
    let plain = !parts.is_empty() && parts.iter().all(|part| matches!(part, Component::Normal(_)));
    if !plain || path.starts_with("..") || path.len() > 4096 {
        return Err(io::Error::new(ErrorKind::InvalidInput, format!("invalid path: {path:?}")));
    }
    Ok(())
}

fn files_below(dir: &Path, prefix: &Path, out: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = prefix.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            files_below(&entry.path(), &path, out)?;
        } else {
            out.push(path);
        }
    }
    Ok(())
}

fn same(current: &Path, payload: &Payload) -> io::Result<bool> {
    let mut existing = Vec::new();
    match files_below(current, Path::new(""), &mut existing) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        other => other?,
    }
    if existing.len() != payload.len() {
        return Ok(false);
    }
    for (path, file) in payload {
        match fs::read(current.join(path)) {
            Ok(bytes) if bytes == file.bytes => {}
            Ok(_) => return Ok(false),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn write_files(dir: &Path, payload: &Payload) -> io::Result<()> {
    for (path, file) in payload {
        let target = dir.join(path);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&target, &file.bytes)?;
        // The mode is what was asked for, whatever the umask.
        fs::set_permissions(&target, fs::Permissions::from_mode(file.mode))?;
        if let Some(user) = file.user {
            std::os::unix::fs::chown(&target, Some(user), None)?;
        }
    }
    Ok(())
}

fn top(path: &str) -> &str {
    path.split('/').find(|part| !part.is_empty()).unwrap_or(path)
}

fn link_entries(dir: &Path, payload: &Payload) -> io::Result<()> {
    for path in payload.keys() {
        let name = top(path);
        let link = dir.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA).join(name), link)?;
        }
    }
    Ok(())
}

fn unlink_stale(dir: &Path, payload: &Payload) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(text) = name.to_str() else { continue };
        if !text.starts_with("..") && entry.file_type()?.is_symlink() && !payload.keys().any(|path| top(path) == text) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        files.iter().map(|(path, text)| ((*path).to_owned(), File { bytes: text.as_bytes().to_vec(), mode: 0o644, user: None })).collect()
    }

    #[test]
    fn files_appear_change_and_vanish_together() {
        let dir = tempfile::tempdir().unwrap();
        let read = |path: &str| fs::read_to_string(dir.path().join(path)).ok();
        assert!(write(dir.path(), &payload(&[("a", "1"), ("sub/b", "2")]), None).unwrap());
        assert_eq!((read("a").as_deref(), read("sub/b").as_deref()), (Some("1"), Some("2")));
        let before = fs::read_link(dir.path().join(DATA)).unwrap();
        assert!(!write(dir.path(), &payload(&[("a", "1"), ("sub/b", "2")]), None).unwrap());
        assert_eq!(fs::read_link(dir.path().join(DATA)).unwrap(), before);
        assert!(write(dir.path(), &payload(&[("a", "3")]), None).unwrap());
        assert_eq!((read("a").as_deref(), read("sub/b")), (Some("3"), None));
        assert!(fs::symlink_metadata(dir.path().join("sub")).is_err());
        let folders = fs::read_dir(dir.path()).unwrap().filter(|entry| entry.as_ref().unwrap().file_type().unwrap().is_dir()).count();
        assert_eq!(folders, 1);
    }

    #[test]
    fn paths_stay_inside() {
        for bad in ["", "/etc/passwd", "../x", "a/../b", "..data"] {
            assert!(check_path(bad).is_err(), "{bad}");
        }
        assert!(check_path("a/b.c").is_ok());
    }

    #[test]
    fn an_empty_payload_is_an_empty_folder() {
        let dir = tempfile::tempdir().unwrap();
        assert!(write(dir.path(), &Payload::new(), None).unwrap());
        assert!(dir.path().join(DATA).is_dir());
    }
}
