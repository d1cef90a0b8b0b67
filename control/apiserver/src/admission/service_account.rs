//! ServiceAccount: every pod runs as one, and finds its token, the cluster's CA and its namespace under a well-known path.

use outrigger_api::{Status, meta};
use serde_json::{Value, json};

use super::{Attributes, Operation, Plugin, lookup};
use crate::engine::Engine;
use crate::registry::create::name_suffix;

const MOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const MIRROR: &str = "kubernetes.io/config.mirror";
const TOKEN_SECONDS: i64 = 3607;

pub struct ServiceAccount;

impl Plugin for ServiceAccount {
    fn mutate(&self, engine: &Engine, attributes: &Attributes<'_>, pod: &mut Value) -> Result<(), Status> {
        if !attributes.creates("", "Pod") || meta::annotation(pod, MIRROR).is_some() {
            return Ok(());
        }
        if meta::text(pod, "spec.serviceAccountName").is_empty() {
            let older = meta::text(pod, "spec.serviceAccount").to_string();
            meta::set(pod, "spec.serviceAccountName", if older.is_empty() { "default".into() } else { older });
        }
        let name = meta::text(pod, "spec.serviceAccountName").to_string();
        meta::set(pod, "spec.serviceAccount", name.as_str());
        let Some(account) = lookup(engine, "", "serviceaccounts", attributes.namespace, &name) else {
            let namespace = attributes.namespace;
            return Err(
                attributes.forbidden(format!("error looking up service account {namespace}/{name}: serviceaccount {name:?} not found"))
            );
        };
        if wants_token(pod, &account) {
            mount_token(pod);
        }
        if meta::is_empty(meta::get(pod, "spec.imagePullSecrets")) && !meta::is_empty(&account["imagePullSecrets"]) {
            meta::set(pod, "spec.imagePullSecrets", account["imagePullSecrets"].clone());
        }
        Ok(())
    }

    fn validate(&self, _engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        let Some(pod) = object.filter(|_| attributes.creates("", "Pod")) else { return Ok(()) };
        if meta::annotation(pod, MIRROR).is_none() {
            return Ok(());
        }
        if !meta::text(pod, "spec.serviceAccountName").is_empty() {
            return Err(attributes.forbidden("a mirror pod may not reference service accounts"));
        }
        let refers = |kind: &str| meta::items(pod, "spec.volumes").iter().any(|v| !v[kind].is_null());
        if refers("secret") {
            return Err(attributes.forbidden("a mirror pod may not reference secrets"));
        }
        if attributes.operation == Operation::Create && refers("persistentVolumeClaim") {
            return Err(attributes.forbidden("a mirror pod may not reference persistentvolumeclaims"));
        }
        Ok(())
    }
}

fn wants_token(pod: &Value, account: &Value) -> bool {
    let said = |object: &Value, path: &str| meta::get(object, path).as_bool();
    said(pod, "spec.automountServiceAccountToken").or(said(account, "automountServiceAccountToken")).unwrap_or(true)
}

fn mount_token(pod: &mut Value) {
    let volumes = meta::items(pod, "spec.volumes");
    let known = volumes.iter().find(|v| is_token_volume(v)).and_then(|v| v["name"].as_str().map(String::from));
    let name = known.clone().unwrap_or_else(|| format!("kube-api-access-{}", name_suffix()));
    let mut mounted = false;
    for list in ["initContainers", "containers"] {
        let Some(containers) = pod["spec"].get_mut(list).and_then(Value::as_array_mut) else { continue };
        for container in containers {
            if meta::items(container, "volumeMounts").iter().any(|m| m["mountPath"] == MOUNT_PATH) {
                continue;
            }
            let mut mounts = meta::items(container, "volumeMounts").to_vec();
            mounts.push(json!({"name": name, "readOnly": true, "mountPath": MOUNT_PATH}));
            container["volumeMounts"] = mounts.into();
            mounted = true;
        }
    }
    if mounted && known.is_none() {
        let mut volumes = meta::items(pod, "spec.volumes").to_vec();
        volumes.push(token_volume(&name));
        meta::set(pod, "spec.volumes", volumes);
    }
}

fn is_token_volume(volume: &Value) -> bool {
    volume["name"].as_str().is_some_and(|n| n.starts_with("kube-api-access-"))
        && meta::items(volume, "projected.sources").iter().any(|s| !s["serviceAccountToken"].is_null())
}

fn token_volume(name: &str) -> Value {
    json!({
        "name": name,
        "projected": {
            "sources": [
                {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
            ],
            "defaultMode": 420,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_mounted_once_per_container() {
        let mut pod =
            json!({"spec": {"containers": [{"name": "a"}, {"name": "b", "volumeMounts": [{"name": "own", "mountPath": MOUNT_PATH}]}]}});
        mount_token(&mut pod);
        mount_token(&mut pod);
        assert_eq!(pod["spec"]["volumes"].as_array().unwrap().len(), 1);
        assert_eq!(pod["spec"]["containers"][0]["volumeMounts"].as_array().unwrap().len(), 1);
        assert_eq!(pod["spec"]["containers"][1]["volumeMounts"][0]["name"], "own");
    }
}
