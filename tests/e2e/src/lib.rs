//! What the end-to-end tests share: the running lab, a stock kubectl, namespaces that clean up after themselves.
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use outrigger_lab::Running;
use serde_json::Value;

pub const NGINX: &str = "docker.io/library/nginx:1.22";
pub const BUSYBOX: &str = "docker.io/library/busybox:1.35";

/// The lab that `cargo xtask test` has started for these tests.
pub struct Lab {
    pub running: Running,
    kubectl: PathBuf,
    kubeconfig: PathBuf,
}

impl Lab {
    pub fn get() -> Result<Self> {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let (Some(directory), Some(kubectl)) = (variable("OUTRIGGER_LAB"), variable("OUTRIGGER_KUBECTL")) else {
            bail!("these tests need a running cluster: `cargo xtask test` starts one for them");
        };
        Ok(Self { running: Running::read(&directory)?, kubectl, kubeconfig: directory.join("kubeconfig") })
    }

    pub fn kubectl(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(words).stdin(Stdio::null());
        command
    }

    pub fn run(&self, words: &[&str]) -> Result<String> {
        output(&mut self.kubectl(words))
    }

    pub fn json(&self, words: &[&str]) -> Result<Value> {
        serde_json::from_str(&self.run(&[words, &["-o", "json"]].concat())?).context("parse kubectl's answer")
    }

    /// Ends every process named `program` on `host` at once, as a crash would.
    pub fn kill(&self, host: &str, program: &str) -> Result<()> {
        let pids = self.running.host(host)?.processes(program)?;
        ensure!(!pids.is_empty(), "no {program} runs on {host}");
        for pid in pids {
            kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).with_context(|| format!("kill {program} on {host}"))?;
        }
        Ok(())
    }

    /// An HTTP GET by a process of a host of the lab; gives the body.
    pub fn http_get(&self, host: &str, to: SocketAddr, path: &str) -> Result<String> {
        let talk = format!(
            "exec 3<>/dev/tcp/{}/{} && printf 'GET {path} HTTP/1.0\\r\\nHost: test\\r\\n\\r\\n' >&3 && timeout 3 cat <&3",
            to.ip(),
            to.port()
        );
        let answer = output(self.running.host(host)?.command("timeout").args(["5", "bash", "-c", &talk]).stdin(Stdio::null()))?;
        let (_, body) = answer.split_once("\r\n\r\n").context("no end of the headers")?;
        Ok(body.trim().to_owned())
    }

    pub fn node_address(&self, host: &str) -> Result<IpAddr> {
        Ok(self.running.host(host)?.address.context("the host has no address")?.into())
    }
}

/// A namespace of one test, deleted when it ends.
pub struct Namespace<'a> {
    pub lab: &'a Lab,
    pub name: String,
}

impl<'a> Namespace<'a> {
    pub fn create(lab: &'a Lab, name: &str) -> Result<Self> {
        lab.run(&["create", "namespace", name])?;
        let space = Self { lab, name: name.to_owned() };
        // Without it no pod is taken, and a controller makes it in its own time.
        eventually(Duration::from_secs(30), || space.run(&["get", "serviceaccount", "default"]))?;
        Ok(space)
    }

    pub fn kubectl(&self, words: &[&str]) -> Command {
        self.lab.kubectl(&[&["--namespace", &self.name], words].concat())
    }

    pub fn run(&self, words: &[&str]) -> Result<String> {
        output(&mut self.kubectl(words))
    }

    pub fn json(&self, words: &[&str]) -> Result<Value> {
        self.lab.json(&[&["--namespace", &self.name], words].concat())
    }

    pub fn apply(&self, manifest: &str) -> Result<()> {
        let mut child = self.kubectl(&["apply", "-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("kubectl takes no input")?.write_all(manifest.as_bytes())?;
        let result = child.wait_with_output()?;
        ensure!(result.status.success(), "kubectl apply: {}", String::from_utf8_lossy(&result.stderr));
        Ok(())
    }

    /// The names of the pods that a selector finds.
    pub fn pods(&self, selector: &str) -> Result<Vec<String>> {
        let pods = self.json(&["get", "pods", "--selector", selector])?;
        let items = pods["items"].as_array().cloned().unwrap_or_default();
        Ok(items.iter().filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned)).collect())
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() || std::env::var_os("OUTRIGGER_KEEP").is_some() {
            return;
        }
        if let Err(error) = self.lab.run(&["delete", "namespace", &self.name, "--wait=false"]) {
            eprintln!("the namespace {} is left: {error:#}", self.name);
        }
    }
}

pub fn output(command: &mut Command) -> Result<String> {
    let result = command.output().with_context(|| format!("run {}", Path::new(command.get_program()).display()))?;
    let (out, err) = (String::from_utf8_lossy(&result.stdout), String::from_utf8_lossy(&result.stderr));
    ensure!(result.status.success(), "{:?} failed ({}): {out}{err}", command.get_args().collect::<Vec<_>>(), result.status);
    Ok(out.into_owned())
}

/// Tries again until `look` succeeds; its last error is the reason for giving up.
pub fn eventually<T>(limit: Duration, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match look() {
            Ok(found) => return Ok(found),
            Err(error) if Instant::now() > deadline => return Err(error.context(format!("not within {} s", limit.as_secs()))),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// A Deployment of nginx that answers `/hostname` with its pod's name, and its Service of the given type.
pub fn web(name: &str, replicas: u8, service: &str) -> String {
    format!(
        r#"apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - name: nginx
        image: {NGINX}
        ports: [{{containerPort: 80, name: http}}]
        readinessProbe: {{httpGet: {{path: /hostname, port: http}}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  selector: {{app: {name}}}
  ports: [{{port: 80, targetPort: http, protocol: TCP}}]
  {service}
"#
    )
}

/// A pod that sleeps, to run commands in.
pub fn shell(name: &str) -> String {
    format!(
        r#"apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: shell
    image: {BUSYBOX}
    command: ["sleep", "3600"]
"#
    )
}
