//! Publishes the cluster's CA to every namespace, for pods to trust the API server by.
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tokio::task::JoinSet;

use crate::informers::Informers;
use crate::objects::{Key, namespace};
use crate::serviceaccount::is_active;
use crate::worker::{self, Outcome, Queue};
use crate::{Config, Context};

const NAME: &str = "kube-root-ca.crt";
const DESCRIPTION: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of Kubernetes clusters.";

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.namespaces.on_change(move |_, new| {
        if let Some(object) = new {
            add.add(Key::of(&**object));
        }
    });
    let add = queue.clone();
    context.informers.config_maps.on_change(move |old, new| {
        if let Some(bundle) = new.or(old) {
            add.add(Key::new("", namespace(&bundle.metadata)));
        }
    });
    let (informers, config) = (context.informers.clone(), context.config.clone());
    tasks.spawn(worker::run("root-ca-publisher", queue, 1, move |key| publish(informers.clone(), config.clone(), key)));
}

async fn publish(informers: Arc<Informers>, config: Arc<Config>, key: Key) -> Outcome {
    if !informers.namespaces.get(&key).is_some_and(|namespace| is_active(&namespace)) {
        return Ok(None);
    }
    let data: BTreeMap<String, String> = [("ca.crt".to_owned(), String::from_utf8_lossy(&config.root_ca).into_owned())].into();
    let annotations: BTreeMap<String, String> = [("kubernetes.io/description".to_owned(), DESCRIPTION.to_owned())].into();
    let result = match informers.config_maps.get(&Key::new(&key.name, NAME)) {
        Some(current) => {
            let described = annotations
                .iter()
                .all(|(key, value)| current.metadata.annotations.as_ref().is_some_and(|have| have.get(key) == Some(value)));
            if current.data.as_ref() == Some(&data) && described {
                return Ok(None);
            }
            let mut updated = (*current).clone();
            updated.data = Some(data);
            updated.binary_data = None;
            updated.metadata.annotations.get_or_insert_default().extend(annotations);
            informers.config_maps.update(&updated).await
        }
        None => {
            let metadata =
                ObjectMeta { name: Some(NAME.into()), namespace: Some(key.name), annotations: Some(annotations), ..Default::default() };
            informers.config_maps.create(&ConfigMap { metadata, data: Some(data), ..Default::default() }).await
        }
    };
    match result {
        Ok(_) => Ok(None),
        Err(error) if error.is_already_exists() || error.is_namespace_terminating() => Ok(None),
        Err(error) => Err(error),
    }
}
