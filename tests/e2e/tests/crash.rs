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
            // Written right before the crash: what was acknowledged must be there after it.
            let name = format!("kept-{program}-{host}-{round}");
            space.run(&["create", "configmap", &name, "--from-literal=a=b"])?;
            lab.kill(host, program)?;
            eventually(PATIENCE, || space.run(&["get", "configmap", &name])).with_context(|| format!("{name} is lost"))?;
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
