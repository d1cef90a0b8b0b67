//! NetworkPolicies as their users see them, on pods of both nodes.
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outrigger_e2e::{Lab, Namespace, eventually, shell, web};

const PATIENCE: Duration = Duration::from_secs(30);

/// A pod that answers and one that asks, before, while and after policies isolate them.
#[test]
fn policies_cut_what_they_do_not_allow_and_free_it_again() -> Result<()> {
    let lab = Lab::get()?;
    let space = Namespace::create(&lab, "e2e-policy")?;
    space.apply(&web("web", 2, "type: ClusterIP"))?;
    space.apply(&shell("client"))?;
    space.apply(&shell("friend"))?;
    space.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    for pod in ["client", "friend"] {
        space.run(&["wait", &format!("pod/{pod}"), "--for=condition=Ready", "--timeout=60s"])?;
    }
    space.run(&["label", "pod", "friend", "role=friend"])?;
    let service = space.json(&["get", "service", "web"])?;
    let address = service["spec"]["clusterIP"].as_str().context("no cluster IP")?.to_owned();
    let pods = space.json(&["get", "pods", "-l", "app=web"])?;
    let pods = pods["items"].as_array().context("no pods")?;
    let mut targets: Vec<String> = pods.iter().filter_map(|pod| pod["status"]["podIP"].as_str().map(|ip| format!("{ip}:80"))).collect();
    ensure!(targets.len() == 2, "{targets:?}");
    targets.push(format!("{address}:80"));
    let ask = |pod: &str, target: &str| {
        space.run(&["exec", pod, "--", "timeout", "3", "wget", "-q", "-O", "-", &format!("http://{target}/hostname")])
    };
    let reaches = |pod: &str| targets.iter().try_for_each(|target| ask(pod, target).map(drop));
    let is_cut = |pod: &str| {
        targets.iter().try_for_each(|target| {
            ensure!(ask(pod, target).is_err(), "{pod} reaches {target}");
            Ok(())
        })
    };

    eventually(PATIENCE, || reaches("client"))?;
    space.apply(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: web}\n\
         spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {role: friend}}}], \
         ports: [{port: http}]}]}\n",
    )?;
    eventually(PATIENCE, || is_cut("client"))?;
    eventually(PATIENCE, || reaches("friend"))?;
    // A pod that comes under policies is isolated from its first moment, and replaced endpoints are as well.
    space.run(&["rollout", "restart", "deployment/web"])?;
    space.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    ensure!(ask("client", &targets[2]).is_err(), "the new pods are open");
    eventually(PATIENCE, || ask("friend", &targets[2]).map(drop))?;

    // Isolated for egress with nothing allowed.
    space.apply(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: friend}\n\
         spec: {podSelector: {matchLabels: {role: friend}}, policyTypes: [Egress]}\n",
    )?;
    eventually(PATIENCE, || {
        ensure!(ask("friend", &targets[2]).is_err(), "the friend still gets out");
        Ok(())
    })?;
    space.run(&["delete", "networkpolicy", "friend", "web"])?;
    eventually(PATIENCE, || ask("friend", &targets[2]).map(drop))?;
    eventually(PATIENCE, || ask("client", &targets[2]).map(drop))
}
