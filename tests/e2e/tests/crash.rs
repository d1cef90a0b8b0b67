//! Parts that die at once, under traffic: nothing is lost, no connection is dropped, no container is restarted.
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outrigger_e2e::{BUSYBOX, Lab, Namespace, eventually, web};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

/// A pod whose only process is one connection through the Service: when that breaks, the container ends.
fn talker(service: &str) -> String {
    let request = format!("GET /hostname HTTP/1.1\\r\\nHost: {service}\\r\\n\\r\\n");
    format!(
        r#"apiVersion: v1
kind: Pod
metadata: {{name: talker}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers:
  - name: talker
    image: {BUSYBOX}
    command: ["sh", "-c", "(while true; do printf '{request}'; sleep 0.1; done) | nc {service} 80"]
"#
    )
}

struct Talk<'a> {
    space: &'a Namespace<'a>,
}

impl Talk<'_> {
    fn answers(&self) -> Result<usize> {
        Ok(self.space.run(&["logs", "talker"])?.matches("200 OK").count())
    }

    /// The one connection still carries answers, and is still the same one.
    fn goes_on(&self) -> Result<()> {
        let before = eventually(PATIENCE, || self.answers())?;
        eventually(PATIENCE, || {
            let now = self.answers()?;
            ensure!(now > before + 5, "no new answers: {before}, then {now}");
            Ok(())
        })?;
        let pod = self.space.json(&["get", "pod", "talker"])?;
        ensure!(pod["status"]["phase"] == "Running", "the connection broke: {}", pod["status"]["containerStatuses"]);
        Ok(())
    }
}

fn restarts(space: &Namespace<'_>) -> Result<Vec<(String, u64)>> {
    let pods = space.json(&["get", "pods"])?;
    let line = |pod: &Value| {
        let count = pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or_default();
        (pod["metadata"]["name"].as_str().unwrap_or_default().to_owned(), count)
    };
    Ok(pods["items"].as_array().context("no items")?.iter().map(line).collect())
}

/// Kills the program among writes, waits until another process of it works, and gives what was acknowledged.
fn crash(space: &Namespace<'_>, host: &str, program: &str, prefix: &str) -> Result<Vec<String>> {
    let running = space.lab.running.host(host)?;
    let (killed, renewed) = (running.processes(program)?, renewal(space, host)?);
    let acknowledged = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let names = (0..12).map(|number| format!("{prefix}-{number}"));
            names.filter(|name| space.run(&["create", "configmap", name, "--from-literal=a=b"]).is_ok()).collect::<Vec<_>>()
        });
        std::thread::sleep(Duration::from_millis(300));
        space.lab.kill(host, program)?;
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))
    })?;
    ensure!(!acknowledged.is_empty(), "nothing was written around the crash");
    eventually(PATIENCE, || {
        let now = running.processes(program)?;
        ensure!(!now.is_empty() && now.iter().all(|pid| !killed.contains(pid)), "{program} on {host} did not come back");
        Ok(())
    })?;
    eventually(PATIENCE, || {
        ensure!(renewal(space, host)? > renewed, "the node's lease is not renewed");
        Ok(())
    })?;
    Ok(acknowledged)
}

/// When the node's agent renewed its lease last.
fn renewal(space: &Namespace<'_>, node: &str) -> Result<String> {
    let lease = space.lab.json(&["get", "lease", "--namespace=kube-node-lease", node])?;
    Ok(lease["spec"]["renewTime"].as_str().context("no renewTime")?.to_owned())
}

#[test]
fn killed_parts_come_back_and_nothing_is_lost() -> Result<()> {
    let lab = Lab::get()?;
    let space = Namespace::create(&lab, "e2e-crash")?;
    space.apply(&web("web", 2, ""))?;
    space.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    space.apply(&talker("web"))?;
    space.run(&["wait", "pod/talker", "--for=condition=Ready", "--timeout=60s"])?;
    let talk = Talk { space: &space };
    talk.goes_on()?;
    let before = restarts(&space)?;

    for (host, program) in [("node-1", "outrigger-control"), ("node-1", "outrigger-node"), ("node-2", "outrigger-node")] {
        for round in 0..2 {
            let prefix = format!("kept-{program}-{host}-{round}");
            let acknowledged = crash(&space, host, program, &prefix)?;
            for name in &acknowledged {
                eventually(PATIENCE, || space.run(&["get", "configmap", name])).with_context(|| format!("{name} is lost"))?;
            }
            eventually(PATIENCE, || lab.run(&["wait", "node", "--all", "--for=condition=Ready", "--timeout=5s"]))?;
            talk.goes_on().with_context(|| format!("after {program} on {host} was killed"))?;
        }
    }
    ensure!(restarts(&space)? == before, "containers were restarted: {before:?}, now {:?}", restarts(&space)?);

    // And the cluster still works: a change is carried out.
    space.run(&["scale", "deployment/web", "--replicas=3"])?;
    space.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    talk.goes_on()
}
