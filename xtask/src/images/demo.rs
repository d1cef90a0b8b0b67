//! The images of the demo: a web server, a shell, and the process that holds a pod's namespaces.
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::json;

use super::{PATH, Recipe, base, link_applets, unpack};
use crate::tools::run;

pub const BUSYBOX: &str = "docker.io/library/busybox:1.35";
pub const NGINX: &str = "docker.io/library/nginx:1.22";
const PAUSE: &str = "registry.k8s.io/pause:3.10.1";

pub fn recipes() -> Vec<Recipe> {
    vec![
        Recipe { file: "pause", names: vec![PAUSE.into()], config: json!({"Entrypoint": ["/pause"], "User": "65535:65535"}), fill: pause },
        Recipe {
            file: "busybox",
            names: vec![BUSYBOX.into(), "docker.io/library/busybox:latest".into()],
            config: json!({"Cmd": ["sh"], "Env": [PATH]}),
            fill: busybox,
        },
        Recipe { file: "nginx", names: vec![NGINX.into(), "docker.io/library/nginx:latest".into()], config: nginx_config(), fill: nginx },
    ]
}

pub fn nginx_config() -> serde_json::Value {
    json!({"Cmd": ["nginx", "-g", "daemon off;"], "Env": [PATH], "ExposedPorts": {"80/tcp": {}}, "StopSignal": "SIGQUIT"})
}

pub fn busybox(root: &Path) -> Result<()> {
    base(root)?;
    unpack(root, &["busybox-static"])?;
    link_applets(root)?;
    fs::create_dir_all(root.join("usr"))?;
    Ok(())
}

pub fn nginx(root: &Path) -> Result<()> {
    unpack(root, &["nginx", "nginx-common", "libc6", "libcrypt1", "libpcre2-8-0", "libssl3", "zlib1g", "busybox-static"])?;
    base(root)?;
    link_applets(root)?;
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
