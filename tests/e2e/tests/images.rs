//! Images from a registry (Debian's docker-registry, outside of the cluster): with credentials, without, and what isn't there.
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use outrigger_e2e::{BUSYBOX, Lab, Namespace, eventually, output};

const PATIENCE: Duration = Duration::from_secs(90);
const NODES: [&str; 2] = ["node-1", "node-2"];
const USER: &str = "alice:secret";
/// `USER` as htpasswd files have it.
const HTPASSWD: &str = "alice:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

struct Registry<'a> {
    lab: &'a Lab,
    address: String,
    directory: PathBuf,
    server: Child,
}

impl<'a> Registry<'a> {
    fn start(lab: &'a Lab) -> Result<Self> {
        let Some(program) = std::env::var_os("OUTRIGGER_REGISTRY").map(PathBuf::from) else {
            bail!("this test needs a registry: `cargo xtask test` unpacks one and says where it is");
        };
        let address = format!("{}:5000", lab.node_address("outside")?);
        let outside = lab.running.host("outside")?;
        let directory = outside.directory.join("registry");
        std::fs::create_dir_all(&directory)?;
        let path = |name: &str| directory.join(name);
        std::fs::write(path("users"), HTPASSWD)?;
        let config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{address}'}}\nauth: {{htpasswd: {{realm: lab, path: {}}}}}\n",
            path("data").display(),
            path("users").display()
        );
        std::fs::write(path("config.yml"), config)?;
        let log = std::fs::File::create(path("log"))?;
        let mut command = outside.command(&program.display().to_string());
        let server = command.arg("serve").arg(path("config.yml")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?;
        let registry = Self { lab, address, directory, server };
        // As users tell containerd that a registry speaks HTTP.
        for node in NODES {
            std::fs::create_dir_all(registry.hosts(node)?)?;
            let url = format!("http://{}", registry.address);
            std::fs::write(registry.hosts(node)?.join("hosts.toml"), format!("server = {url:?}\n[host.{url:?}]\n"))?;
        }
        Ok(registry)
    }

    fn hosts(&self, node: &str) -> Result<PathBuf> {
        Ok(self.lab.running.host(node)?.directory.join("certs.d").join(&self.address))
    }

    fn ctr(&self, words: &[&str]) -> Result<String> {
        let node = self.lab.running.host(NODES[0])?;
        let mut command: Command = node.command("ctr");
        command.arg("--address").arg(node.directory.join("containerd.sock")).args(["--namespace", "k8s.io", "images"]);
        output(command.args(words).stdin(Stdio::null()))
    }

    /// Has the registry hold busybox under this name, and no node.
    fn publish(&self, name: &str) -> Result<()> {
        self.ctr(&["tag", "--force", BUSYBOX, name])?;
        let log = || std::fs::read_to_string(self.directory.join("log")).unwrap_or_default();
        eventually(PATIENCE, || self.ctr(&["push", "--plain-http", "--user", USER, name]).with_context(log))?;
        self.ctr(&["remove", name])?;
        Ok(())
    }
}

impl Drop for Registry<'_> {
    fn drop(&mut self) {
        // What fails here is gone already. The child is not the registry itself: it waits for it.
        let _ = self.lab.kill("outside", "docker-registry");
        let _ = self.server.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
        for node in NODES {
            let _ = self.hosts(node).map(std::fs::remove_dir_all);
        }
    }
}

fn pod(name: &str, image: &str, more: &str) -> String {
    format!(
        r#"apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 0
  {more}
  containers:
  - name: main
    image: {image}
    command: ["sleep", "3600"]
---
"#
    )
}

#[test]
fn a_registry_serves_those_who_may_pull() -> Result<()> {
    let lab = Lab::get()?;
    let registry = Registry::start(&lab)?;
    let image = format!("{}/team/busybox:1", registry.address);
    registry.publish(&image)?;

    let space = Namespace::create(&lab, "e2e-images")?;
    let (user, password) = USER.split_once(':').context("no password")?;
    let credentials = [("--docker-server", registry.address.as_str()), ("--docker-username", user), ("--docker-password", password)];
    let credentials = credentials.map(|(flag, value)| format!("{flag}={value}"));
    let create = ["create", "secret", "docker-registry", "pull"];
    space.run(&[&create[..], &credentials.each_ref().map(String::as_str)].concat())?;

    let secret = "imagePullSecrets: [{name: pull}]";
    let absent = image.replace(":1", ":2");
    space.apply(&(pod("known", &image, secret) + &pod("absent", &absent, secret)))?;
    space.run(&["wait", "pod/known", "--for=condition=Ready", "--timeout=90s"])?;
    let status = space.json(&["get", "pod", "known"])?;
    let id = status["status"]["containerStatuses"][0]["imageID"].as_str().unwrap_or_default();
    ensure!(id.starts_with(&image.replace(":1", "@sha256:")), "imageID {id}");
    events(&space, "known", &[&format!("Pulling image \"{image}\""), &format!("Successfully pulled image \"{image}\" in ")])?;
    waits(&space, "absent", "ErrImagePull", "not found")?;
    events(&space, "absent", &["Error: ErrImagePull", "Error: ImagePullBackOff", &format!("Back-off pulling image \"{absent}\"")])?;

    // What a node has isn't for those without credentials either, as long as it asks the registry.
    space.apply(&pod("stranger", &image, "").replace("command:", "imagePullPolicy: Always\n    command:"))?;
    waits(&space, "stranger", "ErrImagePull", "401 Unauthorized")
}

/// Until the container waits for this reason, or for the back-off after it.
fn waits(space: &Namespace<'_>, pod: &str, reason: &str, message: &str) -> Result<()> {
    eventually(PATIENCE, || {
        let status = space.json(&["get", "pod", pod])?;
        let waiting = &status["status"]["containerStatuses"][0]["state"]["waiting"];
        let seen = [&waiting["reason"], &waiting["message"]].map(|text| text.as_str().unwrap_or_default());
        ensure!([reason, "ImagePullBackOff"].contains(&seen[0]) && seen[1].contains(message), "{status}");
        Ok(())
    })
}

fn events(space: &Namespace<'_>, pod: &str, messages: &[&str]) -> Result<()> {
    eventually(PATIENCE, || {
        let events = space.run(&["get", "events", "--field-selector", &format!("involvedObject.name={pod}")])?;
        for message in messages {
            ensure!(events.contains(message), "no {message:?} among the events:\n{events}");
        }
        Ok(())
    })
}
