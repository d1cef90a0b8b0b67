//! Reads the API: one list-and-watch per kind, kept in a [`Mirror`].
use std::fmt::Debug;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use outrigger_client::Decoded;
use serde::de::DeserializeOwned;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use crate::mirror::{Key, Mirror, Object};

/// Every kind that the agent follows as a whole.
#[derive(Clone, Default)]
pub struct Watch {
    /// Pods bound to this node.
    pub pods: Mirror<Pod>,
    pub services: Mirror<Service>,
    pub endpoint_slices: Mirror<EndpointSlice>,
    pub nodes: Mirror<Node>,
    pub namespaces: Mirror<Namespace>,
    pub network_policies: Mirror<NetworkPolicy>,
}

/// How much of the cluster the agent's parts look at.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// This node's pods; else none.
    pub pods: bool,
    /// All nodes; else only this one.
    pub all_nodes: bool,
    /// All Services and their endpoints; else only those that a Service proxy serves.
    pub all_services: bool,
    /// NetworkPolicies and the namespaces that they select; see [`crate::peers`] for the pods.
    pub policies: bool,
}

/// What kube-proxy leaves out: Services that somebody else serves, and headless ones.
const SERVED: &str = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";

impl Watch {
    /// Starts a watch per kind; they run until the returned tasks are aborted.
    pub fn start(client: &Client, node_name: &str, extent: Extent) -> (Self, Vec<JoinHandle<()>>) {
        let mut watch = Self::default();
        if !extent.all_services {
            // The proxy alone wants them.
            (watch.services, watch.endpoint_slices) = (Mirror::passing(), Mirror::passing());
        }
        let all = watcher::Config::default;
        let nodes = if extent.all_nodes { all() } else { all().fields(&format!("metadata.name={node_name}")) };
        let services = || if extent.all_services { all() } else { all().labels(SERVED) };
        let mut tasks = vec![
            tokio::spawn(follow(Api::all(client.clone()), services(), watch.services.clone())),
            tokio::spawn(follow(Api::all(client.clone()), services(), watch.endpoint_slices.clone())),
            tokio::spawn(follow(Api::all(client.clone()), nodes, watch.nodes.clone())),
        ];
        if extent.pods {
            let own = all().fields(&format!("spec.nodeName={node_name}"));
            tasks.push(tokio::spawn(follow(Api::all(client.clone()), own, watch.pods.clone())));
        }
        if extent.policies {
            tasks.push(tokio::spawn(follow(Api::all(client.clone()), all(), watch.namespaces.clone())));
            tasks.push(tokio::spawn(follow(Api::all(client.clone()), all(), watch.network_policies.clone())));
        }
        (watch, tasks)
    }
}

/// Keeps `mirror` equal to what the API server has, for ever: errors are logged and retried with back-off,
/// and the mirror keeps its last state meanwhile.
pub async fn follow<K>(api: Api<Decoded<K>>, config: watcher::Config, mirror: Mirror<K>)
where
    K: Object + Debug + DeserializeOwned,
    K::DynamicType: Default,
{
    let kind = K::kind(&K::DynamicType::default()).into_owned();
    // Who manages which field is often longer than the rest, and nobody here asks. kube-proxy drops it, too.
    let forget = |object: &mut Decoded<K>| object.meta_mut().managed_fields = None;
    let mut events = watcher(api, config).default_backoff().modify(forget).boxed();
    let mut initial = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Init) => initial.clear(),
            Ok(watcher::Event::InitApply(object)) => initial.extend(object.readable()),
            Ok(watcher::Event::InitDone) => {
                debug!(kind, objects = initial.len(), "listed");
                mirror.replace(std::mem::take(&mut initial));
            }
            Ok(watcher::Event::Apply(object)) => object.readable().into_iter().for_each(|object| mirror.apply(object)),
            Ok(watcher::Event::Delete(object)) => {
                let last = object.last_state(|gone| mirror.get(&Key::of_meta(gone)));
                last.into_iter().for_each(|object| mirror.delete(object));
            }
            Err(error) => warn!(kind, %error, "the watch broke off; it is taken up again"),
        }
    }
}
