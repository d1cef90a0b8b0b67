//! Start and stop: the engine is put together, loads the store, creates what every cluster has, and is served by sockets and in process.

use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLock, Weak};
use std::time::Instant;

use futures::future::BoxFuture;
use outrigger_access::authn::{LookupKind, ObjectLookup};
use outrigger_access::node::{NodeAuthorizer, NodeGraph};
use outrigger_access::rbac::RbacIndex;
use outrigger_access::token::TokenIssuer;
use outrigger_access::{Authenticator, Union, UserInfo};
use outrigger_api::Catalog;
use outrigger_store::Store;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::admission;
use crate::aggregator::{self, Aggregator, AggregatorListener};
use crate::body::{ReqBody, boxed};
use crate::cache::{Hub, split_key};
use crate::config::Config;
use crate::engine::{Engine, InProcess};
use crate::error::StartError;
use crate::feed::{self, Listener};
use crate::metrics::Metrics;
use crate::openapi::OpenApi;
use crate::proxy::Kubelets;
use crate::registry::definition::{self, CatalogListener};
use crate::registry::service::ServiceAllocator;
use crate::{bootstrap, server};

/// A running API server. Dropping it stops it.
pub struct ApiServer {
    engine: Arc<Engine>,
    stop: watch::Sender<bool>,
}

impl ApiServer {
    /// Loads the store and creates what is missing; ready to answer when it returns.
    pub async fn start(config: Config, store: Arc<dyn Store>) -> Result<Self, StartError> {
        let started = Instant::now();
        let hub = Arc::new(Hub::default());
        let catalog = Catalog::builtin();
        index_fields(&hub, &catalog);
        let rbac = Arc::new(RbacIndex::new());
        let node_graph = Arc::new(NodeGraph::new());
        let catalog = Arc::new(RwLock::new(Arc::new(catalog)));
        let aggregator = Arc::new(Aggregator::new(config.pki.front_proxy_client().clone()));
        let listeners: Vec<Arc<dyn Listener>> = vec![
            Arc::new(RbacListener(rbac.clone())),
            Arc::new(NodeListener(node_graph.clone())),
            Arc::new(CatalogListener(catalog.clone())),
            Arc::new(AggregatorListener(aggregator.clone())),
        ];
        let stream = feed::load(&store, &hub, &listeners).await?;
        let tokens = Arc::new(TokenIssuer::new(config.pki.service_account_key_pem(), &config.issuer, config.api_audiences.clone())?);
        let lookup = Arc::new(CachedObjects { hub: hub.clone(), store: store.clone() });
        let authentication = outrigger_access::authn::AuthenticatorConfig {
            anonymous: config.authentication.anonymous.clone(),
            static_tokens: config.authentication.static_tokens.clone(),
            bootstrap_tokens: config.authentication.bootstrap_tokens,
        };
        let authenticator = Authenticator::new(&config.pki, tokens.clone(), lookup, authentication)?;
        let services = ServiceAllocator::new(config.service_cidrs.clone(), config.node_ports.clone());
        let (stop, stopped) = watch::channel(false);
        let engine = Arc::new(Engine {
            kubelets: Kubelets::new(config.pki.kubelet_client())?,
            config,
            store: store.clone(),
            hub: hub.clone(),
            catalog,
            authenticator,
            authorizer: Union(vec![Arc::new(NodeAuthorizer::new(node_graph.clone())), rbac.clone()]),
            rbac,
            node_graph,
            tokens,
            services,
            admission: admission::Chain::default(),
            openapi: OpenApi::default(),
            aggregator,
            metrics: Metrics::default(),
            started,
            ready: false.into(),
            stop: stopped,
        });
        tokio::spawn(feed::follow(store, hub, listeners, stream));
        tokio::spawn(definition::clean_up(Arc::downgrade(&engine)));
        tokio::spawn(admission::policy::typecheck::run(Arc::downgrade(&engine)));
        bootstrap::run(&engine).await?;
        let services = admission::all(&engine, "", "services", "");
        engine.services.learn(services.iter());
        engine.ready.store(true, Ordering::Release);
        tokio::spawn(aggregator::local::register(Arc::downgrade(&engine)));
        tokio::spawn(aggregator::available::watch(Arc::downgrade(&engine)));
        tracing::info!(elapsed = ?started.elapsed(), revision = engine.hub.revision(), "API server ready");
        Ok(Self { engine, stop })
    }

    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Serves the listeners until [`ApiServer::shutdown`]; ends when requests under way have been answered.
    pub async fn serve(&self, listeners: Vec<TcpListener>) -> Result<(), StartError> {
        let (chain, key) = self.engine.config.pki.api_server().rustls_parts()?;
        let tls = server::tls_config(chain, key, outrigger_access::pki::client_cert_acceptor(&self.engine.config.pki)?)?;
        server::serve(self.engine.clone(), tls, listeners, self.stop.subscribe()).await;
        Ok(())
    }

    pub fn shutdown(&self) {
        self.stop.send_replace(true);
    }

    /// A client whose requests go straight to the engine as this user; permissions and admission apply as to anyone.
    pub fn client(&self, user: &str, groups: &[&str]) -> kube::Client {
        let mut user = UserInfo::new(user, groups.iter().copied());
        if !user.in_group(outrigger_access::user::GROUP_AUTHENTICATED) {
            user.groups.push(outrigger_access::user::GROUP_AUTHENTICATED.into());
        }
        kube::Client::new(service(Arc::downgrade(&self.engine), user), "default")
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.shutdown();
    }
}

type InProcessService = tower::util::BoxCloneService<http::Request<kube::client::Body>, crate::body::Response, crate::body::BoxError>;

fn service(engine: Weak<Engine>, user: UserInfo) -> InProcessService {
    tower::util::BoxCloneService::new(tower::service_fn(move |request: http::Request<kube::client::Body>| {
        let mut request = request.map(|body| -> ReqBody { boxed(body) });
        request.extensions_mut().insert(InProcess(user.clone()));
        answer(engine.clone(), request)
    }))
}

fn answer(engine: Weak<Engine>, request: crate::body::Request) -> BoxFuture<'static, Result<crate::body::Response, crate::body::BoxError>> {
    Box::pin(async move {
        match engine.upgrade() {
            Some(engine) => Ok(engine.handle(request).await),
            None => Err(crate::body::BoxError::from("the API server has stopped")),
        }
    })
}

fn index_fields(hub: &Hub, catalog: &Catalog) {
    let mut by_prefix: std::collections::BTreeMap<&str, Vec<outrigger_api::resource::Text>> = Default::default();
    for resource in catalog.all() {
        let labels = by_prefix.entry(&resource.storage_prefix).or_default();
        for label in &resource.field_labels {
            if !labels.contains(label) {
                labels.push(label.clone());
            }
        }
    }
    for (prefix, labels) in by_prefix {
        hub.index_fields(prefix, &labels);
    }
}

/// Core objects for the authenticators, read consistently.
struct CachedObjects {
    hub: Arc<Hub>,
    store: Arc<dyn Store>,
}

impl ObjectLookup for CachedObjects {
    fn get<'a>(&'a self, kind: LookupKind, namespace: &'a str, name: &'a str) -> BoxFuture<'a, Result<Option<Value>, String>> {
        Box::pin(async move {
            let revision = self.store.revision().await.map_err(|e| e.to_string())?;
            if !self.hub.wait_for(revision, std::time::Duration::from_secs(3)).await {
                return Err("the cache is behind the store".into());
            }
            let key = if namespace.is_empty() { name.to_string() } else { format!("{namespace}/{name}") };
            Ok(self.hub.cache(kind.resource()).get(&key).map(|entry| entry.object()))
        })
    }
}

struct RbacListener(Arc<RbacIndex>);

impl Listener for RbacListener {
    fn changed(&self, key: &str, _revision: u64, value: Option<&[u8]>) {
        let Some((prefix, rest)) = split_key(key) else { return };
        let Some(resource) = prefix.strip_prefix("rbac.authorization.k8s.io/") else { return };
        match value {
            Some(value) => {
                if let Err(error) = self.0.apply(resource, value) {
                    tracing::error!(key, %error, "a stored role or binding cannot be read");
                }
            }
            None => {
                let (namespace, name) = rest.split_once('/').unwrap_or(("", rest));
                self.0.delete(resource, namespace, name);
            }
        }
    }
}

struct NodeListener(Arc<NodeGraph>);

impl Listener for NodeListener {
    fn changed(&self, key: &str, _revision: u64, value: Option<&[u8]>) {
        let Some((prefix, rest)) = split_key(key) else { return };
        let resource = prefix.rsplit_once('/').map_or(prefix, |(_, plural)| plural);
        if !matches!(resource, "pods" | "persistentvolumes" | "volumeattachments" | "resourceslices" | "podcertificaterequests") {
            return;
        }
        match value {
            Some(value) => {
                if let Err(error) = self.0.apply(resource, value) {
                    tracing::error!(key, %error, "a stored object cannot be read");
                }
            }
            None => {
                let (namespace, name) = rest.split_once('/').unwrap_or(("", rest));
                self.0.delete(resource, namespace, name);
            }
        }
    }
}
