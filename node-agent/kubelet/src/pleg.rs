//! Which pods changed in the runtime: by its events, with a listing now and then as a net.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tracing::{debug, warn};

use crate::cri::events::{self, RuntimeEvent};
use crate::cri::{Cri, v1};
use crate::runtime::POD_UID;

const NET_WITH_EVENTS: Duration = Duration::from_secs(30);
const NET_ALONE: Duration = Duration::from_secs(1);
/// The runtime tells of an end a little before its own state shows it.
const SETTLE: [u64; 12] = [1, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120];

/// The state of everything, by container or sandbox id: its pod's UID and its state's number.
type Snapshot = HashMap<String, (String, i32)>;

async fn snapshot(cri: &Cri) -> crate::cri::Result<Snapshot> {
    let (containers, sandboxes) =
        tokio::try_join!(cri.list_containers(v1::ContainerFilter::default()), cri.list_sandboxes(v1::PodSandboxFilter::default()))?;
    let uid = |labels: &HashMap<String, String>| labels.get(POD_UID).cloned().unwrap_or_default();
    let mut all: Snapshot = containers.into_iter().map(|container| (container.id, (uid(&container.labels), container.state))).collect();
    all.extend(sandboxes.into_iter().map(|sandbox| (sandbox.id, (uid(&sandbox.labels), sandbox.state))));
    Ok(all)
}

/// UIDs of the pods in which the two differ.
fn changed(before: &Snapshot, after: &Snapshot) -> Vec<String> {
    let mut uids: Vec<String> = after
        .iter()
        .filter(|(id, state)| before.get(*id) != Some(*state))
        .chain(before.iter().filter(|(id, _)| !after.contains_key(*id)))
        .map(|(_, (uid, _))| uid.clone())
        .collect();
    uids.sort();
    uids.dedup();
    uids
}

/// Calls `wake` with a pod's UID whenever something of it changed, for ever.
pub async fn run(cri: Cri, wake: Arc<dyn Fn(&str) + Send + Sync>) {
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let mut source = tokio::spawn(events::follow(cri.clone(), sender));
    let mut alone = false;
    let mut known = Snapshot::new();
    let mut tick = tokio::time::interval(NET_WITH_EVENTS);
    loop {
        let look = tokio::select! {
            event = receiver.recv(), if !alone => match event {
                Some(RuntimeEvent::Gap) => true,
                Some(event) => {
                    tokio::spawn(settle(cri.clone(), event, wake.clone()));
                    false
                }
                None => false,
            },
            _ = &mut source, if !alone => {
                warn!("the runtime has no event stream; its containers are listed every second");
                alone = true;
                tick = tokio::time::interval(NET_ALONE);
                true
            }
            _ = tick.tick() => true,
        };
        if !look {
            continue;
        }
        match snapshot(&cri).await {
            Ok(now) => {
                changed(&known, &now).iter().for_each(|uid| wake(uid));
                known = now;
            }
            Err(error) => debug!(%error, "couldn't list the runtime's containers"),
        }
    }
}

/// Waits until the runtime's own state shows the end, then wakes the pod.
async fn settle(cri: Cri, event: RuntimeEvent, wake: Arc<dyn Fn(&str) + Send + Sync>) {
    let (RuntimeEvent::Exited { id } | RuntimeEvent::OutOfMemory { id }) = event else { return };
    for pause in SETTLE {
        match find(&cri, &id).await {
            Ok(Some((uid, ended))) if ended => {
                wake(&uid);
                return;
            }
            // Removed already: whoever removed it knows.
            Ok(None) => return,
            Ok(Some(_)) | Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

/// The pod of a container or sandbox, and whether that is down.
async fn find(cri: &Cri, id: &str) -> crate::cri::Result<Option<(String, bool)>> {
    let containers = cri.list_containers(v1::ContainerFilter { id: id.into(), ..Default::default() }).await?;
    if let Some(container) = containers.first() {
        let ended = container.state() == v1::ContainerState::ContainerExited;
        return Ok(Some((container.labels.get(POD_UID).cloned().unwrap_or_default(), ended)));
    }
    let sandboxes = cri.list_sandboxes(v1::PodSandboxFilter { id: id.into(), ..Default::default() }).await?;
    Ok(sandboxes.first().map(|sandbox| {
        let ended = sandbox.state() == v1::PodSandboxState::SandboxNotready;
        (sandbox.labels.get(POD_UID).cloned().unwrap_or_default(), ended)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pods_that_changed() {
        let snapshot = |entries: &[(&str, &str, i32)]| -> Snapshot {
            entries.iter().map(|(id, uid, state)| ((*id).to_owned(), ((*uid).to_owned(), *state))).collect()
        };
        let before = snapshot(&[("a", "1", 1), ("b", "2", 1), ("c", "3", 1)]);
        let after = snapshot(&[("a", "1", 2), ("b", "2", 1), ("d", "4", 0)]);
        assert_eq!(changed(&before, &after), ["1", "3", "4"]);
    }
}
