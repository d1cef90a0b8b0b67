//! Topology hints: which zones and nodes an endpoint should serve (pure).
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointHints, EndpointSlice, ForNode, ForZone};

use super::plan::Changes;
use crate::objects::name;

/// Sets or clears the hints of every slice as the Service's trafficDistribution asks, moving slices that were
/// to stay as they are into the updates where that changes them.
pub fn reconcile(service: &Service, existing: &[Arc<EndpointSlice>], changes: &mut Changes) {
    let wish = service.spec.as_ref().and_then(|spec| spec.traffic_distribution.as_deref());
    let (zones, nodes) = match wish {
        Some("PreferClose" | "PreferSameZone") => (true, false),
        Some("PreferSameNode") => (true, true),
        _ => (false, false),
    };
    let changed: Vec<String> = changes.update.iter().chain(&changes.delete).map(|slice| name(&slice.metadata).to_owned()).collect();
    for slice in existing.iter().filter(|slice| !changed.iter().any(|other| other == name(&slice.metadata))) {
        if slice.endpoints.iter().any(|endpoint| endpoint.hints != hints(endpoint, zones, nodes)) {
            changes.update.push((**slice).clone());
        }
    }
    for slice in changes.create.iter_mut().chain(&mut changes.update) {
        for endpoint in &mut slice.endpoints {
            endpoint.hints = hints(endpoint, zones, nodes);
        }
    }
}

fn hints(endpoint: &Endpoint, zones: bool, nodes: bool) -> Option<EndpointHints> {
    let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(true);
    if !ready && (zones || nodes) {
        return endpoint.hints.clone();
    }
    let for_zones = endpoint.zone.clone().filter(|_| zones).map(|name| vec![ForZone { name }]);
    let for_nodes = endpoint.node_name.clone().filter(|_| nodes).map(|name| vec![ForNode { name }]);
    (for_zones.is_some() || for_nodes.is_some()).then_some(EndpointHints { for_nodes, for_zones })
}
