//! The parts that the agent is made of. Each runs alone beside somebody else's others, and tells its own health.
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use clap::ValueEnum;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Role {
    /// Runs pods
    Kubelet,
    /// Carries Services' traffic
    Proxy,
    /// Gives pods addresses, routes and masquerade
    Network,
    /// Answers pods' questions for names
    Dns,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Self::Kubelet => "kubelet",
            Self::Proxy => "proxy",
            Self::Network => "network",
            Self::Dns => "dns",
        }
    }
}

/// Which roles this agent has.
#[derive(Clone, Debug)]
pub struct Roles(Vec<Role>);

impl Roles {
    pub fn new(asked: &[Role]) -> Self {
        Self(asked.to_vec())
    }

    pub fn has(&self, role: Role) -> bool {
        self.0.contains(&role)
    }

    /// Nothing but the Service proxy, in kube-proxy's place.
    pub fn only_proxy(&self) -> bool {
        self.0.iter().all(|role| *role == Role::Proxy)
    }
}

type Reading = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// How each running part is doing; `Err` says what is wrong.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<BTreeMap<Role, Reading>>>);

impl Health {
    pub fn watch(&self, role: Role, reading: impl Fn() -> Result<(), String> + Send + Sync + 'static) {
        self.readings().insert(role, Box::new(reading));
    }

    pub fn read(&self) -> BTreeMap<Role, Result<(), String>> {
        self.readings().iter().map(|(role, reading)| (*role, reading())).collect()
    }

    fn readings(&self) -> std::sync::MutexGuard<'_, BTreeMap<Role, Reading>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
