//! Packages of Debian suites that the machine doesn't follow: downloaded with an apt state of their own, so that no suite is added to
//! the system's sources.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::tools::output;

/// What of a package is wanted.
#[derive(Clone, Copy)]
pub enum Part {
    /// The built package.
    Binary,
    /// The source as its authors published it, without Debian's changes.
    Original,
}

/// Downloads a package into `folder`, which then also has apt's state, and gives the file.
pub fn download(folder: &Path, suite: &str, part: Part, package: &str) -> Result<PathBuf> {
    for directory in ["lists/partial", "cache/archives/partial", "etc"] {
        fs::create_dir_all(folder.join(directory)).context("create a throwaway apt state")?;
    }
    let (kind, action, mark) = match part {
        Part::Binary => ("deb", &["download"][..], ".deb"),
        Part::Original => ("deb-src", &["source", "--download-only", "--tar-only"][..], ".orig.tar."),
    };
    let list = folder.join("sources.list");
    fs::write(&list, format!("{kind} {} {suite} main\n", mirror()?)).context("write a throwaway apt source")?;
    fs::write(folder.join("status"), "").context("write a throwaway dpkg status")?;
    output(apt_get(folder).arg("update")).with_context(|| format!("read {suite}'s list of packages"))?;
    output(apt_get(folder).args(action).arg(package)).with_context(|| format!("download {package} of {suite}"))?;
    let mut files = fs::read_dir(folder).context("list the throwaway apt state")?.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().contains(mark));
    files.find(named).with_context(|| format!("apt-get downloaded no file of {package}"))
}

fn apt_get(folder: &Path) -> Command {
    let mut command = Command::new("apt-get");
    command.current_dir(folder);
    for (key, value) in [
        ("Dir::Etc::sourcelist", folder.join("sources.list")),
        ("Dir::Etc::sourceparts", "/dev/null".into()),
        ("Dir::Etc::preferences", "/dev/null".into()),
        ("Dir::Etc::preferencesparts", "/dev/null".into()),
        ("Dir::State", folder.to_owned()),
        ("Dir::State::lists", folder.join("lists")),
        ("Dir::State::status", folder.join("status")),
        ("Dir::Cache", folder.join("cache")),
    ] {
        command.arg("-o").arg(format!("{key}={}", value.display()));
    }
    // The download runs as the caller: `_apt` can't enter a home folder. Translations and contents are not wanted.
    command.args(["-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none", "-qq"]);
    command
}

/// The mirror that the system's own apt uses for Debian.
fn mirror() -> Result<String> {
    let mut list = Command::new("apt-get");
    let targets = output(list.args(["indextargets", "--format", "$(REPO_URI) $(SUITE)", "Created-By: Packages"]))
        .context("ask apt for its Debian mirror")?;
    let mut mirrors = targets.lines().filter_map(|line| line.split_once(' ')).map(|(uri, _)| uri.trim_end_matches('/'));
    Ok(mirrors.find(|uri| uri.ends_with("/debian")).context("apt knows no Debian mirror: not a Debian machine?")?.to_owned())
}
