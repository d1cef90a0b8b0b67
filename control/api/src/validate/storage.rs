//! Volumes, claims and the storage group.
use serde_json::Value;

use super::place::{Findings, Place};
use super::scheduling::node_selector;
use super::volumes;
use crate::field_error::FieldError;
use crate::meta::{self, same};
use crate::names;
use crate::quantity::Quantity;

const ACCESS_MODES: &[&str] = &["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];

/// A claim's specification, also in templates.
pub(super) fn claim(spec: &Place<'_>, found: &mut Findings) {
    let modes = spec.at("accessModes");
    if modes.is_empty() {
        found.push(modes.required("at least 1 access mode is required"));
    }
    access_modes(&modes, found);
    super::metadata::label_selector(&spec.at("selector"), found);
    let storage = spec.at("resources").at("requests").key("storage");
    if !storage.is_set() {
        found.push(FieldError::required(format!("{}.resources[storage]", spec.path), ""));
    } else if Quantity::of(storage.value) <= Quantity::ZERO {
        found.push(FieldError::invalid(format!("{}.resources[storage]", spec.path), storage.text(), "must be greater than zero"));
    }
    spec.at("storageClassName").check_if_set(found, names::dns_subdomain);
    spec.at("volumeMode").one_of_if_set(found, &["Block", "Filesystem"]);
    for field in ["dataSource", "dataSourceRef"] {
        let source = spec.at(field);
        if source.is_set() {
            source.at("name").require(found);
            source.at("kind").require(found);
            if source.at("apiGroup").is_empty() && source.at("kind").text() != "PersistentVolumeClaim" {
                found.push(FieldError::invalid(
                    source.path,
                    source.value["kind"].clone(),
                    "must be 'PersistentVolumeClaim' when referencing the default apiGroup",
                ));
            }
        }
    }
}

fn access_modes(modes: &Place<'_>, found: &mut Findings) {
    for mode in modes.items() {
        if !ACCESS_MODES.contains(&mode.text()) {
            found.push(mode.named(&modes.path).unsupported(ACCESS_MODES));
        }
    }
    if modes.len() > 1 && modes.items().any(|mode| mode.text() == "ReadWriteOncePod") {
        found.push(modes.forbidden("may not use ReadWriteOncePod with other access modes"));
    }
}

pub(super) fn update_claim(root: &Place<'_>, old: &Value, found: &mut Findings) {
    let strip = |spec: &Value| {
        let mut spec = spec.clone();
        for path in ["resources", "volumeAttributesClassName"] {
            meta::remove(&mut spec, path);
        }
        spec
    };
    let (mut new, before) = (strip(&root.value["spec"]), strip(&old["spec"]));
    // The controller binds, and gives a class to a claim that has none.
    for field in ["volumeName", "storageClassName"] {
        if meta::text(&before, field).is_empty() {
            new[field] = before[field].clone();
        }
    }
    let spec = root.at("spec");
    if !same(&new, &before) {
        let detail = "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims\n";
        found.push(spec.forbidden(detail));
    }
    let storage = |object: &Value, path: &[&str]| Quantity::of(meta::at(object, path));
    let path = ["spec", "resources", "requests", "storage"];
    if storage(root.value, &path) < storage(old, &path) {
        let place = spec.at("resources.requests.storage");
        if storage(root.value, &path) <= storage(old, &["status", "capacity", "storage"]) {
            found.push(place.forbidden("field can not be less than status.capacity"));
        } else {
            found.push(place.forbidden("field can not be less than previous value"));
        }
    } else if storage(root.value, &path) != storage(old, &path) && meta::text(old, "status.phase") != "Bound" {
        found.push(
            spec.forbidden("spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims\n"),
        );
    }
}

const VOLUME_FIELDS: &[&str] = &[
    "accessModes",
    "capacity",
    "claimRef",
    "mountOptions",
    "nodeAffinity",
    "persistentVolumeReclaimPolicy",
    "storageClassName",
    "volumeAttributesClassName",
    "volumeMode",
];

pub(super) fn volume(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    let modes = spec.at("accessModes");
    modes.require(found);
    access_modes(&modes, found);
    let capacity = spec.at("capacity");
    if capacity.require(found) && (!capacity.key("storage").is_set() || capacity.len() > 1) {
        let names: Vec<Value> = capacity.entries().map(|(name, _)| name.into()).collect();
        found.push(FieldError::not_supported(capacity.path.clone(), Value::Array(names), &["storage"]));
    }
    for (_, amount) in capacity.entries() {
        if Quantity::of(amount.value) <= Quantity::ZERO {
            found.push(amount.invalid("must be greater than zero"));
        }
    }
    spec.at("persistentVolumeReclaimPolicy").one_of_if_set(found, &["Delete", "Recycle", "Retain"]);
    spec.at("volumeMode").one_of_if_set(found, &["Block", "Filesystem"]);
    spec.at("storageClassName").check_if_set(found, names::dns_subdomain);
    let required = spec.at("nodeAffinity.required");
    if spec.at("nodeAffinity").is_set() {
        if required.is_set() {
            node_selector(&required, found);
        } else {
            found.push(required.required("must specify required node constraints"));
        }
    }
    let sources: Vec<&str> =
        spec.entries().filter(|(key, value)| !VOLUME_FIELDS.contains(key) && value.is_set()).map(|(key, _)| key).collect();
    match sources.as_slice() {
        [] => found.push(spec.required("must specify a volume type")),
        [kind, rest @ ..] => {
            source(kind, &spec.at(kind), &spec, found);
            for extra in rest {
                found.push(spec.at(extra).forbidden("may not specify more than 1 volume type"));
            }
        }
    }
}

fn source(kind: &str, place: &Place<'_>, spec: &Place<'_>, found: &mut Findings) {
    match kind {
        "hostPath" => {
            place.at("path").require(found);
            volumes::no_backsteps(&place.at("path"), found);
            if place.at("path").text() == "/" && spec.at("persistentVolumeReclaimPolicy").text() == "Recycle" {
                found.push(spec.at("persistentVolumeReclaimPolicy").forbidden("may not be 'recycle' for a hostPath mount of '/'"));
            }
        }
        "local" => {
            place.at("path").require(found);
            volumes::no_backsteps(&place.at("path"), found);
            if !spec.at("nodeAffinity").is_set() {
                found.push(FieldError::required(format!("{}.nodeAffinity", spec.path), "Local volume requires node affinity"));
            }
        }
        "nfs" => {
            for field in ["server", "path"] {
                place.at(field).require(found);
            }
        }
        "csi" => {
            volumes::csi_driver(&place.at("driver"), found);
            place.at("volumeHandle").require(found);
        }
        _ => {}
    }
}

pub(super) fn update_volume(root: &Place<'_>, old: &Value, found: &mut Findings) {
    let source = |spec: &Value| {
        let mut spec = spec.clone();
        for field in VOLUME_FIELDS {
            meta::remove(&mut spec, field);
        }
        spec
    };
    if !same(&source(&root.value["spec"]), &source(&old["spec"])) {
        found.push(FieldError::forbidden("spec.persistentvolumesource", "spec.persistentvolumesource is immutable after creation\n"));
    }
    root.at("spec.volumeMode").immutable(found, meta::get(old, "spec.volumeMode"));
}

pub(super) fn class_kind(kind: &str, root: &Place<'_>, found: &mut Findings) {
    match kind {
        "StorageClass" => {
            root.at("provisioner").require(found);
            root.at("reclaimPolicy").one_of_if_set(found, &["Delete", "Retain"]);
            root.at("volumeBindingMode").one_of(found, &["Immediate", "WaitForFirstConsumer"]);
        }
        "VolumeAttributesClass" => {
            root.at("driverName").require(found);
            if root.at("parameters").is_empty() {
                found.push(root.at("parameters").required("must contain at least one key/value pair"));
            }
        }
        "VolumeAttachment" => {
            root.at("spec.attacher").require(found);
            root.at("spec.nodeName").require_format(found, names::dns_subdomain);
            let source = root.at("spec.source");
            match (source.at("inlineVolumeSpec").is_set(), source.at("persistentVolumeName").is_set()) {
                (false, false) => found.push(source.required("must specify exactly one of inlineVolumeSpec and persistentVolumeName")),
                (true, true) => found.push(source.forbidden("must specify exactly one of inlineVolumeSpec and persistentVolumeName")),
                _ => {}
            }
        }
        "CSIDriver" => {
            for mode in root.at("spec.volumeLifecycleModes").items() {
                mode.one_of_if_set(found, &["Ephemeral", "Persistent"]);
            }
            root.at("spec.fsGroupPolicy").one_of_if_set(found, &["File", "None", "ReadWriteOnceWithFSType"]);
        }
        "CSINode" => {
            for driver in root.at("spec.drivers").items() {
                volumes::csi_driver(&driver.at("name"), found);
                driver.at("nodeID").require(found);
            }
        }
        "CSIStorageCapacity" => {
            root.at("storageClassName").check(found, names::dns_subdomain);
            super::metadata::non_negative_quantity(&root.at("capacity"), found);
        }
        _ => {}
    }
}

pub(super) fn update_class(kind: &str, root: &Place<'_>, old: &Value, found: &mut Findings) {
    let forbid = |fields: &[&str], found: &mut Findings| {
        for field in fields {
            if !same(root.at(field).value, &old[*field]) {
                found.push(root.at(field).forbidden(format!("updates to {field} are forbidden.")));
            }
        }
    };
    match kind {
        "StorageClass" => {
            forbid(&["parameters", "provisioner", "reclaimPolicy"], found);
            root.at("volumeBindingMode").immutable(found, &old["volumeBindingMode"]);
        }
        "VolumeAttributesClass" => forbid(&["driverName", "parameters"], found),
        "VolumeAttachment" => root.at("spec").immutable(found, &old["spec"]),
        "CSIDriver" => {
            let place = root.at("spec.attachRequired").named("spec.attachedRequired");
            place.immutable(found, meta::get(old, "spec.attachRequired"));
            root.at("spec.volumeLifecycleModes").immutable(found, meta::get(old, "spec.volumeLifecycleModes"));
        }
        "CSIStorageCapacity" => {
            for field in ["nodeTopology", "storageClassName"] {
                root.at(field).immutable(found, &old[field]);
            }
        }
        _ => {}
    }
}
