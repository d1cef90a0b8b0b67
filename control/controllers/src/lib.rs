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

pub mod aggregation;
pub mod certificates;
pub mod cronjob;
pub mod daemonset;
pub mod deployment;
pub mod discovery;
pub mod disruption;
pub mod endpoints;
pub mod endpointslice;
pub mod garbage;
pub mod history;
pub mod job;
pub mod mirroring;
pub mod namespace;
pub mod nodes;
pub mod quota;
pub mod replicaset;
pub mod root_ca;
pub mod serviceaccount;
pub mod statefulset;
pub mod ttl_after_finished;
pub mod volumes;

use std::future::Future;
use std::sync::Arc;

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
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
    /// Makes the token of a Secret of type kubernetes.io/service-account-token. None: such Secrets stay empty.
    pub sign_token: Option<SignToken>,
    /// Issues the certificate that an approved CertificateSigningRequest asks for, in PEM. None: nothing is signed.
    pub sign_certificate: Option<SignCertificate>,
}

/// A token for a ServiceAccount, to live in a Secret; an error is text for the log.
pub type SignToken = Arc<dyn Fn(&ServiceAccount, &Secret) -> Result<String, String> + Send + Sync>;

/// A certificate chain in PEM for a request; an error is text for the request's Failed condition.
pub type SignCertificate = Arc<dyn Fn(&CertificateSigningRequest) -> Result<Vec<u8>, String> + Send + Sync>;

/// What every controller works with.
#[derive(Clone)]
pub struct Context {
    pub informers: Arc<Informers>,
    pub recorder: events::Recorder,
    pub config: Arc<Config>,
}

/// Runs all controllers until `shutdown` resolves; panics when one of them does.
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
        worker::join_all(&mut tasks).await;
    };
    tokio::select! { () = work => {}, () = shutdown => {} }
}

fn start(context: &Context, tasks: &mut JoinSet<()>) {
    deployment::start(context, tasks);
    replicaset::start(context, tasks);
    daemonset::start(context, tasks);
    statefulset::start(context, tasks);
    job::start(context, tasks);
    cronjob::start(context, tasks);
    ttl_after_finished::start(context, tasks);
    disruption::start(context, tasks);
    aggregation::start(context, tasks);
    volumes::start(context, tasks);
    endpointslice::start(context, tasks);
    endpoints::start(context, tasks);
    mirroring::start(context, tasks);
    serviceaccount::start(context, tasks);
    root_ca::start(context, tasks);
    namespace::start(context, tasks);
    nodes::start(context, tasks);
    let recount = quota::start(context, tasks);
    garbage::start(context, tasks, recount);
    certificates::start(context, tasks);
}
