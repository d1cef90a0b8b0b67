//! Container images made of Debian packages, as OCI layouts in the cache: no registry is needed.
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

pub const BUSYBOX: &str = "docker.io/library/busybox:1.35";
pub const NGINX: &str = "docker.io/library/nginx:1.22";
const PAUSE: &str = "registry.k8s.io/pause:3.10.1";

/// Raised when a recipe below changes, so that the cache is not taken for current.
const REVISION: u32 = 1;

/// What goes into an image.
pub struct Recipe {
    pub file: &'static str,
    /// The names that the image gets.
    pub names: Vec<String>,
    pub config: Value,
    /// Fills the root file system.
    pub fill: fn(&Path) -> Result<()>,
}

/// The images of the demo and the tests; each is a tar file that `ctr images import` takes.
pub fn build() -> Result<Vec<PathBuf>> {
    let recipes = [
        Recipe { file: "pause", names: vec![PAUSE.into()], config: json!({"Entrypoint": ["/pause"], "User": "65535:65535"}), fill: pause },
        Recipe {
            file: "busybox",
            names: vec![BUSYBOX.into(), "docker.io/library/busybox:latest".into()],
            config: json!({"Cmd": ["sh"], "Env": [PATH]}),
            fill: busybox,
        },
        Recipe {
            file: "nginx",
            names: vec![NGINX.into(), "docker.io/library/nginx:latest".into()],
            config: json!({"Cmd": ["nginx", "-g", "daemon off;"], "Env": [PATH], "ExposedPorts": {"80/tcp": {}}, "StopSignal": "SIGQUIT"}),
            fill: nginx,
        },
    ];
    recipes.into_iter().map(|recipe| image(&recipe)).collect()
}

pub const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Builds one image unless the cache has it.
pub fn image(recipe: &Recipe) -> Result<PathBuf> {
    let directory = paths::cache().join("images").join(format!("r{REVISION}"));
    let file = directory.join(format!("{}.tar", recipe.file));
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
    let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(layout.join("blobs/sha256").join(&digest), bytes)?;
    Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len()}))
}

/// Unpacks Debian packages into `root` without installing them.
pub fn unpack(root: &Path, packages: &[&str]) -> Result<()> {
    let downloads = root.with_file_name("packages");
    fs::create_dir_all(&downloads)?;
    // apt drops its privileges for downloads, which then can't write to a folder of root's.
    let mut download = Command::new("apt-get");
    download.current_dir(&downloads).args(["download", "-q", "-o", "APT::Sandbox::User=root"]).args(packages);
    if run(&mut download).is_err() {
        run(Command::new("apt-get").args(["update", "-q"]))?;
        run(&mut download)?;
    }
    for entry in fs::read_dir(&downloads)? {
        run(Command::new("dpkg").arg("--extract").arg(entry?.path()).arg(root))?;
    }
    Ok(())
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

pub fn busybox(root: &Path) -> Result<()> {
    base(root)?;
    unpack(root, &["busybox-static"])?;
    let program = root.join("bin/busybox");
    for applet in tools::output(Command::new(&program).arg("--list"))?.lines().filter(|applet| *applet != "busybox") {
        let link = root.join("bin").join(applet);
        if !link.exists() {
            symlink("busybox", &link).with_context(|| format!("link {}", link.display()))?;
        }
    }
    fs::create_dir_all(root.join("usr"))?;
    Ok(())
}

fn nginx(root: &Path) -> Result<()> {
    unpack(root, &["nginx", "nginx-common", "libc6", "libcrypt1", "libpcre2-8-0", "libssl3", "zlib1g", "busybox-static"])?;
    base(root)?;
    for applet in tools::output(Command::new(root.join("bin/busybox")).arg("--list"))?.lines() {
        let link = root.join("bin").join(applet);
        if !link.exists() {
            symlink("busybox", &link)?;
        }
    }
    for directory in ["var/lib/nginx", "var/log/nginx", "var/cache/nginx", "etc/nginx/conf.d", "usr/share/nginx/html"] {
        fs::create_dir_all(root.join(directory))?;
    }
    let config = "user www-data;\nworker_processes 1;\nerror_log /dev/stderr notice;\npid /run/nginx.pid;\nevents { worker_connections 1024; }\n\
        http {\n  include /etc/nginx/mime.types;\n  access_log /dev/stdout;\n  include /etc/nginx/conf.d/*.conf;\n}\n";
    fs::write(root.join("etc/nginx/nginx.conf"), config)?;
    fs::write(
        root.join("etc/nginx/conf.d/default.conf"),
        "server {\n  listen 80;\n  root /usr/share/nginx/html;\n  index index.html;\n  location = /hostname { default_type text/plain; return 200 \"$hostname\\n\"; }\n}\n",
    )?;
    // Debian's page tells how to set nginx up on Debian, which nobody in a container wants to know.
    fs::write(
        root.join("usr/share/nginx/html/index.html"),
        "<!DOCTYPE html>\n<title>Welcome to nginx!</title>\n<h1>Welcome to nginx!</h1>\n",
    )?;
    let _ = fs::remove_dir_all(root.join("usr/share/doc"));
    let _ = fs::remove_dir_all(root.join("usr/share/man"));
    Ok(())
}

/// The process that holds a pod's namespaces: it sleeps, and reaps orphans when the pod shares a PID namespace.
const PAUSE_SOURCE: &str = r"
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static void end(int signal) { (void)signal; _exit(0); }
static void reap(int signal) { (void)signal; while (waitpid(-1, NULL, WNOHANG) > 0); }
int main(void) {
    struct sigaction ending = {.sa_handler = end}, reaping = {.sa_handler = reap, .sa_flags = SA_NOCLDSTOP};
    sigaction(SIGINT, &ending, NULL);
    sigaction(SIGTERM, &ending, NULL);
    sigaction(SIGCHLD, &reaping, NULL);
    for (;;) pause();
}
";

fn pause(root: &Path) -> Result<()> {
    let source = root.with_file_name("pause.c");
    fs::write(&source, PAUSE_SOURCE)?;
    run(Command::new("cc").args(["-static", "-Os", "-s", "-o"]).arg(root.join("pause")).arg(&source))
}
