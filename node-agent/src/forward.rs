//! Watched objects on their way from a mirror to the loop that follows them.
use outrigger_cluster::{Delta, Subscription};
use outrigger_desired::Watched;
use tokio::sync::mpsc;

/// Passes every change on, as `wrap` has it, for as long as somebody listens.
pub fn forward<K, C>(mut from: Subscription<K>, to: mpsc::UnboundedSender<C>, wrap: fn(Watched<K>) -> C)
where
    K: Send + Sync + 'static,
    C: Send + 'static,
{
    tokio::spawn(async move {
        while let Some(delta) = from.recv().await {
            let watched = match delta {
                Delta::Replaced(all) => Watched::Replaced(all),
                Delta::Applied(object) => Watched::Applied(object),
                Delta::Deleted(object) => Watched::Deleted(object),
            };
            if to.send(wrap(watched)).is_err() {
                return;
            }
        }
    });
}
