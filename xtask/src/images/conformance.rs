//! The images that upstream's conformance suite names, under the names that v1.35 gives them
//! (`test/utils/image/manifest.go`), made of Debian packages and the Go modules that `tests/conformance` pins.
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use super::demo::{busybox, nginx, nginx_config};
use super::{PATH, Recipe, base, link_applets, unpack_closure};
use crate::debian::{self, Part};
use crate::tools::{self, Upstream, run};

const REGISTRY: &str = "registry.k8s.io/e2e-test-images";
/// The suite that carries the busybox which upstream's image has, 1.37.0.
const BUSYBOX_SUITE: &str = "trixie";
/// What doesn't build everywhere: traffic control wants older kernel headers, fast hashes want x86.
const BUSYBOX_WITHOUT: [&str; 3] = ["TC", "SHA1_HWACCEL", "SHA256_HWACCEL"];

pub fn recipes() -> Vec<Recipe> {
    let named = |names: &[&str]| names.iter().map(|name| format!("{REGISTRY}/{name}")).collect::<Vec<_>>();
    let shell = || json!({"Cmd": ["sh"], "Env": [PATH]});
    let web = || json!({"Entrypoint": ["/agnhost"], "Cmd": ["test-webserver"], "Env": [PATH]});
    vec![
        Recipe {
            file: "agnhost",
            names: named(&["agnhost:2.59", "agnhost:2.55"]),
            config: json!({"Entrypoint": ["/agnhost"], "Cmd": ["pause"], "Env": [PATH], "ExposedPorts": {"80/tcp": {}, "8080/tcp": {}, "8081/tcp": {}, "9376/tcp": {}, "5000/tcp": {}}}),
            fill: agnhost,
        },
        Recipe { file: "e2e-busybox", names: named(&["busybox:1.37.0-1"]), config: shell(), fill: upstream_busybox },
        Recipe { file: "e2e-nginx", names: named(&["nginx:1.14-4"]), config: nginx_config(), fill: nginx },
        Recipe { file: "e2e-nginx-new", names: named(&["nginx:1.15-4"]), config: nginx_config(), fill: nginx_new },
        Recipe { file: "dnsutils", names: named(&["jessie-dnsutils:1.7"]), config: shell(), fill: dnsutils },
        Recipe { file: "ipc-utils", names: named(&["ipc-utils:1.3"]), config: shell(), fill: ipc_utils },
        Recipe { file: "perl", names: named(&["perl:5.26"]), config: json!({"Cmd": ["perl"], "Env": [PATH]}), fill: perl },
        Recipe {
            file: "nonroot",
            names: named(&["nonroot:1.4"]),
            config: json!({"Cmd": ["sh"], "User": "1234", "Env": [PATH]}),
            fill: busybox,
        },
        Recipe { file: "nonewprivs", names: named(&["nonewprivs:1.3"]), config: json!({"Cmd": ["nnp"], "Env": [PATH]}), fill: nonewprivs },
        Recipe { file: "kitten", names: named(&["kitten:1.7"]), config: web(), fill: kitten },
        Recipe { file: "nautilus", names: named(&["nautilus:1.7"]), config: web(), fill: nautilus },
        Recipe {
            file: "regression-issue-74839",
            names: named(&["regression-issue-74839:1.4"]),
            config: json!({"Entrypoint": ["/regression-issue-74839"]}),
            fill: regression_issue_74839,
        },
        Recipe {
            file: "resource-consumer",
            names: named(&["resource-consumer:1.13"]),
            config: json!({"Entrypoint": ["/consumer"], "Env": [PATH]}),
            fill: resource_consumer,
        },
        Recipe {
            file: "sample-apiserver",
            names: named(&["sample-apiserver:1.29.2"]),
            config: json!({"Entrypoint": ["/sample-apiserver"]}),
            fill: sample_apiserver,
        },
        Recipe {
            file: "etcd",
            names: vec!["registry.k8s.io/etcd:3.6.6-0".into()],
            config: json!({"Cmd": ["etcd"], "Env": [PATH]}),
            fill: etcd,
        },
    ]
}

/// Busybox as its authors have it. Debian's takes back that the shell hands on variables whose names aren't those of shell variables.
fn upstream_busybox(root: &Path) -> Result<()> {
    base(root)?;
    let download = root.with_file_name("busybox-download");
    let archive = debian::download(&download, BUSYBOX_SUITE, Part::Original, "busybox")?;
    let source = root.with_file_name("busybox");
    fs::create_dir_all(&source)?;
    run(Command::new("tar").args(["--extract", "--strip-components=1", "--file"]).arg(&archive).arg("--directory").arg(&source))?;
    let make = |arguments: &[&str]| run(Command::new("make").current_dir(&source).args(arguments));
    make(&["defconfig"])?;
    let config = source.join(".config");
    fs::write(&config, configured(&fs::read_to_string(&config)?, &["STATIC"], &BUSYBOX_WITHOUT)).context("configure busybox")?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    make(&[format!("-j{jobs}").as_str(), "busybox"])?;
    for directory in ["bin", "usr"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::copy(source.join("busybox"), root.join("bin/busybox")).context("install busybox")?;
    link_applets(root)
}

/// A busybox configuration with these options switched on and off.
fn configured(config: &str, on: &[&str], off: &[&str]) -> String {
    let switched = |line: &str| {
        let unset = line.strip_prefix("# CONFIG_").and_then(|rest| rest.strip_suffix(" is not set"));
        let set = line.strip_prefix("CONFIG_").and_then(|rest| rest.strip_suffix("=y"));
        match (unset, set) {
            (Some(name), _) if on.contains(&name) => format!("CONFIG_{name}=y\n"),
            (_, Some(name)) if off.contains(&name) => format!("# CONFIG_{name} is not set\n"),
            _ => format!("{line}\n"),
        }
    };
    config.lines().map(switched).collect()
}

fn go_build(package: &str, output: &Path) -> Result<()> {
    if let Some(parent) = output.parent() {
        fs::create_dir_all(parent)?;
    }
    run(tools::go_build()?.args(["build", "-trimpath", "-ldflags", "-s -w", "-o"]).arg(output).arg(package))
}

/// A file of upstream's module that no build brings.
fn upstream_file(name: &str) -> Result<Vec<u8>> {
    let directory = tools::output(tools::go_build()?.args(["list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes"]))?;
    let path = Path::new(directory.trim()).join(name);
    fs::read(&path).with_context(|| format!("read {}", path.display()))
}

fn agnhost(root: &Path) -> Result<()> {
    let tools = ["curl", "bind9-dnsutils", "netcat-openbsd", "iproute2", "iperf", "ca-certificates"];
    unpack_closure(root, &[&GLIBC_TOOLS[..], &tools].concat())?;
    base(root)?;
    glibc_tools(root)?;
    // Debian chooses among its netcats when a package is installed, and these are only unpacked.
    link(root, "bin/nc", "nc.openbsd")?;
    fs::copy(Upstream::Agnhost.get()?, root.join("agnhost"))?;
    symlink("agnhost", root.join("agnhost-2"))?;
    fs::create_dir_all(root.join("uploads"))?;
    for name in ["localhost.crt", "localhost.key"] {
        fs::write(root.join(name), upstream_file(&format!("test/images/agnhost/porter/{name}"))?)?;
    }
    append(root, "etc/passwd", "user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh\n")?;
    append(root, "etc/group", "user-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n")
}

/// What images for probing names and addresses have besides their own tools; `libc-bin` brings `getent`.
const GLIBC_TOOLS: [&str; 3] = ["bash", "libc-bin", "busybox-static"];

/// Bash is their `sh`: Debian's busybox, as a shell, runs its own applets whatever programs the PATH has (its `nc` knows no UDP).
fn glibc_tools(root: &Path) -> Result<()> {
    link(root, "bin/sh", "bash")?;
    link_applets(root)?;
    // Without it glibc asks DNS first, and /etc/hosts only when there is no DNS.
    fs::write(root.join("etc/nsswitch.conf"), "hosts: files dns\n").context("write etc/nsswitch.conf")
}

fn link(root: &Path, name: &str, to: &str) -> Result<()> {
    let link = root.join(name);
    let _ = fs::remove_file(&link);
    symlink(to, &link).with_context(|| format!("link {}", link.display()))
}

fn append(root: &Path, name: &str, text: &str) -> Result<()> {
    let path = root.join(name);
    let old = fs::read_to_string(&path)?;
    fs::write(&path, old + text).with_context(|| format!("write {}", path.display()))
}

fn nginx_new(root: &Path) -> Result<()> {
    nginx(root)?;
    // Content of its own: the two images are told apart by digest.
    fs::write(root.join("etc/nginx/version"), "1.15\n").context("mark the newer nginx")
}

fn dnsutils(root: &Path) -> Result<()> {
    unpack_closure(root, &[&GLIBC_TOOLS[..], &["bind9-dnsutils"]].concat())?;
    base(root)?;
    glibc_tools(root)
}

fn ipc_utils(root: &Path) -> Result<()> {
    unpack_closure(root, &["util-linux", "busybox-static"])?;
    base(root)?;
    link_applets(root)
}

fn perl(root: &Path) -> Result<()> {
    unpack_closure(root, &["perl", "busybox-static"])?;
    base(root)?;
    link_applets(root)
}

fn nonewprivs(root: &Path) -> Result<()> {
    busybox(root)?;
    let program = root.join("usr/local/bin/nnp");
    go_build("k8s.io/kubernetes/test/images/nonewprivs", &program)?;
    run(Command::new("chmod").arg("4755").arg(&program))
}

fn kitten(root: &Path) -> Result<()> {
    web(root, "kitten", "kitten.jpg")
}

fn nautilus(root: &Path) -> Result<()> {
    web(root, "nautilus", "nautilus.jpg")
}

fn web(root: &Path, name: &str, picture: &str) -> Result<()> {
    busybox(root)?;
    fs::copy(Upstream::Agnhost.get()?, root.join("agnhost"))?;
    for file in [picture, "data.json"] {
        fs::write(root.join(file), upstream_file(&format!("test/images/{name}/html/{file}"))?)?;
    }
    Ok(())
}

fn regression_issue_74839(root: &Path) -> Result<()> {
    base(root)?;
    go_build("k8s.io/kubernetes/test/images/regression-issue-74839", &root.join("regression-issue-74839"))
}

fn resource_consumer(root: &Path) -> Result<()> {
    unpack_closure(root, &["stress", "busybox-static"])?;
    base(root)?;
    link_applets(root)?;
    go_build("k8s.io/kubernetes/test/images/resource-consumer", &root.join("consumer"))?;
    go_build("k8s.io/kubernetes/test/images/resource-consumer/consume-cpu", &root.join("consume-cpu"))
}

fn sample_apiserver(root: &Path) -> Result<()> {
    base(root)?;
    go_build("k8s.io/sample-apiserver", &root.join("sample-apiserver"))
}

fn etcd(root: &Path) -> Result<()> {
    unpack_closure(root, &["etcd-server", "etcd-client", "busybox-static"])?;
    base(root)?;
    link_applets(root)?;
    fs::create_dir_all(root.join("usr/local/bin"))?;
    for program in ["etcd", "etcdctl"] {
        symlink(format!("/usr/bin/{program}"), root.join("usr/local/bin").join(program))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_switched_by_their_whole_name() {
        let config =
            "# CONFIG_STATIC is not set\nCONFIG_STATIC_LIBGCC=y\nCONFIG_TC=y\nCONFIG_FEATURE_TC_INGRESS=y\nCONFIG_PREFIX=\"./_install\"\n";
        let wanted = config.replace("# CONFIG_STATIC is not set", "CONFIG_STATIC=y").replace("CONFIG_TC=y", "# CONFIG_TC is not set");
        assert_eq!(configured(config, &["STATIC"], &["TC", "LATER"]), wanted);
    }
}
