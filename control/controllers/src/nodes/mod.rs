//! What the control plane does about nodes: address blocks, health, taints, and the pods of dead nodes.
pub mod eviction;
pub mod health;
pub mod ipam;
pub mod pod_gc;
pub mod selection;
pub mod taints;

use tokio::task::JoinSet;

use crate::Context;

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    ipam::start(context, tasks);
    health::start(context, tasks);
    taints::start(context, tasks);
    eviction::start(context, tasks);
    pod_gc::start(context, tasks);
}
