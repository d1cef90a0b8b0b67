//! Volumes for claims: binding the two, protecting what is in use, and claims that live as long as their pod.
pub mod binder;
pub mod ephemeral;
pub mod matching;
pub mod protection;

use tokio::task::JoinSet;

use crate::Context;

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    binder::start(context, tasks);
    protection::start(context, tasks);
    ephemeral::start(context, tasks);
}
