//! `cargo xtask bench pods`: from creating a pod to seeing it Running, beside what the runtime alone takes for the same pod.
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, PostParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use outrigger_kubelet::cri::{Cri, v1};
use serde_json::json;

const NAMESPACE: &str = "default";

#[derive(Parser)]
#[command(name = "pods")]
struct Options {
    #[arg(long)]
    kubeconfig: PathBuf,
    /// The runtime of a node, asked directly for the reference
    #[arg(long)]
    runtime_endpoint: String,
    /// Where the reference's pods are in the cgroup tree
    #[arg(long)]
    cgroup_parent: String,
    #[arg(long)]
    image: String,
    /// Pods one after another
    #[arg(long, default_value_t = 20)]
    count: usize,
    /// Pods at once
    #[arg(long, default_value_t = 10)]
    parallel: usize,
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    let file = Kubeconfig::read_from(&options.kubeconfig).context("read the kubeconfig")?;
    let client = Client::try_from(kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?)?;
    let bench = Bench { pods: Api::namespaced(client, NAMESPACE), cri: Cri::connect(&options.runtime_endpoint), options };
    let (mut alone, mut whole) = (Vec::new(), Vec::new());
    for round in 0..bench.options.count {
        alone.extend(bench.runtime_alone(&[format!("alone-{round}")]).await?);
        whole.extend(bench.whole(&[format!("bench-{round}")]).await?);
    }
    let names = |prefix: &str| (0..bench.options.parallel).map(|index| format!("{prefix}-{index}")).collect::<Vec<_>>();
    let mut alone_parallel = bench.runtime_alone(&names("alone")).await?;
    let mut whole_parallel = bench.whole(&names("bench")).await?;
    println!("| pods | runtime alone, median (low–high) | created to Running, median (low–high) | difference |\n|---|---|---|---|");
    row(&format!("{} one after another", bench.options.count), &mut alone, &mut whole);
    row(&format!("{} at once", bench.options.parallel), &mut alone_parallel, &mut whole_parallel);
    Ok(())
}

struct Bench {
    options: Options,
    pods: Api<Pod>,
    cri: Cri,
}

impl Bench {
    /// What a kubelet must ask of the runtime for such a pod, and nothing else.
    async fn runtime_alone(&self, names: &[String]) -> Result<Vec<Duration>> {
        let begin = Instant::now();
        let sandboxes = try_join_all(names.iter().map(|name| async {
            let sandbox = self.start(name).await?;
            anyhow::Ok((sandbox, begin.elapsed()))
        }))
        .await?;
        for (sandbox, _) in &sandboxes {
            self.cri.stop_sandbox(sandbox).await?;
            self.cri.remove_sandbox(sandbox).await?;
        }
        Ok(sandboxes.into_iter().map(|(_, time)| time).collect())
    }

    async fn start(&self, name: &str) -> Result<String> {
        let metadata = v1::PodSandboxMetadata { name: name.into(), uid: name.into(), namespace: "bench".into(), attempt: 0 };
        let linux = v1::LinuxPodSandboxConfig { cgroup_parent: self.options.cgroup_parent.clone(), ..Default::default() };
        let sandbox = v1::PodSandboxConfig { metadata: Some(metadata), hostname: name.into(), linux: Some(linux), ..Default::default() };
        let image = v1::ImageSpec { image: self.options.image.clone(), ..Default::default() };
        let container = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "sleep".into(), attempt: 0 }),
            image: Some(image),
            command: command(),
            ..Default::default()
        };
        let id = self.cri.run_sandbox(sandbox.clone(), String::new()).await?;
        let container = self.cri.create_container(&id, container, sandbox).await?;
        self.cri.start_container(&container).await?;
        Ok(id)
    }

    async fn whole(&self, names: &[String]) -> Result<Vec<Duration>> {
        let fields = format!("metadata.namespace={NAMESPACE}");
        let from = self.pods.list_metadata(&Default::default()).await?.metadata.resource_version.unwrap_or_default();
        let mut events = self.pods.watch(&WatchParams::default().fields(&fields), &from).await?.boxed();
        let begin = Instant::now();
        try_join_all(names.iter().map(|name| async move {
            let pod = serde_json::from_value(json!({
                "metadata": {"name": name},
                "spec": {
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{"name": "sleep", "image": self.options.image, "command": command()}],
                },
            }))?;
            anyhow::Ok(self.pods.create(&PostParams::default(), &pod).await?)
        }))
        .await?;
        let mut times = HashMap::new();
        while times.len() < names.len() {
            let event = tokio::time::timeout(Duration::from_secs(60), events.try_next()).await.context("no pod came up for 60 s")??;
            if let WatchEvent::Modified(pod) = event.context("the watch ended")? {
                let phase = pod.status.and_then(|status| status.phase);
                ensure!(phase.as_deref() != Some("Failed"), "a pod failed");
                if phase.as_deref() == Some("Running") {
                    times.entry(pod.metadata.name).or_insert_with(|| begin.elapsed());
                }
            }
        }
        for name in names {
            self.pods.delete(name, &DeleteParams::default()).await?;
        }
        let mut left = names.len();
        while left > 0 {
            let event = tokio::time::timeout(Duration::from_secs(60), events.try_next()).await.context("a pod stayed for 60 s")??;
            left -= usize::from(matches!(event.context("the watch ended")?, WatchEvent::Deleted(_)));
        }
        Ok(times.into_values().collect())
    }
}

fn command() -> Vec<String> {
    ["sleep", "1000"].map(String::from).into()
}

fn row(what: &str, alone: &mut [Duration], whole: &mut [Duration]) {
    let show = |times: &mut [Duration]| {
        times.sort();
        let ms = |index: usize| times.get(index).map_or(0, Duration::as_millis);
        (ms(times.len() / 2), format!("{} ms ({}–{})", ms(times.len() / 2), ms(0), ms(times.len().saturating_sub(1))))
    };
    let ((alone, alone_text), (whole, whole_text)) = (show(alone), show(whole));
    println!("| {what} | {alone_text} | {whole_text} | {} ms |", whole as i128 - alone as i128);
}
