//! Writes the API: the node, its lease, pod statuses, events, token requests. The only place in the agent that does.
use std::sync::Arc;

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec, TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, PodStatus, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference, Time};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt};

pub mod events;
pub mod patch;
mod pods;

pub use pods::WrittenStatus;

/// Where node leases live.
const LEASE_NAMESPACE: &str = "kube-node-lease";

/// A write that the API server refused or that never reached it.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {object}: {source}")]
pub struct Error {
    pub operation: &'static str,
    pub object: String,
    #[source]
    pub source: Box<kube::Error>,
}

impl Error {
    fn new(operation: &'static str, object: impl Into<String>, source: kube::Error) -> Self {
        Self { operation, object: object.into(), source: Box::new(source) }
    }

    /// The HTTP status code of the API server's answer, if there was an answer.
    pub fn code(&self) -> Option<u16> {
        code(&self.source)
    }
}

pub(crate) fn code(error: &kube::Error) -> Option<u16> {
    if let kube::Error::Api(status) = error { Some(status.code) } else { None }
}

pub type Result<T> = std::result::Result<T, Error>;

/// The agent's pen. Cheap to clone; clones share the queues.
#[derive(Clone)]
pub struct Writer {
    client: Client,
    node_name: Arc<str>,
    statuses: Arc<pods::Statuses>,
    events: events::Recorder,
}

impl Writer {
    /// `node_name` is the source of the events. Must be called inside a tokio runtime.
    pub fn new(client: Client, node_name: &str) -> Self {
        let events = events::Recorder::start(client.clone(), node_name);
        Self { statuses: pods::Statuses::new(client.clone()), client, node_name: node_name.into(), events }
    }

    /// Records an event of the component `kubelet`; never blocks, repeats are counted on one Event object.
    pub fn event(&self, about: &ObjectReference, kind: events::Kind, reason: &str, message: impl Into<String>) {
        self.events.record(about.clone(), kind, reason, message.into());
    }

    /// Creates the Node or returns the one that is there.
    pub async fn register_node(&self, node: &Node) -> Result<Node> {
        let api: Api<Node> = Api::all(self.client.clone());
        match api.create(&PostParams::default(), node).await {
            Ok(node) => Ok(node),
            Err(error) if code(&error) == Some(409) => {
                api.get(&node.name_any()).await.map_err(|error| Error::new("read node", &*self.node_name, error))
            }
            Err(error) => Err(Error::new("register node", &*self.node_name, error)),
        }
    }

    /// A merge patch of the Node itself (labels, annotations).
    pub async fn patch_node(&self, patch: &serde_json::Value) -> Result<Node> {
        let api: Api<Node> = Api::all(self.client.clone());
        let result = api.patch(&self.node_name, &PatchParams::default(), &Patch::Merge(patch)).await;
        result.map_err(|error| Error::new("patch node", &*self.node_name, error))
    }

    /// A strategic merge patch of the Node's status.
    pub async fn patch_node_status(&self, patch: &serde_json::Value) -> Result<Node> {
        let api: Api<Node> = Api::all(self.client.clone());
        let result = api.patch_status(&self.node_name, &PatchParams::default(), &Patch::Strategic(patch)).await;
        result.map_err(|error| Error::new("patch status of node", &*self.node_name, error))
    }

    /// Creates or renews the node's lease, owned by the Node so that it goes with it.
    pub async fn renew_lease(&self, held: Option<Lease>, duration_seconds: i32, node_uid: Option<&str>) -> Result<Lease> {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), LEASE_NAMESPACE);
        let failed = |error| Error::new("renew lease", &*self.node_name, error);
        let held = match held {
            Some(lease) => Some(lease),
            None => api.get_opt(&self.node_name).await.map_err(failed)?,
        };
        let found = held.is_some();
        let mut lease = held.unwrap_or_default();
        lease.metadata.name = Some(self.node_name.to_string());
        lease.metadata.namespace = Some(LEASE_NAMESPACE.into());
        if lease.metadata.owner_references.as_ref().is_none_or(Vec::is_empty)
            && let Some(uid) = node_uid
        {
            lease.metadata.owner_references = Some(vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: self.node_name.to_string(),
                uid: uid.into(),
                ..OwnerReference::default()
            }]);
        }
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        spec.holder_identity = Some(self.node_name.to_string());
        spec.lease_duration_seconds = Some(duration_seconds);
        spec.renew_time = Some(MicroTime(jiff::Timestamp::now()));
        let written = if found {
            api.replace(&self.node_name, &PostParams::default(), &lease).await
        } else {
            api.create(&PostParams::default(), &lease).await
        };
        written.map_err(failed)
    }

    /// Queues a pod's status. The newest one wins; writes of one pod are in order; failed ones are retried until the pod is gone.
    pub fn set_pod_status(&self, pod: &Pod, status: PodStatus) {
        self.statuses.set(pod, status);
    }

    /// Resolves once everything queued for the pod has been written, or the API server no longer knows the pod.
    pub async fn pod_status_written(&self, uid: &str) -> WrittenStatus {
        self.statuses.written(uid).await
    }

    /// Drops what is remembered of the pod.
    pub fn forget_pod(&self, uid: &str) {
        self.statuses.forget(uid);
    }

    /// Removes the API object for good, if it's still the same pod.
    pub async fn delete_pod(&self, namespace: &str, name: &str, uid: &str) -> Result<()> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let parameters =
            DeleteParams::default().grace_period(0).preconditions(Preconditions { uid: Some(uid.into()), resource_version: None });
        match api.delete(name, &parameters).await {
            Ok(_) => Ok(()),
            Err(error) if code(&error) == Some(404) => Ok(()),
            // Another pod of that name, or only a write that came between: then it is tried again.
            Err(error) => match api.get_opt(name).await {
                Ok(found) if found.as_ref().is_none_or(|found| found.uid().as_deref() != Some(uid)) => Ok(()),
                _ => Err(Error::new("delete pod", format!("{namespace}/{name}"), error)),
            },
        }
    }

    /// Creates a pod (mirror pods); one that is there already is not an error.
    pub async fn create_pod(&self, pod: &Pod) -> Result<Option<Pod>> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
        match api.create(&PostParams::default(), pod).await {
            Ok(pod) => Ok(Some(pod)),
            Err(error) if code(&error) == Some(409) => Ok(None),
            Err(error) => Err(Error::new("create pod", pod.name_any(), error)),
        }
    }

    /// A token of the service account, bound to the pod.
    pub async fn request_token(
        &self,
        namespace: &str,
        service_account: &str,
        pod: (&str, &str),
        audiences: Vec<String>,
        expiration_seconds: i64,
    ) -> Result<(String, Time)> {
        let (name, uid) = pod;
        let bound = BoundObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: Some(name.into()),
            uid: Some(uid.into()),
        };
        let spec = TokenRequestSpec { audiences, bound_object_ref: Some(bound), expiration_seconds: Some(expiration_seconds) };
        let request = TokenRequest { spec, ..TokenRequest::default() };
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        let failed = |error| Error::new("request token of service account", format!("{namespace}/{service_account}"), error);
        let answer: TokenRequest =
            api.create_subresource("token", service_account, &PostParams::default(), &request).await.map_err(failed)?;
        match answer.status {
            Some(status) => Ok((status.token, status.expiration_timestamp)),
            None => Err(failed(kube::Error::Service("the answer has no status".into()))),
        }
    }

    /// Asks who a bearer token belongs to.
    pub async fn review_token(&self, token: &str, audiences: Option<Vec<String>>) -> Result<TokenReview> {
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let review = TokenReview { spec: TokenReviewSpec { token: Some(token.into()), audiences }, ..TokenReview::default() };
        api.create(&PostParams::default(), &review).await.map_err(|error| Error::new("review", "token", error))
    }

    /// Asks whether a user may do something.
    pub async fn review_access(&self, spec: SubjectAccessReviewSpec) -> Result<SubjectAccessReview> {
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        api.create(&PostParams::default(), &review).await.map_err(|error| Error::new("review", "access", error))
    }

    /// Files a signing request; its certificate is read back with [`Writer::signed_certificate`].
    pub async fn create_signing_request(&self, request: &CertificateSigningRequest) -> Result<CertificateSigningRequest> {
        let api: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        let result = api.create(&PostParams::default(), request).await;
        result.map_err(|error| Error::new("create signing request", request.metadata.generate_name.clone().unwrap_or_default(), error))
    }

    /// The certificate (PEM) that was issued for the request, if it was already.
    pub async fn signed_certificate(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let api: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        let request = api.get(name).await.map_err(|error| Error::new("read signing request", name, error))?;
        Ok(request.status.and_then(|status| status.certificate).map(|bytes| bytes.0))
    }
}

/// The reference that events and owners carry.
pub fn reference_to_pod(pod: &Pod) -> ObjectReference {
    let meta: &ObjectMeta = &pod.metadata;
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        field_path: None,
    }
}

/// The node as events' object: upstream uses the name as its UID too, so that events of a node that isn't registered yet can be found.
pub fn reference_to_node(node_name: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Node".into()),
        name: Some(node_name.into()),
        uid: Some(node_name.into()),
        ..ObjectReference::default()
    }
}
