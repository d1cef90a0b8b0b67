//! The engine: what every request passes through, in order, and what all handlers share.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use http::{HeaderValue, Method};
use outrigger_access::authn::RequestCredentials;
use outrigger_access::node::NodeGraph;
use outrigger_access::rbac::RbacIndex;
use outrigger_access::token::TokenIssuer;
use outrigger_access::{Attributes, Authenticator, AuthnError, Authorizer, FieldRequirement, Union, UserInfo};
use outrigger_api::{Catalog, Resource, Status};
use outrigger_store::Store;

use crate::admission;
use crate::aggregator::{self, Aggregator};
use crate::body::{Request, Response};
use crate::cache::Hub;
use crate::call::Call;
use crate::config::Config;
use crate::discovery;
use crate::metrics::Metrics;
use crate::negotiate;
use crate::openapi::OpenApi;
use crate::proxy::Kubelets;
use crate::registry;
use crate::registry::service::ServiceAllocator;
use crate::reply::{self, Reply};
use crate::request::{Query, RequestInfo, request_info};
use crate::server::Peer;

/// The sender of a request that did not come over a socket: already known, never authenticated again.
#[derive(Clone, Debug)]
pub struct InProcess(pub UserInfo);

pub struct Engine {
    pub config: Config,
    pub store: Arc<dyn Store>,
    pub hub: Arc<Hub>,
    pub catalog: Arc<RwLock<Arc<Catalog>>>,
    pub authenticator: Authenticator,
    pub authorizer: Union,
    pub rbac: Arc<RbacIndex>,
    pub node_graph: Arc<NodeGraph>,
    pub tokens: Arc<TokenIssuer>,
    pub services: ServiceAllocator,
    pub admission: admission::Chain,
    pub kubelets: Kubelets,
    pub openapi: OpenApi,
    pub aggregator: Arc<Aggregator>,
    pub metrics: Metrics,
    pub started: Instant,
    pub ready: std::sync::atomic::AtomicBool,
    pub stop: tokio::sync::watch::Receiver<bool>,
}

impl Engine {
    pub fn catalog(&self) -> Arc<Catalog> {
        self.catalog.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// A built-in resource that the engine itself reads or writes.
    pub fn builtin(&self, group: &str, version: &str, plural: &str) -> Arc<Resource> {
        let catalog = self.catalog();
        match catalog.by_path(group, version, plural) {
            Some(resource) => resource.clone(),
            None => panic!("{group}/{version} {plural} is not in the resource table"),
        }
    }

    /// Waits until the caches have seen every write acknowledged so far: the read that follows is consistent.
    pub async fn fresh(&self) -> Result<u64, Status> {
        let revision = self.store.revision().await.map_err(crate::registry::store_failure)?;
        self.reach(revision).await?;
        Ok(revision)
    }

    /// Waits until the caches have seen `revision`.
    pub async fn reach(&self, revision: u64) -> Result<(), Status> {
        if self.hub.wait_for(revision, Duration::from_secs(3)).await {
            return Ok(());
        }
        Err(Status::too_large_resource_version(revision, self.hub.revision()))
    }

    /// Answers one request; never fails and never panics.
    pub fn handle(self: &Arc<Self>, request: Request) -> BoxFuture<'static, Response> {
        let engine = self.clone();
        Box::pin(async move { engine.answer(request).await })
    }

    async fn answer(self: &Arc<Self>, request: Request) -> Response {
        let started = Instant::now();
        let method = request.method().clone();
        let query = Query::parse(request.uri().query());
        let info = request_info(&method, request.uri().path(), &query);
        let audit_id = request.headers().get("audit-id").cloned().unwrap_or_else(new_audit_id);
        let target = request.uri().to_string();
        let outcome = AssertUnwindSafe(self.filters(request, info.clone(), query)).catch_unwind().await;
        let mut response = match outcome {
            Ok(Ok(response)) => response,
            Ok(Err(status)) => reply::failure(&status),
            Err(_) => {
                tracing::error!(%method, target, "a handler panicked");
                reply::failure(&Status::internal("panic while handling the request"))
            }
        };
        if method == Method::HEAD {
            *response.body_mut() = crate::body::full(bytes::Bytes::new());
        }
        response.headers_mut().insert("audit-id", audit_id);
        let code = response.status().as_u16();
        let catalog = self.catalog();
        let resource = catalog.by_path(&info.group, &info.version, &info.resource).map(|resource| &**resource);
        self.metrics.observe(&info, resource, code, started.elapsed());
        tracing::debug!(%method, target, code, elapsed = ?started.elapsed(), "request");
        response
    }

    async fn filters(self: &Arc<Self>, mut request: Request, info: RequestInfo, query: Query) -> Result<Response, Status> {
        let user = self.identify(&mut request, &info).await?;
        let user = self.impersonate(&request, user)?;
        self.authorize(&user, &info, query.text("fieldSelector"))?;
        if let Some(remote) = aggregator::serving(self, &info.path).await? {
            return aggregator::pass_on(self, &remote, &user, request).await;
        }
        if !info.is_resource {
            return discovery::route(self, request, &info, &query, &user).await;
        }
        self.resource(request, info, query, user).await
    }

    async fn identify(&self, request: &mut Request, info: &RequestInfo) -> Result<UserInfo, Status> {
        if let Some(InProcess(user)) = request.extensions_mut().remove::<InProcess>() {
            return Ok(user);
        }
        let peer = request.extensions().get::<Arc<Peer>>().cloned().unwrap_or_default();
        let is_websocket = request.headers().get(http::header::UPGRADE).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"websocket"));
        let credentials =
            RequestCredentials { headers: request.headers(), peer_certificates: &peer.certificates, path: &info.path, is_websocket };
        let authenticated = self.authenticator.authenticate(credentials).await.map_err(|error| {
            tracing::debug!(%error, path = info.path, "not authenticated");
            authn_failure(error)
        })?;
        request.headers_mut().remove(http::header::AUTHORIZATION);
        Ok(authenticated.user)
    }

    fn impersonate(&self, request: &Request, user: UserInfo) -> Result<UserInfo, Status> {
        let Some(wanted) = outrigger_access::authn::parse_impersonation(request.headers()).map_err(authn_failure)? else {
            return Ok(user);
        };
        for check in &wanted.checks {
            let mut attributes = Attributes::resource(&user, "impersonate", check.api_group, check.resource);
            attributes.namespace = &check.namespace;
            attributes.name = &check.name;
            attributes.subresource = &check.subresource;
            self.permit(&attributes)?;
        }
        Ok(wanted.user)
    }

    fn authorize(&self, user: &UserInfo, info: &RequestInfo, field_selector: &str) -> Result<(), Status> {
        let requirements = field_requirements(field_selector);
        let attributes = Attributes {
            user,
            verb: &info.verb,
            namespace: &info.namespace,
            api_group: &info.group,
            api_version: &info.version,
            resource: &info.resource,
            subresource: &info.subresource,
            name: &info.name,
            is_resource: info.is_resource,
            path: &info.path,
            field_selector: &requirements,
        };
        self.permit(&attributes)
    }

    /// Err with upstream's 403 unless the authorizers allow.
    pub fn permit(&self, attributes: &Attributes<'_>) -> Result<(), Status> {
        let decision = self.authorizer.authorize(attributes);
        if decision.allowed() {
            return Ok(());
        }
        let mut why = refusal(attributes);
        if !decision.reason().is_empty() {
            why = format!("{why}: {}", decision.reason());
        }
        Err(Status::forbidden(attributes.api_group, attributes.resource, attributes.name, &why))
    }

    /// The resource that a path names. One that is not known yet may come from a definition just written.
    async fn find(&self, info: &RequestInfo) -> Result<Arc<Resource>, Status> {
        let lookup = || self.catalog().by_path(&info.group, &info.version, &info.resource).cloned();
        if let Some(resource) = lookup().filter(|resource| resource.custom.is_none()) {
            return Ok(resource);
        }
        self.fresh().await?;
        lookup().ok_or_else(Status::path_not_found)
    }

    async fn resource(self: &Arc<Self>, request: Request, info: RequestInfo, query: Query, user: UserInfo) -> Result<Response, Status> {
        let resource = self.find(&info).await?;
        let forms =
            matches!(info.verb.as_str(), "get" | "list" | "watch" | "create" | "update" | "patch") && !resource.strategy.create_only;
        let streams = matches!(info.subresource.as_str(), "log" | "exec" | "attach" | "portforward" | "proxy");
        let accept = if streams { negotiate::Accept::default() } else { negotiate::accept(request.headers(), forms)? };
        let agent = negotiate::header_text(request.headers(), &http::header::USER_AGENT).to_string();
        let call = Call::new(user, info, query, &agent, accept, resource)?;
        if let Some(warning) = &call.resource.warning {
            call.warn(warning.to_string());
        }
        let result = registry::dispatch(self, &call, request).await;
        let mut response = match result {
            Ok(reply) => reply.into_response(accept),
            Err(status) => Reply::Object(status.code, status.to_value()).into_response(accept_errors(accept, &status)).with_retry(&status),
        };
        for warning in call.take_warnings() {
            if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{}\"", warning.replace('\\', "\\\\").replace('"', "\\\""))) {
                response.headers_mut().append(http::header::WARNING, value);
            }
        }
        Ok(response)
    }
}

fn accept_errors(accept: negotiate::Accept, _status: &Status) -> negotiate::Accept {
    negotiate::Accept { gzip: false, ..accept }
}

trait WithRetry {
    fn with_retry(self, status: &Status) -> Self;
}

impl WithRetry for Response {
    fn with_retry(mut self, status: &Status) -> Self {
        if let Some(seconds) = status.retry_after() {
            self.headers_mut().insert(http::header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        self
    }
}

fn new_audit_id() -> HeaderValue {
    // A uuid's text is plain ASCII.
    HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()).unwrap_or(HeaderValue::from_static("-"))
}

fn authn_failure(error: AuthnError) -> Status {
    match error {
        AuthnError::Unauthorized(_) => Status::unauthorized(),
        AuthnError::BadRequest(why) => Status::bad_request(why),
    }
}

fn refusal(attributes: &Attributes<'_>) -> String {
    let user = &attributes.user.name;
    let verb = attributes.verb;
    if !attributes.is_resource {
        return format!("User {user:?} cannot {verb} path {:?}", attributes.path);
    }
    let resource = match attributes.subresource {
        "" => attributes.resource.to_string(),
        subresource => format!("{}/{subresource}", attributes.resource),
    };
    let scope = match attributes.namespace {
        "" => "at the cluster scope".to_string(),
        namespace => format!("in the namespace {namespace:?}"),
    };
    format!("User {user:?} cannot {verb} resource {resource:?} in API group {:?} {scope}", attributes.api_group)
}

pub fn field_requirements(selector: &str) -> Vec<FieldRequirement> {
    let terms = selector.split(',').filter(|t| !t.is_empty());
    terms
        .filter_map(|term| {
            let (field, value, equals) = match term.split_once("!=") {
                Some((field, value)) => (field, value, false),
                None => {
                    let (field, value) = term.split_once('=')?;
                    (field, value.trim_start_matches('='), true)
                }
            };
            Some(FieldRequirement { field: field.into(), equals, value: value.into() })
        })
        .collect()
}
