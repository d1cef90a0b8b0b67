//! Starts the controllers and the scheduler on the API server in this process, over one set of watches.

use std::sync::Arc;
use std::time::Duration;

use outrigger_access::token::ObjectRef;
use outrigger_apiserver::{ApiServer, Engine};
use outrigger_controllers::{Config, Informers, SignCertificate, SignToken};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::config;

/// How long a certificate may be valid when its request says nothing.
const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);

/// Runs until `stop` turns true. Ends sooner only when one of the loops does, or panics: the rest is of no use without it.
pub fn start(api: &ApiServer, options: &config::Run, stop: watch::Receiver<bool>) -> JoinHandle<()> {
    let client = api.client("system:kube-controller-manager", &["system:masters"]);
    let engine = api.engine();
    let config = Config {
        cluster_cidr: Some(options.cluster_cidr),
        service_cidr: options.service_cluster_ip_range.first().copied(),
        root_ca: engine.config.pki.ca_pem().as_bytes().to_vec(),
        sign_token: Some(sign_token(engine)),
        sign_certificate: Some(sign_certificate(engine)),
    };
    let service_range = config.service_cidr;
    tokio::spawn(async move {
        let (informers, mut watches) = Informers::start(client.clone());
        tokio::select! {
            () = outrigger_controllers::worker::join_all(&mut watches) => {}
            () = crate::addons::keep(client, informers.clone(), service_range) => {}
            () = outrigger_controllers::run_with(informers.clone(), config, stopped(stop.clone())) => {}
            () = outrigger_scheduler::run_with(informers.clone(), stopped(stop)) => {}
        }
    })
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone, and with it what is to be stopped.
    let _ = stop.wait_for(|stop| *stop).await;
}

fn sign_token(engine: &Arc<Engine>) -> SignToken {
    let engine = engine.clone();
    Arc::new(move |account, secret| {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let account_ref = ObjectRef::new(text(&account.metadata.name), text(&account.metadata.uid));
        engine
            .tokens
            .issue_legacy(&text(&secret.metadata.namespace), &account_ref, &text(&secret.metadata.name))
            .map_err(|error| error.to_string())
    })
}

fn sign_certificate(engine: &Arc<Engine>) -> SignCertificate {
    let engine = engine.clone();
    Arc::new(move |request| {
        let pem = String::from_utf8(request.spec.request.0.clone()).map_err(|_| "the request is no PEM text".to_owned())?;
        let asked = request.spec.expiration_seconds.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
        let lifetime = asked.map_or(CERTIFICATE_LIFETIME, |asked| asked.min(CERTIFICATE_LIFETIME));
        let usages = request.spec.usages.clone().unwrap_or_default();
        engine.config.pki.sign_csr(&pem, &usages, lifetime).map(String::into_bytes).map_err(|error| error.to_string())
    })
}
