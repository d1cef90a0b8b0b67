//! Pod volumes.
use std::collections::HashSet;

use super::containers::{field_reference, resource_reference};
use super::place::{Findings, Place};
use crate::field_error::FieldError;
use crate::names;

const FILE_MODE: &str = "must be a number between 0 and 0777 (octal), both inclusive";
const HOST_PATH_TYPES: &[&str] = &["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
const VOLUME_FIELD_PATHS: &[&str] = &["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];

pub(super) fn volumes(list: &Place<'_>, found: &mut Findings) {
    let mut seen = HashSet::new();
    for volume in list.items() {
        let name = volume.at("name");
        if name.is_empty() {
            found.push(name.required(""));
        } else {
            name.check(found, names::dns_label);
        }
        if !name.is_empty() && !seen.insert(name.text()) {
            found.push(name.duplicate());
        }
        let mut sources = volume.entries().filter(|(key, value)| *key != "name" && value.is_set()).map(|(key, _)| key);
        match sources.next() {
            None => found.push(volume.required("must specify a volume type")),
            Some(kind) => source(kind, &volume.at(kind), found),
        }
        for extra in sources {
            found.push(volume.at(extra).forbidden("may not specify more than 1 volume type"));
        }
    }
}

fn source(kind: &str, place: &Place<'_>, found: &mut Findings) {
    match kind {
        "emptyDir" => {
            super::metadata::non_negative_quantity(&place.at("sizeLimit"), found);
        }
        "hostPath" => {
            place.at("path").require(found);
            no_backsteps(&place.at("path"), found);
            place.at("type").one_of_if_set(found, HOST_PATH_TYPES);
        }
        "secret" => keyed_files(place, "secretName", found),
        "configMap" => keyed_files(place, "name", found),
        "downwardAPI" => {
            file_mode(&place.at("defaultMode"), found);
            downward_files(place, found);
        }
        "projected" => projected(place, found),
        "persistentVolumeClaim" => drop(place.at("claimName").require(found)),
        "nfs" => {
            place.at("server").require(found);
            if place.at("path").require(found) && !place.at("path").text().starts_with('/') {
                found.push(place.at("path").invalid("must be an absolute path"));
            }
        }
        "csi" => csi_driver(&place.at("driver"), found),
        "ephemeral" => match place.at("volumeClaimTemplate") {
            template if template.is_set() => super::storage::claim(&template.at("spec"), found),
            template => found.push(template.required("")),
        },
        "image" => drop(place.at("reference").require(found)),
        "gitRepo" => drop(place.at("repository").require(found)),
        "iscsi" => {
            for field in ["targetPortal", "iqn"] {
                place.at(field).require(found);
            }
        }
        _ => {}
    }
}

pub(super) fn csi_driver(name: &Place<'_>, found: &mut Findings) {
    if name.require(found) {
        if name.text().len() > 63 {
            found.push(FieldError::too_long(name.path.clone(), 63));
        }
        found.extend(names::dns_subdomain(&name.text().to_lowercase()).into_iter().map(|message| name.invalid(message)));
    }
}

/// ConfigMap and Secret volumes.
fn keyed_files(place: &Place<'_>, name: &str, found: &mut Findings) {
    place.at(name).require(found);
    file_mode(&place.at("defaultMode"), found);
    key_paths(&place.at("items"), found);
}

fn key_paths(items: &Place<'_>, found: &mut Findings) {
    for item in items.items() {
        item.at("key").require(found);
        file_path(&item.at("path"), found);
        file_mode(&item.at("mode"), found);
    }
}

fn file_mode(mode: &Place<'_>, found: &mut Findings) {
    if mode.integer().is_some_and(|mode| !(0..=0o777).contains(&mode)) {
        found.push(mode.invalid(FILE_MODE));
    }
}

/// Required, relative, and not one of the names the agent uses itself.
fn file_path(path: &Place<'_>, found: &mut Findings) {
    if path.require(found) {
        relative_path(path, found);
        if path.text().starts_with("..") && !path.text().starts_with("../") {
            found.push(path.invalid("must not start with '..'"));
        }
    }
}

/// Not absolute, and no way up.
pub(super) fn relative_path(path: &Place<'_>, found: &mut Findings) {
    if path.text().starts_with('/') {
        found.push(path.invalid("must be a relative path"));
    }
    no_backsteps(path, found);
}

pub(super) fn no_backsteps(path: &Place<'_>, found: &mut Findings) {
    if path.text().split('/').any(|part| part == "..") {
        found.push(path.invalid("must not contain '..'"));
    }
}

fn downward_files(place: &Place<'_>, found: &mut Findings) {
    for file in place.at("items").items() {
        file_path(&file.at("path"), found);
        let (field, resource) = (file.at("fieldRef"), file.at("resourceFieldRef"));
        field_reference(&field, VOLUME_FIELD_PATHS, found);
        match (field.is_set(), resource.is_set()) {
            (true, true) => {
                found.push(FieldError::invalid(
                    place.path.clone(),
                    "resource",
                    "fieldRef and resourceFieldRef can not be specified simultaneously",
                ));
            }
            (false, true) => resource_reference(&resource, true, found),
            (false, false) => found.push(place.required("one of fieldRef and resourceFieldRef is required")),
            (true, false) => {}
        }
        file_mode(&file.at("mode"), found);
    }
}

fn projected(place: &Place<'_>, found: &mut Findings) {
    file_mode(&place.at("defaultMode"), found);
    let mut paths = HashSet::new();
    for source in place.at("sources").items() {
        let mut kinds = source.entries().filter(|(_, value)| value.is_set());
        if let Some((kind, _)) = kinds.next() {
            projection(kind, &source.at(kind), &place.path, &mut paths, found);
        }
        for _ in kinds {
            found.push(source.forbidden("may not specify more than 1 volume type per source"));
        }
    }
}

fn projection<'a>(kind: &str, source: &Place<'a>, volume: &str, paths: &mut HashSet<&'a str>, found: &mut Findings) {
    match kind {
        "secret" | "configMap" => {
            source.at("name").require(found);
            key_paths(&source.at("items"), found);
        }
        "downwardAPI" => downward_files(source, found),
        "serviceAccountToken" => {
            let seconds = source.at("expirationSeconds");
            if seconds.number() < 600 {
                found.push(seconds.invalid("may not specify a duration less than 10 minutes"));
            }
            if seconds.number() > 1 << 32 {
                found.push(seconds.invalid("may not specify a duration larger than 2^32 seconds"));
            }
            if source.at("path").is_empty() {
                found.push(FieldError::required(format!("{volume}.path"), ""));
            }
        }
        _ => {}
    }
    let items = source.at("items");
    let targets = items.items().map(|item| item.at("path")).chain(std::iter::once(source.at("path")));
    for path in targets.filter(|path| !path.is_empty()) {
        if !paths.insert(path.text()) {
            found.push(FieldError::invalid(volume, path.text(), "conflicting duplicate paths"));
        }
    }
}
