//! Binds claims and volumes to each other, and says in their phases how they stand.
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::matching::{best, class_of, fits, is_reserved_for};
use crate::Context;
use crate::error::SyncError;
use crate::events::Recorder;
use crate::informers::Informers;
use crate::objects::{Key, annotation, is_terminating, name, uid};
use crate::worker::{self, Outcome, Queue};

const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
const BOUND_BY_US: &str = "pv.kubernetes.io/bound-by-controller";
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
const PROVISIONERS: [&str; 2] = ["volume.kubernetes.io/storage-provisioner", "volume.beta.kubernetes.io/storage-provisioner"];

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Item {
    Claim(Key),
    Volume(Key),
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Claim(key) => write!(f, "claim {key}"),
            Self::Volume(key) => write!(f, "volume {key}"),
        }
    }
}

fn claim_key(volume: &PersistentVolume) -> Option<Key> {
    let reference = volume.spec.as_ref()?.claim_ref.as_ref()?;
    Some(Key::new(reference.namespace.clone()?, reference.name.clone()?))
}

fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    annotation(&claim.metadata, BIND_COMPLETED).is_some()
}

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Item>::new();
    let (add, claims) = (queue.clone(), context.informers.volume_claims.clone());
    context.informers.volumes.on_change(move |old, new| {
        let Some(volume) = new.or(old) else { return };
        add.add(Item::Volume(Key::of(&**volume)));
        match claim_key(volume) {
            Some(key) => add.add(Item::Claim(key)),
            // A free volume may be what some claim waits for.
            None => claims.list().iter().filter(|claim| !is_bound(claim)).for_each(|claim| add.add(Item::Claim(Key::of(&**claim)))),
        }
    });
    let add = queue.clone();
    context.informers.volume_claims.on_change(move |old, new| {
        let Some(claim) = new.or(old) else { return };
        add.add(Item::Claim(Key::of(&**claim)));
        if let Some(volume) = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).filter(|volume| !volume.is_empty()) {
            add.add(Item::Volume(Key::new("", volume)));
        }
    });
    let binder = Binder { informers: context.informers.clone(), recorder: context.recorder.named("persistentvolume-controller") };
    // One at a time: two claims must not be given one volume.
    tasks.spawn(worker::run("persistentvolume-binder", queue, 1, move |item| {
        let binder = binder.clone();
        async move {
            match item {
                Item::Claim(key) => binder.sync_claim(key).await,
                Item::Volume(key) => binder.sync_volume(key).await,
            }
        }
    }));
}

#[derive(Clone)]
struct Binder {
    informers: Arc<Informers>,
    recorder: Recorder,
}

impl Binder {
    async fn sync_claim(&self, key: Key) -> Outcome {
        let Some(claim) = self.informers.volume_claims.get(&key) else { return Ok(None) };
        let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).unwrap_or_default();
        let volume = self.informers.volumes.get(&Key::new("", &named));
        if is_bound(&claim) {
            match volume {
                Some(volume) if is_reserved_for(&volume, &claim) || claim_key(&volume).is_none() => self.bind(&volume, &claim).await?,
                Some(_) => {
                    self.lose(&claim, "ClaimMisbound", "Two claims are bound to the same volume, this one is bound incorrectly").await?
                }
                None => self.lose(&claim, "ClaimLost", "Bound claim has lost its PersistentVolume. Data on the volume is lost!").await?,
            }
            return Ok(None);
        }
        if is_terminating(&claim.metadata) {
            return Ok(None);
        }
        if named.is_empty() {
            return self.find(&claim).await.map(|()| None);
        }
        match volume {
            Some(volume) if is_reserved_for(&volume, &claim) => self.bind(&volume, &claim).await?,
            Some(volume) if claim_key(&volume).is_none() && fits(&volume, &claim) => self.bind(&volume, &claim).await?,
            _ => self.set_claim_phase(&claim, "Pending").await?,
        }
        Ok(None)
    }

    /// Looks for a volume for an unbound claim; else says what it waits for.
    async fn find(&self, claim: &PersistentVolumeClaim) -> Result<(), SyncError> {
        let class_name = class_of(claim);
        let class = self.informers.storage_classes.get(&Key::new("", class_name));
        let waits = class.as_ref().is_some_and(|class| class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"))
            && annotation(&claim.metadata, SELECTED_NODE).is_none();
        if let Some(volume) = best(&self.informers.volumes.list(), claim, waits) {
            return self.bind(&volume, claim).await;
        }
        let provisioner = class.as_ref().map(|class| class.provisioner.clone()).filter(|by| by != "kubernetes.io/no-provisioner");
        if waits {
            self.recorder.normal(claim, "WaitForFirstConsumer", "waiting for first consumer to be created before binding");
        } else if let Some(provisioner) = provisioner {
            let missing = PROVISIONERS.iter().any(|key| annotation(&claim.metadata, key) != Some(&provisioner));
            if missing {
                let marks: serde_json::Map<String, Value> =
                    PROVISIONERS.iter().map(|key| ((*key).to_owned(), provisioner.clone().into())).collect();
                self.informers.volume_claims.merge(&Key::of(claim), json!({"metadata": {"annotations": marks}})).await?;
            }
            let message = format!(
                "Waiting for a volume to be created either by the external provisioner '{provisioner}' or manually by the system administrator. \
                 If volume creation is delayed, please verify that the provisioner is running and correctly registered."
            );
            self.recorder.normal(claim, "ExternalProvisioning", message);
        } else if class_name.is_empty() {
            self.recorder.normal(claim, "FailedBinding", "no persistent volumes available for this claim and no storage class is set");
        } else if class.is_none() {
            let message = format!("storageclass.storage.k8s.io {class_name:?} not found");
            self.recorder.warning(claim, "ProvisioningFailed", message);
        }
        let Some(current) = self.informers.volume_claims.get(&Key::of(claim)) else { return Ok(()) };
        self.set_claim_phase(&current, "Pending").await
    }

    /// Each step can be the first: a stop between any two is made good by the next sync.
    async fn bind(&self, volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Result<(), SyncError> {
        let (volume_key, claim_key) = (Key::of(volume), Key::of(claim));
        let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
        if reference.and_then(|reference| reference.uid.as_deref()) != Some(uid(&claim.metadata)) {
            let mut patch = json!({"metadata": {"resourceVersion": volume.metadata.resource_version}, "spec": {"claimRef": {
                "apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": claim_key.namespace, "name": claim_key.name,
                "uid": claim.metadata.uid, "resourceVersion": claim.metadata.resource_version,
            }}});
            if reference.is_none() {
                patch["metadata"]["annotations"] = json!({BOUND_BY_US: "yes"});
            }
            self.informers.volumes.merge(&volume_key, patch).await?;
        }
        self.set_volume_phase(&volume_key, "Bound").await?;
        let chosen = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
        if !is_bound(claim) || chosen != volume_key.name {
            let mut annotations = json!({BIND_COMPLETED: "yes"});
            if chosen != volume_key.name {
                annotations[BOUND_BY_US] = "yes".into();
            }
            let metadata = json!({"resourceVersion": claim.metadata.resource_version, "annotations": annotations});
            self.informers.volume_claims.merge(&claim_key, json!({"metadata": metadata, "spec": {"volumeName": volume_key.name}})).await?;
        }
        self.show_bound(volume, &claim_key).await
    }

    async fn show_bound(&self, volume: &PersistentVolume, key: &Key) -> Result<(), SyncError> {
        let Some(claim) = self.informers.volume_claims.get(key) else { return Ok(()) };
        let status = claim.status.clone().unwrap_or_default();
        let spec = volume.spec.clone().unwrap_or_default();
        // A resize in progress changes the capacity itself.
        if status.phase.as_deref() == Some("Bound") && status.capacity.is_some() {
            return Ok(());
        }
        let mut updated = (*claim).clone();
        let status = updated.status.get_or_insert_default();
        status.phase = Some("Bound".into());
        status.access_modes = spec.access_modes;
        status.capacity = spec.capacity;
        self.informers.volume_claims.update_status(&updated).await.map(drop)
    }

    async fn lose(&self, claim: &PersistentVolumeClaim, reason: &'static str, message: &str) -> Result<(), SyncError> {
        if claim.status.as_ref().and_then(|status| status.phase.as_deref()) != Some("Lost") {
            self.set_claim_phase(claim, "Lost").await?;
            self.recorder.warning(claim, reason, message);
        }
        Ok(())
    }

    async fn set_claim_phase(&self, claim: &PersistentVolumeClaim, phase: &str) -> Result<(), SyncError> {
        if claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some(phase) {
            return Ok(());
        }
        let mut updated = claim.clone();
        let status = updated.status.get_or_insert_default();
        status.phase = Some(phase.into());
        if phase != "Bound" {
            (status.access_modes, status.capacity) = (None, None);
        }
        self.informers.volume_claims.update_status(&updated).await.map(drop)
    }

    async fn set_volume_phase(&self, key: &Key, phase: &str) -> Result<(), SyncError> {
        let Some(volume) = self.informers.volumes.get(key) else { return Ok(()) };
        if volume.status.as_ref().and_then(|status| status.phase.as_deref()) == Some(phase) {
            return Ok(());
        }
        let mut updated = (*volume).clone();
        let status = updated.status.get_or_insert_default();
        status.phase = Some(phase.into());
        (status.reason, status.message) = (None, None);
        self.informers.volumes.update_status(&updated).await.map(drop)
    }

    async fn sync_volume(&self, key: Key) -> Outcome {
        let Some(volume) = self.informers.volumes.get(&key) else { return Ok(None) };
        let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.clone());
        let id = reference.and_then(|reference| reference.uid).unwrap_or_default();
        let Some(claim_key) = claim_key(&volume).filter(|_| !id.is_empty()) else {
            // Free, or reserved for a claim that isn't there yet.
            self.set_volume_phase(&key, "Available").await?;
            return Ok(None);
        };
        let is_claim = |claim: &PersistentVolumeClaim| uid(&claim.metadata) == id;
        let held = self.informers.volume_claims.get(&claim_key).filter(|claim| is_claim(claim));
        let claim = match held {
            Some(claim) => Some(claim),
            // Before data is given up the server is asked.
            None => self.informers.volume_claims.get_live(&claim_key).await?.filter(is_claim).map(Arc::new),
        };
        let Some(claim) = claim else {
            // With Retain it stays so; with Delete whoever provisioned it watches for this phase.
            self.set_volume_phase(&key, "Released").await?;
            return Ok(None);
        };
        let bound_to = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
        if bound_to == name(&volume.metadata) {
            self.set_volume_phase(&key, "Bound").await?;
        } else if !bound_to.is_empty() && annotation(&volume.metadata, BOUND_BY_US).is_some() {
            // The claim took another volume while this one was kept for it.
            let metadata = json!({"resourceVersion": volume.metadata.resource_version, "annotations": {BOUND_BY_US: null}});
            self.informers.volumes.merge(&key, json!({"metadata": metadata, "spec": {"claimRef": null}})).await?;
        }
        Ok(None)
    }
}
