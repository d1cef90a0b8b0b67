//! What the cluster's DNS knows: Services and their EndpointSlices, shared with the mirrors, and the indexes that
//! answer by address.
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use outrigger_cluster::Delta;
use outrigger_cluster::mirror::Key;

const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// One named endpoint of a headless Service: what a PTR record of its address points to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamedEndpoint {
    pub service: Key,
    pub hostname: String,
}

#[derive(Default)]
pub struct Records {
    services: HashMap<Key, Arc<Service>>,
    /// By the Service that they belong to.
    slices: HashMap<Key, Vec<Arc<EndpointSlice>>>,
    /// The Service of each slice, for slices that change theirs.
    slice_services: HashMap<Key, Key>,
    cluster_ips: HashMap<IpAddr, Key>,
    named_endpoints: HashMap<IpAddr, BTreeSet<NamedEndpoint>>,
    /// How many Services each namespace has.
    namespaces: HashMap<String, usize>,
}

impl Records {
    pub fn service(&self, key: &Key) -> Option<&Service> {
        self.services.get(key).map(Arc::as_ref)
    }

    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.contains_key(namespace)
    }

    /// The Service that owns a cluster IP.
    pub fn by_cluster_ip(&self, address: IpAddr) -> Option<&Key> {
        self.cluster_ips.get(&address)
    }

    pub fn by_endpoint(&self, address: IpAddr) -> impl Iterator<Item = &NamedEndpoint> {
        self.named_endpoints.get(&address).into_iter().flatten()
    }

    /// The Service's endpoints that are to be published, each with its slice.
    pub fn endpoints<'a>(&'a self, key: &Key, service: &'a Service) -> impl Iterator<Item = (&'a EndpointSlice, &'a Endpoint)> {
        let all = service.spec.as_ref().and_then(|spec| spec.publish_not_ready_addresses).unwrap_or(false);
        let slices = self.slices.get(key).map(Vec::as_slice).unwrap_or_default();
        slices.iter().flat_map(|slice| slice.endpoints.iter().map(move |endpoint| (slice.as_ref(), endpoint))).filter(
            move |(_, endpoint)| {
                // No condition means ready, as the EndpointSlice API has it.
                all || endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
            },
        )
    }

    pub fn take_service(&mut self, delta: &Delta<Service>) {
        match delta {
            Delta::Replaced(services) => {
                self.services.clear();
                self.cluster_ips.clear();
                self.namespaces.clear();
                services.iter().for_each(|service| self.put_service(service));
            }
            Delta::Applied(service) => self.put_service(service),
            Delta::Deleted(service) => self.remove_service(&Key::of(&**service)),
        }
    }

    fn put_service(&mut self, service: &Arc<Service>) {
        let key = Key::of(&**service);
        self.remove_service(&key);
        for address in cluster_ips(service) {
            self.cluster_ips.insert(address, key.clone());
        }
        *self.namespaces.entry(key.namespace.clone()).or_default() += 1;
        self.services.insert(key, service.clone());
    }

    fn remove_service(&mut self, key: &Key) {
        let Some(service) = self.services.remove(key) else { return };
        for address in cluster_ips(&service) {
            // Another Service may have got the address meanwhile.
            if self.cluster_ips.get(&address) == Some(key) {
                self.cluster_ips.remove(&address);
            }
        }
        if let Some(count) = self.namespaces.get_mut(&key.namespace) {
            *count -= 1;
            if *count == 0 {
                self.namespaces.remove(&key.namespace);
            }
        }
    }

    pub fn take_slice(&mut self, delta: &Delta<EndpointSlice>) {
        match delta {
            Delta::Replaced(slices) => {
                self.slices.clear();
                self.slice_services.clear();
                self.named_endpoints.clear();
                slices.iter().for_each(|slice| self.put_slice(slice));
            }
            Delta::Applied(slice) => self.put_slice(slice),
            Delta::Deleted(slice) => self.remove_slice(&Key::of(&**slice)),
        }
    }

    fn put_slice(&mut self, slice: &Arc<EndpointSlice>) {
        let key = Key::of(&**slice);
        self.remove_slice(&key);
        if slice.address_type == "FQDN" {
            return;
        }
        let Some(service) = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME)) else { return };
        let service = Key::new(key.namespace.clone(), service.clone());
        for (address, named) in named_endpoints(slice, &service) {
            self.named_endpoints.entry(address).or_default().insert(named);
        }
        self.slices.entry(service.clone()).or_default().push(slice.clone());
        self.slice_services.insert(key, service);
    }

    fn remove_slice(&mut self, key: &Key) {
        let Some(service) = self.slice_services.remove(key) else { return };
        let Some(slices) = self.slices.get_mut(&service) else { return };
        let Some(position) = slices.iter().position(|slice| Key::of(&**slice) == *key) else { return };
        let slice = slices.swap_remove(position);
        if slices.is_empty() {
            self.slices.remove(&service);
        }
        for (address, named) in named_endpoints(&slice, &service) {
            if let Some(names) = self.named_endpoints.get_mut(&address) {
                names.remove(&named);
                if names.is_empty() {
                    self.named_endpoints.remove(&address);
                }
            }
        }
    }
}

/// A Service's cluster IPs; none for a headless or external one.
pub fn cluster_ips(service: &Service) -> Vec<IpAddr> {
    let Some(spec) = &service.spec else { return Vec::new() };
    if spec.type_.as_deref() == Some("ExternalName") {
        return Vec::new();
    }
    let texts = match &spec.cluster_ips {
        Some(addresses) if !addresses.is_empty() => addresses.iter(),
        _ => spec.cluster_ip.as_slice().iter(),
    };
    texts.filter_map(|text| text.parse().ok()).collect()
}

fn named_endpoints(slice: &EndpointSlice, service: &Key) -> Vec<(IpAddr, NamedEndpoint)> {
    let named = slice.endpoints.iter().filter_map(|endpoint| {
        let hostname = endpoint.hostname.clone().filter(|hostname| !hostname.is_empty())?;
        let named = NamedEndpoint { service: service.clone(), hostname };
        Some(
            endpoint
                .addresses
                .iter()
                .filter_map(|address| address.parse().ok())
                .map(move |address| (address, named.clone()))
                .collect::<Vec<_>>(),
        )
    });
    named.flatten().collect()
}
