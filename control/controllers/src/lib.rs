//! The controllers: programs that watch the API and make the cluster follow what it says.
//!
//! Reading order: `objects` (facts about objects), `store` and `informers` (one shared copy per kind), `worker` (the
//! loop), `events`, `pods` (what all workloads share), then one module per controller. In each, what to do is
//! decided by a pure function of the objects, and done by a thin part around it.
pub mod conditions;
pub mod error;
pub mod events;
pub mod informers;
pub mod objects;
pub mod pods;
pub mod store;
pub mod worker;

pub mod deployment;
pub mod replicaset;

use std::future::Future;
use std::sync::Arc;

use kube::Client;
use tokio::task::JoinSet;
use tracing::info;

pub use crate::error::SyncError;
pub use crate::informers::Informers;

/// What the controllers must be told; the rest they read from the API.
pub struct Config {
    /// Addresses for pods, one block per node. None: nodes get no block.
    pub cluster_cidr: Option<ipnet::IpNet>,
    /// Addresses for Services, kept out of the nodes' blocks.
    pub service_cidr: Option<ipnet::IpNet>,
    /// The PEM bundle published to every namespace as kube-root-ca.crt.
    pub root_ca: Vec<u8>,
}

/// What every controller works with.
#[derive(Clone)]
pub struct Context {
    pub informers: Arc<Informers>,
    pub recorder: events::Recorder,
    pub config: Arc<Config>,
}

/// Runs all controllers until `shutdown` resolves.
pub async fn run(client: Client, config: Config, shutdown: impl Future<Output = ()>) {
    let (informers, _watches) = Informers::start(client);
    run_with(informers, config, shutdown).await;
}

/// The same over watches that others share, as the scheduler does.
pub async fn run_with(informers: Arc<Informers>, config: Config, shutdown: impl Future<Output = ()>) {
    let mut tasks = JoinSet::new();
    let work = async {
        informers.synced().await;
        let recorder = events::Recorder::start(informers.client.clone(), events::Shape::Counted, "controllermanager");
        let context = Context { informers: informers.clone(), recorder, config: Arc::new(config) };
        start(&context, &mut tasks);
        info!(controllers = tasks.len(), "controllers started");
        std::future::pending::<()>().await;
    };
    tokio::select! { () = work => {}, () = shutdown => {} }
}

fn start(context: &Context, tasks: &mut JoinSet<()>) {
    deployment::start(context, tasks);
    replicaset::start(context, tasks);
}
