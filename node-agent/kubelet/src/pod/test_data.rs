//! Pods and runtime views for the unit tests, written as short texts.
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use crate::runtime::{ContainerView, PodView, RunState, SandboxView, hash};

/// A name that ends in `*` is a sidecar.
pub fn pod(policy: &str, init: &[&str], main: &[&str]) -> Pod {
    let container = |name: &&str| Container {
        name: name.trim_end_matches('*').into(),
        image: Some("image".into()),
        restart_policy: name.ends_with('*').then(|| "Always".into()),
        ..Container::default()
    };
    let mut pod = Pod {
        spec: Some(PodSpec {
            restart_policy: Some(policy.into()),
            init_containers: (!init.is_empty()).then(|| init.iter().map(container).collect()),
            containers: main.iter().map(container).collect(),
            ..PodSpec::default()
        }),
        ..Pod::default()
    };
    pod.metadata.name = Some("p".into());
    pod.metadata.namespace = Some("ns".into());
    pod.metadata.uid = Some("uid".into());
    pod
}

/// A pod with a ready sandbox; states are `running`, `created`, `unknown`, `exited CODE`. Later entries are newer.
pub fn view(containers: &[(&str, &str)]) -> PodView {
    let sandbox =
        SandboxView { id: "sandbox".into(), attempt: 0, ready: true, created_at: 1, host_network: false, ips: vec!["10.0.0.1".into()] };
    let containers = containers.iter().enumerate().rev().map(|(index, (name, state))| {
        let (state, exit_code) = match state.split_once(' ') {
            Some(("exited", code)) => (RunState::Exited, code.parse().unwrap()),
            _ if *state == "running" => (RunState::Running, 0),
            _ if *state == "created" => (RunState::Created, 0),
            _ => (RunState::Unknown, 0),
        };
        let at = i64::try_from(index + 1).unwrap() * 1_000_000_000;
        ContainerView {
            id: format!("{name}-{index}"),
            sandbox_id: "sandbox".into(),
            name: (*name).into(),
            state,
            image: "image".into(),
            image_ref: "sha256:1".into(),
            created_at: at,
            started_at: at,
            finished_at: at,
            exit_code,
            reason: match (state, exit_code) {
                (RunState::Exited, 0) => "Completed".into(),
                (RunState::Exited, _) => "Error".into(),
                _ => String::new(),
            },
            message: String::new(),
            hash: Some(hash(&Container { name: (*name).into(), image: Some("image".into()), ..Container::default() })),
            restart_count: 0,
            termination_grace: None,
            user: None,
            resources: None,
            log_path: String::new(),
        }
    });
    PodView { sandboxes: vec![sandbox], containers: containers.collect() }
}
