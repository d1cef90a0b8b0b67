//! A user's day with a stock kubectl: apply, look, read logs, run commands, scale, roll out and back, delete.
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outrigger_e2e::{BUSYBOX, Lab, Namespace, eventually, shell, web};

const PATIENCE: Duration = Duration::from_secs(90);

#[test]
fn a_deployment_lives_and_ends() -> Result<()> {
    let lab = Lab::get()?;
    let space = Namespace::create(&lab, "e2e-deployment")?;
    space.apply(&web("web", 2, ""))?;
    space.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;

    let wide = space.run(&["get", "pods", "--output", "wide"])?;
    for column in ["NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP", "NODE"] {
        ensure!(wide.lines().next().is_some_and(|header| header.contains(column)), "no column {column}: {wide}");
    }
    ensure!(wide.contains("1/1") && wide.contains("Running") && wide.contains("10.244."), "{wide}");
    let described = space.run(&["describe", "pods", "--selector", "app=web"])?;
    for part in ["Successfully assigned", "Container created", "Container started", "Ready                       True"] {
        ensure!(described.contains(part), "describe lacks {part:?}: {described}");
    }

    space.run(&["scale", "deployment/web", "--replicas=4"])?;
    space.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    ensure!(space.pods("app=web")?.len() == 4);

    let before = space.pods("app=web")?;
    space.run(&["rollout", "restart", "deployment/web"])?;
    space.run(&["rollout", "status", "deployment/web", "--timeout=120s"])?;
    eventually(PATIENCE, || {
        let now = space.pods("app=web")?;
        ensure!(now.len() == 4 && now.iter().all(|pod| !before.contains(pod)), "old pods are left: {now:?}");
        Ok(())
    })?;

    space.run(&["set", "image", "deployment/web", "nginx=docker.io/library/none:1"])?;
    eventually(PATIENCE, || {
        let pods = space.run(&["get", "pods"])?;
        ensure!(pods.contains("ErrImagePull") || pods.contains("ImagePullBackOff"), "{pods}");
        Ok(())
    })?;
    space.run(&["rollout", "undo", "deployment/web"])?;
    space.run(&["rollout", "status", "deployment/web", "--timeout=120s"])?;

    space.run(&["delete", "deployment/web", "service/web", "--timeout=90s"])?;
    eventually(PATIENCE, || {
        let pods = space.pods("app=web")?;
        ensure!(pods.is_empty(), "pods are left: {pods:?}");
        Ok(())
    })
}

#[test]
fn a_container_hears_that_it_shall_end() -> Result<()> {
    let lab = Lab::get()?;
    let space = Namespace::create(&lab, "e2e-signals")?;
    let patient = shell("patient").replace("terminationGracePeriodSeconds: 0", "terminationGracePeriodSeconds: 60");
    let trap = r#"["sh", "-c", "trap 'exit 0' TERM; while true; do sleep 0.1; done"]"#;
    space.apply(&patient.replace(r#"["sleep", "3600"]"#, trap))?;
    space.run(&["wait", "pod/patient", "--for=condition=Ready", "--timeout=60s"])?;
    space.run(&["delete", "pod", "patient", "--timeout=30s"])?;
    Ok(())
}

#[test]
fn logs_are_followed_and_commands_run() -> Result<()> {
    let lab = Lab::get()?;
    let space = Namespace::create(&lab, "e2e-streams")?;
    space.apply(&format!(
        r#"apiVersion: v1
kind: Pod
metadata: {{name: counter}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: counter
    image: {BUSYBOX}
    command: ["sh", "-c", "i=0; while true; do echo line $i; i=$((i+1)); sleep 0.2; done"]
"#
    ))?;
    space.run(&["wait", "pod/counter", "--for=condition=Ready", "--timeout=60s"])?;
    let mut follow = space.kubectl(&["logs", "--follow", "--tail=1", "counter"]).stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(follow.stdout.take().context("kubectl logs has no output")?).lines();
    let seen: Vec<String> = lines.take(5).collect::<Result<_, _>>()?;
    follow.kill()?;
    follow.wait()?;
    let numbers: Vec<u32> = seen.iter().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect();
    ensure!(numbers.len() == 5 && numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "lines out of order: {seen:?}");

    ensure!(space.run(&["exec", "counter", "--", "echo", "hello"])?.trim() == "hello");
    let failed = space.kubectl(&["exec", "counter", "--", "sh", "-c", "echo to-stderr >&2; exit 7"]).output()?;
    ensure!(failed.status.code() == Some(7) && String::from_utf8_lossy(&failed.stderr).contains("to-stderr"), "{failed:?}");
    let mut cat = space.kubectl(&["exec", "--stdin", "counter", "--", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let sent: String = "0123456789\n".repeat(20_000);
    cat.stdin.take().context("kubectl exec has no input")?.write_all(sent.as_bytes())?;
    ensure!(String::from_utf8(cat.wait_with_output()?.stdout)? == sent, "what went through cat came back changed");
    Ok(())
}

#[test]
fn a_port_is_forwarded() -> Result<()> {
    let lab = Lab::get()?;
    let space = Namespace::create(&lab, "e2e-forward")?;
    space.apply(&web("web", 1, ""))?;
    space.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    let mut forward = space.kubectl(&["port-forward", "deployment/web", ":80"]).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    // Kept open: kubectl writes a line for every connection, and dies of a closed pipe.
    let mut told = BufReader::new(forward.stdout.take().context("kubectl port-forward has no output")?);
    told.read_line(&mut line)?;
    // "Forwarding from 127.0.0.1:PORT -> 80"
    let port: u16 = line.split(':').nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).context(line)?;
    let mut answers = Vec::new();
    for _ in 0..3 {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /hostname HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        answers.push(answer);
    }
    forward.kill()?;
    forward.wait()?;
    ensure!(answers.iter().all(|answer| answer.contains("200 OK") && answer.contains("web-")), "{answers:?}");
    Ok(())
}

#[test]
fn a_pod_gets_its_configuration_and_sees_it_change() -> Result<()> {
    let lab = Lab::get()?;
    let space = Namespace::create(&lab, "e2e-config")?;
    space.run(&["create", "configmap", "settings", "--from-literal=colour=red"])?;
    space.run(&["create", "secret", "generic", "password", "--from-literal=word=sesame"])?;
    space.apply(&format!(
        r#"apiVersion: v1
kind: Pod
metadata: {{name: reader, labels: {{tier: front}}}}
spec:
  terminationGracePeriodSeconds: 0
  initContainers:
  - name: prepare
    image: {BUSYBOX}
    command: ["sh", "-c", "echo prepared > /shared/state"]
    volumeMounts: [{{name: shared, mountPath: /shared}}]
  - name: sidecar
    image: {BUSYBOX}
    restartPolicy: Always
    command: ["sh", "-c", "cp /shared/state /shared/copied; sleep 3600"]
    volumeMounts: [{{name: shared, mountPath: /shared}}]
  containers:
  - name: main
    image: {BUSYBOX}
    command: ["sleep", "3600"]
    env:
    - {{name: WORD, valueFrom: {{secretKeyRef: {{name: password, key: word}}}}}}
    - {{name: NODE, valueFrom: {{fieldRef: {{fieldPath: spec.nodeName}}}}}}
    - {{name: LIMIT, valueFrom: {{resourceFieldRef: {{resource: limits.memory}}}}}}
    resources: {{limits: {{memory: 64Mi, cpu: 200m}}}}
    volumeMounts:
    - {{name: settings, mountPath: /settings}}
    - {{name: about, mountPath: /about}}
    - {{name: shared, mountPath: /shared}}
  volumes:
  - {{name: settings, configMap: {{name: settings}}}}
  - {{name: about, downwardAPI: {{items: [{{path: labels, fieldRef: {{fieldPath: metadata.labels}}}}]}}}}
  - {{name: shared, emptyDir: {{}}}}
"#
    ))?;
    space.run(&["wait", "pod/reader", "--for=condition=Ready", "--timeout=60s"])?;
    let read = |command: &str| space.run(&["exec", "reader", "--container", "main", "--", "sh", "-c", command]);
    let told = read(
        "echo $WORD $NODE $LIMIT; cat /settings/colour; echo; cat /about/labels; echo; cat /shared/copied; cat /var/run/secrets/kubernetes.io/serviceaccount/namespace",
    )?;
    for part in ["sesame node-", " 67108864", "red", "tier=\"front\"", "prepared", "e2e-config"] {
        ensure!(told.contains(part), "{part:?} is missing: {told}");
    }
    space.run(&["patch", "configmap", "settings", "--patch", r#"{"data":{"colour":"blue"}}"#])?;
    eventually(PATIENCE, || {
        let colour = read("cat /settings/colour")?;
        ensure!(colour.trim() == "blue", "still {colour}");
        Ok(())
    })
}

#[test]
fn a_job_runs_to_its_end_and_a_failing_container_is_restarted() -> Result<()> {
    let lab = Lab::get()?;
    let space = Namespace::create(&lab, "e2e-job")?;
    space.run(&["create", "job", "sum", "--image", BUSYBOX, "--", "sh", "-c", "echo $((6*7))"])?;
    space.run(&["wait", "job/sum", "--for=condition=Complete", "--timeout=60s"])?;
    ensure!(space.run(&["logs", "job/sum"])?.trim() == "42");
    space.apply(&shell("failing").replace("\"sleep\", \"3600\"", "\"false\""))?;
    eventually(PATIENCE, || {
        let pod = space.json(&["get", "pod", "failing"])?;
        let status = &pod["status"]["containerStatuses"][0];
        ensure!(status["restartCount"].as_u64() >= Some(1) && status["lastState"]["terminated"]["exitCode"] == 1, "{status}");
        Ok(())
    })
}
