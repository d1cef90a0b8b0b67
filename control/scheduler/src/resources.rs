//! How much of each resource a pod asks for and a node offers (pure).
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Amounts: cpu in thousandths, everything else in whole units.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    pub cpu: i64,
    pub memory: i64,
    pub storage: i64,
    /// Huge pages, devices and other extended resources, by name.
    pub others: BTreeMap<String, i64>,
}

type List = BTreeMap<String, Quantity>;

/// What a container without a request counts as when nodes are compared.
const ASSUMED_CPU: i64 = 100;
const ASSUMED_MEMORY: i64 = 200 * 1024 * 1024;

fn amount(name: &str, quantity: &Quantity) -> i64 {
    // The API server has validated it; what can't be read asks for nothing.
    let Ok(quantity) = outrigger_api::quantity::Quantity::parse(&quantity.0) else { return 0 };
    if name == "cpu" { quantity.millis() } else { quantity.value() }
}

impl Resources {
    pub fn of(list: Option<&List>) -> Self {
        let mut resources = Self::default();
        for (name, quantity) in list.into_iter().flatten() {
            resources.set(name, amount(name, quantity));
        }
        resources
    }

    pub fn get(&self, name: &str) -> i64 {
        match name {
            "cpu" => self.cpu,
            "memory" => self.memory,
            "ephemeral-storage" => self.storage,
            other => self.others.get(other).copied().unwrap_or(0),
        }
    }

    fn set(&mut self, name: &str, amount: i64) {
        match name {
            "cpu" => self.cpu = amount,
            "memory" => self.memory = amount,
            "ephemeral-storage" => self.storage = amount,
            "pods" => {}
            other => drop(self.others.insert(other.to_owned(), amount)),
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.change(other, 1);
    }

    pub fn subtract(&mut self, other: &Self) {
        self.change(other, -1);
    }

    fn change(&mut self, other: &Self, sign: i64) {
        self.cpu += sign * other.cpu;
        self.memory += sign * other.memory;
        self.storage += sign * other.storage;
        for (name, amount) in &other.others {
            *self.others.entry(name.clone()).or_default() += sign * amount;
        }
    }

    fn raise(&mut self, other: &Self) {
        self.cpu = self.cpu.max(other.cpu);
        self.memory = self.memory.max(other.memory);
        self.storage = self.storage.max(other.storage);
        for (name, amount) in &other.others {
            let held = self.others.entry(name.clone()).or_default();
            *held = (*held).max(*amount);
        }
    }

    pub fn is_nothing(&self) -> bool {
        self.cpu == 0 && self.memory == 0 && self.storage == 0 && self.others.values().all(|amount| *amount == 0)
    }
}

/// A container's request; of a running one, what it has been given counts if that is more.
fn container(pod: &Pod, container: &Container, assumed: bool) -> Resources {
    let mut resources = Resources::of(container.resources.as_ref().and_then(|resources| resources.requests.as_ref()));
    let statuses = pod
        .status
        .iter()
        .flat_map(|status| status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten()));
    if let Some(status) = statuses.into_iter().find(|status| status.name == container.name) {
        resources.raise(&Resources::of(status.allocated_resources.as_ref()));
        resources.raise(&Resources::of(status.resources.as_ref().and_then(|resources| resources.requests.as_ref())));
    }
    if assumed {
        let has = |name: &str| {
            container.resources.as_ref().and_then(|resources| resources.requests.as_ref()).is_some_and(|list| list.contains_key(name))
        };
        if !has("cpu") {
            resources.cpu = ASSUMED_CPU;
        }
        if !has("memory") {
            resources.memory = ASSUMED_MEMORY;
        }
    }
    resources
}

fn total(pod: &Pod, assumed: bool) -> Resources {
    let Some(spec) = &pod.spec else { return Resources::default() };
    let mut resources = Resources::default();
    for app in &spec.containers {
        resources.add(&container(pod, app, assumed));
    }
    // Init containers run one after the other, over those of them that stay.
    let mut sidecars = Resources::default();
    let mut starting = Resources::default();
    for init in spec.init_containers.iter().flatten() {
        let own = container(pod, init, assumed);
        if init.restart_policy.as_deref() == Some("Always") {
            resources.add(&own);
            sidecars.add(&own);
            starting.raise(&sidecars);
        } else {
            let mut together = sidecars.clone();
            together.add(&own);
            starting.raise(&together);
        }
    }
    resources.raise(&starting);
    if let Some(whole) = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref()) {
        for (name, quantity) in whole {
            resources.set(name, amount(name, quantity));
        }
    }
    resources.add(&Resources::of(spec.overhead.as_ref()));
    resources
}

/// What the node must have free for the pod.
pub fn requests(pod: &Pod) -> Resources {
    total(pod, false)
}

/// The same with a guess for containers that say nothing: for comparing nodes, not for fitting.
pub fn assumed_requests(pod: &Pod) -> Resources {
    total(pod, true)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodSpec, ResourceRequirements};

    use super::*;

    fn list(pairs: &[(&str, &str)]) -> List {
        pairs.iter().map(|(name, text)| ((*name).to_owned(), Quantity((*text).to_owned()))).collect()
    }

    fn asking(pairs: &[(&str, &str)], always: bool) -> Container {
        Container {
            name: "c".into(),
            restart_policy: always.then(|| "Always".into()),
            resources: Some(ResourceRequirements { requests: Some(list(pairs)), ..Default::default() }),
            ..Default::default()
        }
    }

    fn pod(apps: Vec<Container>, inits: Vec<Container>) -> Pod {
        Pod { spec: Some(PodSpec { containers: apps, init_containers: Some(inits), ..Default::default() }), ..Default::default() }
    }

    #[test]
    fn init_and_sidecar_containers_count_as_they_run() {
        let cpu = |amount: &str, always| asking(&[("cpu", amount)], always);
        let cases = [
            (vec![cpu("1", false), cpu("500m", false)], vec![], 1500),
            (vec![cpu("1", false)], vec![cpu("3", false)], 3000),
            (vec![cpu("1", false)], vec![cpu("1", true), cpu("3", false)], 4000),
            (vec![cpu("1", false)], vec![cpu("3", false), cpu("1", true)], 3000),
            (vec![cpu("1", false)], vec![cpu("1", true), cpu("1", true)], 3000),
        ];
        for (apps, inits, expected) in cases {
            assert_eq!(requests(&pod(apps, inits)).cpu, expected);
        }
    }

    #[test]
    fn overhead_and_extended_resources_count_and_silence_is_guessed() {
        let mut pod = pod(vec![asking(&[("memory", "1Gi"), ("example.com/gpu", "2")], false)], vec![]);
        pod.spec.as_mut().unwrap().overhead = Some(list(&[("cpu", "250m")]));
        let resources = requests(&pod);
        assert_eq!((resources.cpu, resources.memory, resources.get("example.com/gpu")), (250, 1 << 30, 2));
        assert_eq!(assumed_requests(&pod).cpu, 350);
    }
}
