//! Services as their users see them, in whichever proxy mode the lab runs.
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outrigger_e2e::{Lab, Namespace, eventually, shell, web};

const PATIENCE: Duration = Duration::from_secs(60);

/// The mode that the test run asked for is the one that every node says it uses.
#[test]
fn the_chosen_mode_is_the_one_asked_for() -> Result<()> {
    let lab = Lab::get()?;
    let asked = std::env::var("OUTRIGGER_PROXY_MODE").context("OUTRIGGER_PROXY_MODE is not set: `cargo xtask test` does that")?;
    let nodes = lab.json(&["get", "nodes"])?;
    let nodes = nodes["items"].as_array().context("no nodes")?;
    ensure!(nodes.len() == 2, "{} nodes", nodes.len());
    for node in nodes {
        let mode = node["metadata"]["annotations"]["outrigger.dev/proxy-mode"].as_str().unwrap_or("none");
        ensure!(mode == asked, "{}: asked for {asked}, runs {mode}", node["metadata"]["name"]);
    }
    Ok(())
}

#[test]
fn a_service_answers_by_address_name_and_node_port() -> Result<()> {
    let lab = Lab::get()?;
    let space = Namespace::create(&lab, "e2e-service")?;
    space.apply(&web("web", 3, "type: NodePort"))?;
    space.apply(&shell("client"))?;
    space.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    space.run(&["wait", "pod/client", "--for=condition=Ready", "--timeout=60s"])?;
    let service = space.json(&["get", "service", "web"])?;
    let address: SocketAddr = format!("{}:80", service["spec"]["clusterIP"].as_str().context("no cluster IP")?).parse()?;
    let node_port = service["spec"]["ports"][0]["nodePort"].as_u64().context("no node port")?;
    let fetch = |url: &str| space.run(&["exec", "client", "--", "timeout", "5", "wget", "-q", "-O", "-", url]);

    // Programming follows readiness by a moment, as everywhere.
    eventually(PATIENCE, || fetch(&format!("http://{address}/hostname")))?;
    let mut answered = BTreeSet::new();
    for _ in 0..30 {
        answered.insert(fetch(&format!("http://{address}/hostname"))?.trim().to_owned());
    }
    ensure!(answered.len() == 3, "three replicas, but only {answered:?} answered thirty requests");
    for name in ["web", "web.e2e-service", "web.e2e-service.svc.cluster.local"] {
        ensure!(fetch(&format!("http://{name}/hostname"))?.starts_with("web-"));
    }
    for node in ["node-1", "node-2"] {
        ensure!(lab.http_get(node, address, "/hostname")?.starts_with("web-"), "not from {node} itself");
        let port = SocketAddr::new(lab.node_address(node)?, u16::try_from(node_port)?);
        for from in ["outside", "node-1", "node-2"] {
            let answer = lab.http_get(from, port, "/hostname").with_context(|| format!("{from} to {port}"))?;
            ensure!(answer.starts_with("web-"), "{from} to {port}: {answer}");
        }
        ensure!(fetch(&format!("http://{port}/hostname"))?.starts_with("web-"), "not from a pod to {port}");
    }
    Ok(())
}

#[test]
fn a_service_without_endpoints_refuses_at_once() -> Result<()> {
    let lab = Lab::get()?;
    let space = Namespace::create(&lab, "e2e-empty")?;
    space.apply(&web("web", 1, ""))?;
    space.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    space.apply(&shell("client"))?;
    space.run(&["wait", "pod/client", "--for=condition=Ready", "--timeout=60s"])?;
    let fetch = || space.kubectl(&["exec", "client", "--", "timeout", "5", "wget", "-q", "-O", "-", "http://web/hostname"]).output();
    eventually(PATIENCE, || {
        ensure!(fetch()?.status.success(), "no answer yet");
        Ok(())
    })?;
    space.run(&["scale", "deployment/web", "--replicas=0"])?;
    eventually(PATIENCE, || {
        let answer = fetch()?;
        let text = String::from_utf8_lossy(&answer.stderr).into_owned();
        ensure!(!answer.status.success() && text.contains("refused"), "not refused: {text}");
        Ok(())
    })
}

#[test]
fn a_client_stays_with_its_endpoint_when_asked_to() -> Result<()> {
    let lab = Lab::get()?;
    let space = Namespace::create(&lab, "e2e-affinity")?;
    space.apply(&web("web", 3, "sessionAffinity: ClientIP"))?;
    space.apply(&shell("client"))?;
    space.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    space.run(&["wait", "pod/client", "--for=condition=Ready", "--timeout=60s"])?;
    let fetch = || space.run(&["exec", "client", "--", "timeout", "5", "wget", "-q", "-O", "-", "http://web/hostname"]);
    let first = eventually(PATIENCE, fetch)?;
    for _ in 0..15 {
        let again = fetch()?;
        ensure!(again == first, "the client was moved from {first} to {again}");
    }
    Ok(())
}
