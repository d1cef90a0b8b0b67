//! Gives every node its block of pod addresses. The blocks in the Node objects are the only record.
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use k8s_openapi::api::core::v1::Node;
use serde_json::json;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::Context;
use crate::error::SyncError;
use crate::events::Recorder;
use crate::informers::Informers;
use crate::objects::{Key, is_terminating, name};
use crate::worker::{self, Outcome, Queue};

/// Prefix lengths of a node's block, as upstream's defaults.
const BLOCK_V4: u8 = 24;
const BLOCK_V6: u8 = 64;

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let Some(cluster) = context.config.cluster_cidr else { return };
    let blocks = Arc::new(Mutex::new(Blocks::new(cluster, context.config.service_cidr)));
    let queue = Queue::<Key>::new();
    // Known blocks are taken before the first node is served: the handler sees all existing nodes first.
    let (add, known) = (queue.clone(), blocks.clone());
    context.informers.nodes.on_change(move |old, new| {
        let mut blocks = known.lock().unwrap_or_else(PoisonError::into_inner);
        match (old, new) {
            (Some(gone), None) => blocks.release(name(&gone.metadata)),
            (_, Some(node)) => match block_of(node) {
                Some(block) => {
                    if let Err(holder) = blocks.occupy(name(&node.metadata), block) {
                        warn!(node = name(&node.metadata), %block, %holder, "two nodes have the same block");
                    }
                }
                None => add.add(Key::of(&**node)),
            },
            (None, None) => {}
        }
    });
    let informers = context.informers.clone();
    let recorder = context.recorder.named("cidrAllocator");
    tasks.spawn(worker::run("node-ipam", queue, 1, move |key| assign(informers.clone(), recorder.clone(), blocks.clone(), key)));
}

fn block_of(node: &Node) -> Option<IpNet> {
    let spec = node.spec.as_ref()?;
    let first = spec.pod_cidrs.as_ref().and_then(|blocks| blocks.first()).or(spec.pod_cidr.as_ref())?;
    first.parse().ok()
}

async fn assign(informers: Arc<Informers>, recorder: Recorder, blocks: Arc<Mutex<Blocks>>, key: Key) -> Outcome {
    let Some(node) = informers.nodes.get(&key).filter(|node| block_of(node).is_none() && !is_terminating(&node.metadata)) else {
        return Ok(None);
    };
    let block = blocks.lock().unwrap_or_else(PoisonError::into_inner).allocate(&key.name);
    let Some(block) = block else {
        recorder.normal(&*node, "CIDRNotAvailable", format!("Node {} status is now: CIDRNotAvailable", key.name));
        return Err(SyncError::Other("all blocks of the cluster CIDR are taken".into()));
    };
    let patch = json!({"spec": {"podCIDR": block.to_string(), "podCIDRs": [block.to_string()]}});
    match informers.nodes.strategic(&key, patch).await {
        Ok(_) => {
            info!(node = %key, %block, "node got its block");
            Ok(None)
        }
        Err(error) => {
            blocks.lock().unwrap_or_else(PoisonError::into_inner).release(&key.name);
            Err(error)
        }
    }
}

/// Which blocks of the cluster's range are taken, and by whom.
#[derive(Debug)]
struct Blocks {
    cluster: IpNet,
    reserved: Option<IpNet>,
    taken: BTreeMap<u64, String>,
    by_node: BTreeMap<String, BTreeSet<u64>>,
    /// Where the search goes on, so that a freed block isn't given out again at once.
    next: u64,
}

impl Blocks {
    fn new(cluster: IpNet, reserved: Option<IpNet>) -> Self {
        Self { cluster: cluster.trunc(), reserved, taken: BTreeMap::new(), by_node: BTreeMap::new(), next: 0 }
    }

    fn length(&self) -> u8 {
        let default = if matches!(self.cluster, IpNet::V4(_)) { BLOCK_V4 } else { BLOCK_V6 };
        default.max(self.cluster.prefix_len())
    }

    fn count(&self) -> u64 {
        1u64.checked_shl(u32::from(self.length() - self.cluster.prefix_len()).min(32)).unwrap_or(u64::MAX)
    }

    fn block(&self, index: u64) -> Option<IpNet> {
        match self.cluster {
            IpNet::V4(cluster) => {
                let base = u32::from(cluster.network()) as u64 + (index << (32 - self.length()));
                Ipv4Net::new(Ipv4Addr::from(u32::try_from(base).ok()?), self.length()).ok().map(IpNet::V4)
            }
            IpNet::V6(cluster) => {
                let base = u128::from(cluster.network()) + (u128::from(index) << (128 - self.length()));
                Ipv6Net::new(Ipv6Addr::from(base), self.length()).ok().map(IpNet::V6)
            }
        }
    }

    fn index(&self, block: IpNet) -> Option<u64> {
        if !self.cluster.contains(&block.network()) {
            return None;
        }
        match (self.cluster, block.network()) {
            (IpNet::V4(cluster), IpAddr::V4(address)) => {
                Some(u64::from(u32::from(address) - u32::from(cluster.network())) >> (32 - self.length()))
            }
            (IpNet::V6(cluster), IpAddr::V6(address)) => {
                u64::try_from((u128::from(address) - u128::from(cluster.network())) >> (128 - self.length())).ok()
            }
            _ => None,
        }
    }

    fn occupy(&mut self, node: &str, block: IpNet) -> Result<(), String> {
        let Some(index) = self.index(block) else { return Ok(()) };
        match self.taken.get(&index) {
            Some(holder) if holder != node => return Err(holder.clone()),
            _ => {}
        }
        self.taken.insert(index, node.to_owned());
        self.by_node.entry(node.to_owned()).or_default().insert(index);
        Ok(())
    }

    fn release(&mut self, node: &str) {
        for index in self.by_node.remove(node).unwrap_or_default() {
            self.taken.remove(&index);
        }
    }

    fn allocate(&mut self, node: &str) -> Option<IpNet> {
        let count = self.count();
        for step in 0..count {
            let index = (self.next + step) % count;
            let Some(block) = self.block(index) else { continue };
            let is_reserved =
                self.reserved.is_some_and(|reserved| reserved.contains(&block.network()) || block.contains(&reserved.network()));
            if self.taken.contains_key(&index) || is_reserved {
                continue;
            }
            self.next = (index + 1) % count;
            // The index is free, so nobody else can hold it.
            let _ = self.occupy(node, block);
            return Some(block);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_given_once_and_reoccupied() {
        let mut blocks = Blocks::new("10.244.0.0/22".parse().unwrap(), None);
        blocks.occupy("old", "10.244.1.0/24".parse().unwrap()).unwrap();
        let given: Vec<_> = ["a", "b", "c"].iter().map(|node| blocks.allocate(node).unwrap().to_string()).collect();
        assert_eq!(given, ["10.244.0.0/24", "10.244.2.0/24", "10.244.3.0/24"]);
        assert!(blocks.allocate("d").is_none());
        blocks.release("b");
        assert_eq!(blocks.allocate("d").unwrap().to_string(), "10.244.2.0/24");
        assert_eq!(blocks.occupy("e", "10.244.2.0/24".parse().unwrap()), Err("d".to_owned()));
    }

    #[test]
    fn services_addresses_are_left_out_and_v6_works() {
        let mut blocks = Blocks::new("10.0.0.0/23".parse().unwrap(), Some("10.0.0.0/24".parse().unwrap()));
        assert_eq!(blocks.allocate("a").unwrap().to_string(), "10.0.1.0/24");
        let mut six = Blocks::new("fd00:10:244::/56".parse().unwrap(), None);
        six.allocate("a");
        assert_eq!(six.allocate("b").unwrap().to_string(), "fd00:10:244:1::/64");
    }
}
