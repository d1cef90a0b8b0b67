//! Installs what is missing: Debian packages, and upstream's tools built from the Go modules that `tests/conformance` pins.
use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::paths;
use crate::progress::step;

/// Upstream's version, in step with `tests/conformance/go.mod`.
pub const UPSTREAM: &str = "v1.35.4";

/// A program and the Debian package that brings it.
const PROGRAMS: [(&str, &str); 10] = [
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("nft", "nftables"),
    ("ip", "iproute2"),
    ("conntrack", "conntrack"),
    ("nsenter", "util-linux"),
    ("sysctl", "procps"),
    ("bzip2", "bzip2"),
    // Also the C++ library, which bpf-linker is linked with.
    ("c++", "build-essential"),
    ("make", "build-essential"),
];

/// What `cargo xtask up` needs beside the Rust toolchain.
pub fn install_runtime() -> Result<()> {
    install(&PROGRAMS)
}

/// Installs the packages of those programs that are not on the PATH.
pub fn install(programs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> = programs.iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    step(&format!("install {}", missing.join(", ")), |_| {
        // A container runtime's package starts its service; the lab runs its own, so services stay off while we install.
        const POLICY: &str = "#!/bin/sh\n# Made by `cargo xtask`, which removes it again.\nexit 101\n";
        let policy = Path::new("/usr/sbin/policy-rc.d");
        // Also one that an interrupted run has left.
        let ours = fs::read_to_string(policy).map_or(true, |text| text == POLICY);
        if ours {
            fs::write(policy, POLICY).context("write /usr/sbin/policy-rc.d: run as root")?;
            fs::set_permissions(policy, fs::Permissions::from_mode(0o755)).context("make /usr/sbin/policy-rc.d executable")?;
        }
        let result = run(Command::new("apt-get").args(["update", "-q"])).and_then(|()| {
            run(Command::new("apt-get")
                .args(["install", "-q", "-y", "--no-install-recommends"])
                .args(&missing)
                .env("DEBIAN_FRONTEND", "noninteractive"))
        });
        if ours {
            fs::remove_file(policy)?;
        }
        result
    })
}

/// A program's path, looked for where root's programs are even when the PATH lacks them.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/go/bin"].map(PathBuf::from);
    env::split_paths(&path).chain(extra).map(|directory| directory.join(program)).find(|file| file.is_file())
}

/// One of upstream's programs, built on first use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Upstream {
    Kubectl,
    Agnhost,
    E2eTest,
    Ginkgo,
    KubeApiserver,
    KubeProxy,
    Etcd,
}

impl Upstream {
    pub fn name(self) -> &'static str {
        match self {
            Self::Kubectl => "kubectl",
            Self::Agnhost => "agnhost",
            Self::E2eTest => "e2e.test",
            Self::Ginkgo => "ginkgo",
            Self::KubeApiserver => "kube-apiserver",
            Self::KubeProxy => "kube-proxy",
            Self::Etcd => "etcd",
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::Kubectl => "k8s.io/kubernetes/cmd/kubectl",
            Self::Agnhost => "k8s.io/kubernetes/test/images/agnhost",
            Self::E2eTest => "k8s.io/kubernetes/test/e2e",
            Self::Ginkgo => "github.com/onsi/ginkgo/v2/ginkgo",
            Self::KubeApiserver => "k8s.io/kubernetes/cmd/kube-apiserver",
            Self::KubeProxy => "k8s.io/kubernetes/cmd/kube-proxy",
            Self::Etcd => "go.etcd.io/etcd/server/v3",
        }
    }

    fn directory() -> PathBuf {
        paths::cache().join("upstream").join(UPSTREAM)
    }

    pub fn is_cached(self) -> bool {
        Self::directory().join(self.name()).is_file()
    }

    /// The program's path in the cache; builds it when it isn't there.
    pub fn get(self) -> Result<PathBuf> {
        let directory = Self::directory();
        let program = directory.join(self.name());
        if self.is_cached() {
            return Ok(program);
        }
        let mut command = go_build().with_context(|| format!("build {}", self.name()))?;
        step(&format!("build upstream's {} {UPSTREAM}", self.name()), |_| {
            fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
            let draft = directory.join(format!(".{}.{}", self.name(), std::process::id()));
            command.args(if self == Self::E2eTest { &["test", "-c"][..] } else { &["build"][..] });
            command.args(["-trimpath", "-ldflags", &link_flags(), "-o"]).arg(&draft).arg(self.package());
            run(&mut command)?;
            fs::rename(&draft, &program).with_context(|| format!("install {}", program.display()))
        })?;
        Ok(program)
    }
}

/// Go with the modules that `tests/conformance` pins.
pub fn go_build() -> Result<Command> {
    let mut command = Command::new(find("go").context("upstream's programs are built from Go modules: install Go 1.25 or later")?);
    command.current_dir(paths::workspace().join("tests/conformance")).env("CGO_ENABLED", "0").env("GOFLAGS", "-mod=readonly");
    Ok(command)
}

fn link_flags() -> String {
    let version = "k8s.io/component-base/version";
    let minor = UPSTREAM.split('.').nth(1).unwrap_or_default();
    format!(
        "-s -w -X {version}.gitVersion={UPSTREAM} -X {version}.gitMajor=1 -X {version}.gitMinor={minor} -X {version}.gitTreeState=clean"
    )
}

/// A stock kubectl: upstream's own when Go is there to build it, else the distribution's.
pub fn kubectl() -> Result<PathBuf> {
    if Upstream::Kubectl.is_cached() || find("go").is_some() {
        return Upstream::Kubectl.get();
    }
    install(&[("kubectl", "kubernetes-client")])?;
    find("kubectl").context("the package kubernetes-client brought no kubectl")
}

/// Runs a command quietly; its output is shown when it fails.
pub fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs a command and gives what it printed.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {name}"))?;
    if !output.status.success() {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("{name} failed ({}):\n{out}{err}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command whose output is for the user.
pub fn show(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("run {name}"))?;
    if status.success() { Ok(()) } else { bail!("{name} failed ({status})") }
}
