//! The Service proxy alone, in kube-proxy's place: upstream's kube-apiserver and etcd, pods on somebody else's network, and
//! `outrigger-node run --roles proxy` with the rights that RBAC gives to kube-proxy.
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use outrigger_e2e::{eventually, output};
use outrigger_scenarios::talk::{Reply, Request, Transport};
use outrigger_scenarios::world::{NODE_IP, NODE_OUTER_IP, POD_A, POD_B, POD_R, PORT, Place, World};
use serde_json::{Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(90);
const SERVICE: &str = "10.96.7.7:80";
const NODE_PORT: u16 = 30777;

/// A program that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Cluster {
    // In the order in which they have to end.
    agent: Option<Running>,
    _api: Vec<Running>,
    world: World,
    directory: TempDir,
    node: String,
    binaries: PathBuf,
    upstream: PathBuf,
}

impl Cluster {
    fn start() -> Result<Self> {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let (Some(binaries), Some(upstream)) = (variable("OUTRIGGER_BIN"), variable("OUTRIGGER_UPSTREAM")) else {
            bail!("this test needs upstream's programs: `cargo xtask test` builds them and says where they are");
        };
        let world = World::new(&binaries.join("outrigger-scenario-host"), "alone")?;
        let directory = tempfile::tempdir()?;
        let node = format!("alone-{}", std::process::id());
        let mut cluster = Self { agent: None, _api: Vec::new(), world, directory, node, binaries, upstream };
        cluster.start_api()?;
        Ok(cluster)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn start_api(&mut self) -> Result<()> {
        let key = rcgen::KeyPair::generate()?;
        std::fs::write(self.path("sa.key"), key.serialize_pem())?;
        std::fs::write(self.path("sa.pub"), key.public_key_pem())?;
        std::fs::write(self.path("tokens"), "admin-token,admin,1,system:masters\nproxy-token,system:kube-proxy,2\n")?;
        let mut etcd = self.world.node_command(self.upstream.join("etcd"))?;
        etcd.arg("--data-dir").arg(self.path("etcd"));
        etcd.args(["--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379"]);
        etcd.args(["--listen-peer-urls=http://127.0.0.1:2380"]);
        let etcd = spawn(&mut etcd, &self.path("etcd.log"))?;
        let mut api = self.world.node_command(self.upstream.join("kube-apiserver"))?;
        let root = self.directory.path().to_owned();
        let file = |name: &str| root.join(name).display().to_string();
        api.args(["--etcd-servers=http://127.0.0.1:2379", "--service-cluster-ip-range=10.96.0.0/12", "--authorization-mode=RBAC"]);
        api.args(["--service-account-issuer=https://kubernetes.default.svc", &format!("--advertise-address={NODE_IP}")]);
        api.args([
            format!("--service-account-key-file={}", file("sa.pub")),
            format!("--service-account-signing-key-file={}", file("sa.key")),
        ]);
        api.args([format!("--token-auth-file={}", file("tokens")), format!("--cert-dir={}", file("pki"))]);
        let api = spawn(&mut api, &self.path("kube-apiserver.log"))?;
        self._api = vec![api, etcd];
        for user in ["admin", "proxy"] {
            let cluster = json!({"server": format!("https://{NODE_IP}:6443"), "certificate-authority": file("pki/apiserver.crt")});
            let config = json!({
                "apiVersion": "v1", "kind": "Config", "current-context": "it",
                "clusters": [{"name": "it", "cluster": cluster}],
                "users": [{"name": "it", "user": {"token": format!("{user}-token")}}],
                "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            });
            std::fs::write(self.path(&format!("{user}.kubeconfig")), config.to_string())?;
        }
        eventually(PATIENCE, || self.kubectl(&["get", "--raw", "/readyz"]))
            .with_context(|| format!("kube-apiserver is not ready: {}", tail(&self.path("kube-apiserver.log"))))?;
        eventually(PATIENCE, || self.kubectl(&["get", "clusterrolebinding", "system:node-proxier"])).map(drop)
    }

    fn kubectl(&self, words: &[&str]) -> Result<String> {
        let mut kubectl = self.world.node_command(self.upstream.join("kubectl"))?;
        kubectl.arg("--kubeconfig").arg(self.path("admin.kubeconfig")).args(words).stdin(Stdio::null());
        output(&mut kubectl)
    }

    fn apply(&self, object: &Value) -> Result<()> {
        let file = self.path("object.json");
        std::fs::write(&file, object.to_string())?;
        self.kubectl(&["apply", "--filename", &file.display().to_string()]).map(drop)
    }

    /// What the endpoint controllers of a whole cluster would do.
    fn endpoints(&self, ips: &[&str]) -> Result<()> {
        let endpoints: Vec<Value> = ips.iter().map(|ip| json!({"addresses": [ip], "conditions": {"ready": true}})).collect();
        self.apply(&json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
            "ports": [{"name": "", "port": PORT, "protocol": "TCP"}], "endpoints": endpoints,
        }))
    }

    fn agent(&self, more: &[&str]) -> Result<Command> {
        let mut agent = self.world.node_command(self.binaries.join("outrigger-node"))?;
        let cgroup = self.world.cgroup.display().to_string();
        let root = cgroup.find("/outrigger-scenarios").map(|at| cgroup[at..].to_owned()).context("the world's cgroup is elsewhere")?;
        agent.args(["run", "--roles=proxy", "--kubeconfig"]).arg(self.path("proxy.kubeconfig"));
        agent.args(["--hostname-override", &self.node, "--cgroup-root", &root, "--data-dir"]).arg(self.path("agent")).args(more);
        Ok(agent)
    }

    fn start_agent(&mut self, more: &[&str]) -> Result<()> {
        self.agent = None;
        let agent = spawn(&mut self.agent(more)?, &self.path("agent.log"))?;
        self.agent = Some(agent);
        eventually(PATIENCE, || {
            let mut status = self.world.node_command(self.binaries.join("outrigger-node"))?;
            output(status.arg("status").arg("--data-dir").arg(self.path("agent")))
        })
        .with_context(|| tail(&self.path("agent.log")))
        .map(drop)
    }

    fn dial(&mut self, from: Place, to: &str) -> Result<String> {
        match self.world.ask(from, &Request::Dial { transport: Transport::Tcp, target: to.parse()?, patience: None })? {
            Reply::Answer { name, .. } => Ok(name),
            other => bail!("{from:?} to {to}: {other:?}"),
        }
    }

    /// A GET from the node itself; the whole answer.
    fn get(&self, port: u16, path: &str) -> Result<String> {
        let talk = format!("exec 3<>/dev/tcp/127.0.0.1/{port} && printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' >&3 && timeout 10 cat <&3");
        output(self.world.node_command("timeout")?.args(["15", "bash", "-c", &talk]).stdin(Stdio::null()))
    }
}

/// How a log ends.
fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

fn spawn(command: &mut Command, log: &Path) -> Result<Running> {
    let log = std::fs::File::options().create(true).append(true).open(log)?;
    let name = command.get_program().to_string_lossy().into_owned();
    let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
    Ok(Running(child.with_context(|| format!("start {name}"))?))
}

#[test]
fn the_proxy_takes_kube_proxys_place() -> Result<()> {
    let mut cluster = Cluster::start()?;
    cluster.apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": cluster.node}}))?;
    let status = json!({"status": {"addresses": [{"type": "InternalIP", "address": NODE_IP}]}}).to_string();
    let node = cluster.node.clone();
    cluster.kubectl(&["patch", "node", &node, "--subresource=status", "--type=merge", "--patch", &status])?;
    let (ip, _) = SERVICE.split_once(':').context("no port")?;
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
        "spec": {"type": "NodePort", "clusterIP": ip, "ports": [{"port": 80, "targetPort": PORT, "nodePort": NODE_PORT}]},
    }))?;
    let file = cluster.path("kube-proxy.yaml");
    let by_file = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n\
                   clusterCIDR: 10.244.0.0/16\nnodePortAddresses: [primary]\nmetricsBindAddress: 0.0.0.0:10249\n";
    std::fs::write(&file, by_file)?;
    let file = format!("--config={}", file.display());
    let node_port = format!("{NODE_IP}:{NODE_PORT}");
    let other_node_port = format!("{NODE_OUTER_IP}:{NODE_PORT}");

    for (mode, flags) in [
        ("ebpf", vec!["--proxy-mode=ebpf", "--cluster-cidr=10.244.0.0/16", "--v=2", "--nodeport-addresses=primary"]),
        ("nftables", vec![file.as_str()]),
        ("userspace", vec!["--proxy-mode=userspace", "--cluster-cidr=10.244.0.0/16", "--nodeport-addresses=primary"]),
    ] {
        let told = |cluster: &Cluster| format!("mode {mode}; the agent says: {}", tail(&cluster.path("agent.log")));
        cluster.endpoints(&[POD_A, POD_B, POD_R])?;
        cluster.start_agent(&flags)?;
        for (from, to) in [(Place::PodA, SERVICE), (Place::Node, SERVICE), (Place::Outside, node_port.as_str()), (Place::PodB, &node_port)]
        {
            eventually(PATIENCE, || cluster.dial(from, to)).with_context(|| told(&cluster))?;
        }
        ensure!(cluster.dial(Place::Outside, &other_node_port).is_err(), "{mode}: NodePorts answer beside the primary address");

        // One endpoint is left: everybody goes there, and no longer anywhere else.
        cluster.endpoints(&[POD_R])?;
        eventually(PATIENCE, || {
            for _ in 0..12 {
                let name = cluster.dial(Place::PodA, SERVICE)?;
                ensure!(name == "r", "{name} still answers");
            }
            Ok(())
        })
        .with_context(|| told(&cluster))?;
        speaks_as_kube_proxy(&cluster, mode)?;
        if mode != "userspace" {
            outlives_its_agent(&mut cluster, &flags)?;
        }
    }
    let node = cluster.node.clone();
    cluster.kubectl(&["taint", "node", &node, "ToBeDeletedByClusterAutoscaler=:NoSchedule"])?;
    eventually(PATIENCE, || {
        let answer = cluster.get(10256, "/healthz")?;
        ensure!(answer.contains(" 503 ") && answer.contains(r#""nodeEligible":false,"healthy":true"#), "{answer}");
        Ok(())
    })?;
    let livez = cluster.get(10256, "/livez")?;
    ensure!(livez.contains(" 200 "), "a leaving node's proxy lives: {livez}");

    cluster.agent = None;
    for mode in ["ebpf", "nftables"] {
        output(cluster.agent(&["--cleanup"])?.stdin(Stdio::null())).with_context(|| format!("clean {mode} up"))?;
    }
    ensure!(cluster.dial(Place::PodA, SERVICE).is_err(), "after the clean-up nothing carries the Service");
    Ok(())
}

fn speaks_as_kube_proxy(cluster: &Cluster, mode: &str) -> Result<()> {
    let healthz = cluster.get(10256, "/healthz")?;
    let headers = healthz.to_lowercase();
    ensure!(headers.contains(" 200 ") && headers.contains("x-content-type-options: nosniff"), "{healthz}");
    ensure!(headers.contains("content-type: application/json"), "{healthz}");
    let (_, body) = healthz.split_once("\r\n\r\n").context("no body")?;
    let body: Value = serde_json::from_str(body)?;
    ensure!(body["healthy"] == true && body["nodeEligible"] == true && body["status"]["IPv4"]["healthy"] == true, "{body}");
    let proxy_mode = cluster.get(10249, "/proxyMode")?;
    ensure!(proxy_mode.ends_with(&format!("\r\n\r\n{mode}")), "{proxy_mode}");
    ensure!(cluster.get(10249, "/healthz")?.ends_with("\r\n\r\nok"));
    let configz = cluster.get(10249, "/configz")?;
    ensure!(configz.contains("\"kubeproxy.config.k8s.io\"") && configz.contains(&cluster.node), "{configz}");
    let metrics = cluster.get(10249, "/metrics")?;
    for wanted in [
        "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}",
        "kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv4\",le=\"0.25\"}",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total ",
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"}",
        "kubeproxy_proxy_healthz_total{code=\"200\"}",
    ] {
        ensure!(metrics.contains(wanted), "no {wanted} in {metrics}");
    }
    Ok(())
}

/// The kernel is the memory: what was established goes on while there is no agent and under the next one.
fn outlives_its_agent(cluster: &mut Cluster, flags: &[&str]) -> Result<()> {
    let open = Request::Open { id: "kept".into(), transport: Transport::Tcp, target: SERVICE.parse()?, port: Some(0) };
    let first = cluster.world.ask(Place::PodA, &open)?;
    ensure!(matches!(&first, Reply::Answer { name, .. } if name == "r"), "{first:?}");
    cluster.agent = None;
    let say = Request::Say { id: "kept".into() };
    ensure!(cluster.world.ask(Place::PodA, &say)? == first, "the connection ended with the agent");
    ensure!(cluster.dial(Place::PodA, SERVICE)? == "r", "without an agent new connections go nowhere");
    cluster.start_agent(flags)?;
    ensure!(cluster.world.ask(Place::PodA, &say)? == first, "the connection ended with the new agent");
    Ok(())
}
