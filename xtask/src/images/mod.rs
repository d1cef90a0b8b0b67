//! Container images made of Debian packages and Go modules, as OCI layouts in the cache: no registry is needed.
pub mod conformance;
pub mod demo;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::paths;
use crate::progress::step;
use crate::tools::{self, run};

/// What the images are made by: when it changes, the cache has none of them.
const RECIPES: [&str; 3] = [include_str!("mod.rs"), include_str!("demo.rs"), include_str!("conformance.rs")];

/// What goes into an image.
pub struct Recipe {
    pub file: &'static str,
    /// The names that the image gets.
    pub names: Vec<String>,
    pub config: Value,
    /// Fills the root file system.
    pub fill: fn(&Path) -> Result<()>,
}

/// Builds the images that the cache lacks; each is a tar file that `ctr images import` takes.
pub fn build(recipes: &[Recipe]) -> Result<Vec<PathBuf>> {
    recipes.iter().map(image).collect()
}

pub const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where the cache has the image of that name.
pub fn file(name: &str) -> PathBuf {
    let recipes = digest(RECIPES.concat().as_bytes());
    paths::cache().join("images").join(&recipes[..12]).join(format!("{name}.tar"))
}

/// Builds one image unless the cache has it.
fn image(recipe: &Recipe) -> Result<PathBuf> {
    let file = file(recipe.file);
    let directory = file.with_file_name("");
    if file.is_file() {
        return Ok(file);
    }
    step(&format!("make the image {}", recipe.file), |_| {
        let work = directory.join(format!(".{}.{}", recipe.file, std::process::id()));
        let (root, layout) = (work.join("root"), work.join("layout"));
        fs::create_dir_all(&root).with_context(|| format!("create {}", root.display()))?;
        fs::create_dir_all(layout.join("blobs/sha256"))?;
        (recipe.fill)(&root)?;
        pack(recipe, &work, &root, &layout)?;
        let draft = work.join("image.tar");
        run(Command::new("tar").args(["--create", "--file"]).arg(&draft).arg("--directory").arg(&layout).arg("."))?;
        fs::rename(&draft, &file).with_context(|| format!("install {}", file.display()))?;
        fs::remove_dir_all(&work)?;
        Ok(file)
    })
}

fn pack(recipe: &Recipe, work: &Path, root: &Path, layout: &Path) -> Result<()> {
    let layer = work.join("layer.tar");
    run(Command::new("tar")
        .args(["--create", "--sort=name", "--mtime=@0", "--numeric-owner", "--owner=0", "--group=0", "--file"])
        .arg(&layer)
        .arg("--directory")
        .arg(root)
        .arg("."))?;
    let bytes = fs::read(&layer)?;
    let layer = blob(layout, "application/vnd.oci.image.layer.v1.tar", &bytes)?;
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": recipe.config,
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    });
    let config = blob(layout, "application/vnd.oci.image.config.v1+json", &serde_json::to_vec(&config)?)?;
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({"schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": [layer]});
    let manifest = blob(layout, manifest_type, &serde_json::to_vec(&manifest)?)?;
    let named = |name: &String| {
        let mut entry = manifest.clone();
        entry["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name});
        entry
    };
    let index = json!({"schemaVersion": 2, "manifests": recipe.names.iter().map(named).collect::<Vec<_>>()});
    fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(())
}

fn blob(layout: &Path, media_type: &str, bytes: &[u8]) -> Result<Value> {
    let digest = digest(bytes);
    fs::write(layout.join("blobs/sha256").join(&digest), bytes)?;
    Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len()}))
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Unpacks Debian packages into `root` without installing them.
pub fn unpack(root: &Path, packages: &[&str]) -> Result<()> {
    let downloads = root.with_file_name("packages");
    fs::create_dir_all(&downloads)?;
    // apt drops its privileges for downloads, which then can't write to a folder of root's.
    let mut download = Command::new("apt-get");
    download.current_dir(&downloads).args(["download", "-q", "-o", "APT::Sandbox::User=root"]).args(packages);
    or_after_update(|| run(&mut download))?;
    for entry in fs::read_dir(&downloads)? {
        run(Command::new("dpkg").arg("--extract").arg(entry?.path()).arg(root))?;
    }
    Ok(())
}

/// Does it again after `apt-get update` when it fails: the lists may be old, or missing.
fn or_after_update<T>(mut action: impl FnMut() -> Result<T>) -> Result<T> {
    action().or_else(|_| {
        run(Command::new("apt-get").args(["update", "-q"]))?;
        action()
    })
}

/// The accounts that a container's `user` may name, and the folders that every image has.
pub fn base(root: &Path) -> Result<()> {
    for directory in ["etc", "tmp", "var/log", "var/tmp", "run", "root", "proc", "sys", "dev"] {
        fs::create_dir_all(root.join(directory))?;
    }
    run(Command::new("chmod").arg("1777").arg(root.join("tmp")).arg(root.join("var/tmp")))?;
    let users = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\nnginx:x:101:101::/nonexistent:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n";
    fs::write(root.join("etc/passwd"), users)?;
    fs::write(root.join("etc/group"), "root:x:0:\nwww-data:x:33:\nnginx:x:101:\nnogroup:x:65534:\n")?;
    Ok(())
}

/// Unpacks packages with everything that they depend on.
pub fn unpack_closure(root: &Path, packages: &[&str]) -> Result<()> {
    let mut list = Command::new("apt-get");
    // With an empty status file apt takes nothing for installed, so the list is complete.
    list.args(["install", "--yes", "--print-uris", "--no-install-recommends", "-q", "-o", "Dir::State::status=/dev/null"]).args(packages);
    let listed = or_after_update(|| tools::output(&mut list))?;
    let files = listed.lines().filter_map(|line| line.split(' ').nth(1)).filter(|file| file.ends_with(".deb"));
    let names: Vec<&str> = files.filter_map(|file| file.split('_').next()).collect();
    unpack(root, &names)
}

/// Gives every busybox applet a name, unless a program of that name is there.
pub fn link_applets(root: &Path) -> Result<()> {
    let folders = ["bin", "sbin", "usr/bin", "usr/sbin"].map(|folder| root.join(folder));
    for applet in tools::output(Command::new(root.join("bin/busybox")).arg("--list"))?.lines() {
        if !folders.iter().any(|folder| folder.join(applet).symlink_metadata().is_ok()) {
            let link = root.join("bin").join(applet);
            symlink("busybox", &link).with_context(|| format!("link {}", link.display()))?;
        }
    }
    Ok(())
}
