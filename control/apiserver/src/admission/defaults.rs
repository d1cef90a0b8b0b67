//! Default storage and ingress classes, and the finalizers that protect storage in use.

use outrigger_api::{Status, meta};
use serde_json::Value;

use super::{Attributes, Plugin, all};
use crate::engine::Engine;

/// StorageObjectInUseProtection
pub struct StorageObjectInUse;

impl Plugin for StorageObjectInUse {
    fn mutate(&self, _engine: &Engine, attributes: &Attributes<'_>, object: &mut Value) -> Result<(), Status> {
        let finalizer = if attributes.creates("", "PersistentVolumeClaim") {
            "kubernetes.io/pvc-protection"
        } else if attributes.creates("", "PersistentVolume") {
            "kubernetes.io/pv-protection"
        } else {
            return Ok(());
        };
        if !meta::finalizers(object).any(|f| f == finalizer) {
            let mut finalizers = meta::items(object, "metadata.finalizers").to_vec();
            finalizers.push(finalizer.into());
            meta::set(object, "metadata.finalizers", finalizers);
        }
        Ok(())
    }
}

/// DefaultStorageClass and DefaultIngressClass
pub struct DefaultClasses;

impl Plugin for DefaultClasses {
    fn mutate(&self, engine: &Engine, attributes: &Attributes<'_>, object: &mut Value) -> Result<(), Status> {
        if attributes.creates("", "PersistentVolumeClaim") {
            let said = meta::get(object, "spec.storageClassName").is_string();
            let older = meta::annotation(object, "volume.beta.kubernetes.io/storage-class").is_some();
            if said || older {
                return Ok(());
            }
            let marks = ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
            if let Some(name) = newest_default(engine, "storage.k8s.io", "storageclasses", &marks) {
                meta::set(object, "spec.storageClassName", name);
            }
        } else if attributes.creates("networking.k8s.io", "Ingress") {
            let said = meta::get(object, "spec.ingressClassName").is_string();
            if said || meta::annotation(object, "kubernetes.io/ingress.class").is_some() {
                return Ok(());
            }
            let marks = ["ingressclass.kubernetes.io/is-default-class"];
            if let Some(name) = newest_default(engine, "networking.k8s.io", "ingressclasses", &marks) {
                meta::set(object, "spec.ingressClassName", name);
            }
        }
        Ok(())
    }
}

/// Of several defaults the newest wins, and of equally old ones the first by name.
fn newest_default(engine: &Engine, group: &str, plural: &str, marks: &[&str]) -> Option<String> {
    let mut defaults: Vec<Value> = all(engine, group, plural, "");
    defaults.retain(|class| marks.iter().any(|mark| meta::annotation(class, mark) == Some("true")));
    defaults.sort_by(|a, b| meta::creation_timestamp(b).cmp(meta::creation_timestamp(a)).then(meta::name(a).cmp(meta::name(b))));
    defaults.first().map(|class| meta::name(class).to_string())
}
