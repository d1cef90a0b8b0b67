//! ServiceAccounts: a default one in every namespace, and the old kind of tokens in Secrets.
use std::sync::Arc;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Namespace, Secret, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::DeleteParams;
use serde_json::json;
use tokio::task::JoinSet;

use crate::error::unless_gone;
use crate::informers::Informers;
use crate::objects::{Key, annotation, is_terminating, name, namespace, uid};
use crate::worker::{self, Outcome, Queue};
use crate::{Config, Context, SyncError};

pub const NAME: &str = "kubernetes.io/service-account.name";
pub const UID: &str = "kubernetes.io/service-account.uid";
const DEFAULT: &str = "default";

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    start_defaults(context, tasks);
    if context.config.sign_token.is_some() {
        start_tokens(context, tasks);
    }
}

pub fn is_active(namespace: &Namespace) -> bool {
    !is_terminating(&namespace.metadata) && namespace.status.as_ref().and_then(|status| status.phase.as_deref()) != Some("Terminating")
}

fn start_defaults(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.namespaces.on_change(move |_, new| {
        if let Some(object) = new {
            add.add(Key::of(&**object));
        }
    });
    let add = queue.clone();
    context.informers.service_accounts.on_change(move |old, new| {
        if let (Some(gone), None) = (old, new) {
            add.add(Key::new("", namespace(&gone.metadata)));
        }
    });
    let informers = context.informers.clone();
    tasks.spawn(worker::run("serviceaccount", queue, 1, move |key| ensure_default(informers.clone(), key)));
}

async fn ensure_default(informers: Arc<Informers>, key: Key) -> Outcome {
    let there = informers.service_accounts.get(&Key::new(&key.name, DEFAULT)).is_some();
    if there || !informers.namespaces.get(&key).is_some_and(|namespace| is_active(&namespace)) {
        return Ok(None);
    }
    let account = ServiceAccount {
        metadata: ObjectMeta { name: Some(DEFAULT.into()), namespace: Some(key.name), ..Default::default() },
        ..Default::default()
    };
    match informers.service_accounts.create(&account).await {
        Ok(_) => Ok(None),
        Err(error) if error.is_already_exists() || error.is_namespace_terminating() => Ok(None),
        Err(error) => Err(error),
    }
}

fn start_tokens(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.secrets.on_change(move |old, new| {
        if let Some(secret) = new.or(old) {
            add.add(Key::of(&**secret));
        }
    });
    let (add, secrets) = (queue.clone(), context.informers.secrets.clone());
    context.informers.service_accounts.on_change(move |old, new| {
        if let Some(account) = new.or(old) {
            let of_account = |secret: &Secret| annotation(&secret.metadata, NAME) == account.metadata.name.as_deref();
            for secret in secrets.select(namespace(&account.metadata), of_account) {
                add.add(Key::of(&*secret));
            }
        }
    });
    let informers = context.informers.clone();
    let config = context.config.clone();
    tasks.spawn(worker::run("serviceaccount-token", queue, 2, move |key| sync_token(informers.clone(), config.clone(), key)));
}

async fn sync_token(informers: Arc<Informers>, config: Arc<Config>, key: Key) -> Outcome {
    let Some(secret) = informers.secrets.get(&key) else {
        return forget_reference(&informers, &key).await;
    };
    let Some(account_name) = annotation(&secret.metadata, NAME).filter(|name| !name.is_empty()) else { return Ok(None) };
    let account_key = Key::new(&key.namespace, account_name);
    let account = match informers.service_accounts.get(&account_key) {
        Some(account) => Some(account),
        None => informers.service_accounts.get_live(&account_key).await?.map(Arc::new),
    };
    let wanted_uid = annotation(&secret.metadata, UID).filter(|uid| !uid.is_empty());
    let Some(account) = account.filter(|account| wanted_uid.is_none_or(|wanted| wanted == uid(&account.metadata))) else {
        unless_gone(informers.secrets.delete(&secret, DeleteParams::default()).await)?;
        return Ok(None);
    };
    let Some(sign) = &config.sign_token else { return Ok(None) };
    if let Some(filled) = filled(&secret, &account, &config.root_ca, |account, secret| sign(account, secret))? {
        unless_gone(informers.secrets.update(&filled).await)?;
    }
    Ok(None)
}

/// A token's Secret is gone: its account must not point to it.
async fn forget_reference(informers: &Informers, key: &Key) -> Outcome {
    let refers = |account: &ServiceAccount| account.secrets.iter().flatten().any(|secret| secret.name.as_deref() == Some(&key.name));
    for account in informers.service_accounts.select(&key.namespace, refers) {
        let left: Vec<_> = account.secrets.iter().flatten().filter(|secret| secret.name.as_deref() != Some(&key.name)).collect();
        let patch = json!({"metadata": {"resourceVersion": account.metadata.resource_version}, "secrets": left});
        unless_gone(informers.service_accounts.merge(&Key::of(&*account), patch).await)?;
    }
    Ok(None)
}

/// The Secret with its token, CA and namespace; None when it has them.
fn filled(
    secret: &Secret,
    account: &ServiceAccount,
    root_ca: &[u8],
    sign: impl Fn(&ServiceAccount, &Secret) -> Result<String, String>,
) -> Result<Option<Secret>, SyncError> {
    let mut updated = secret.clone();
    let data = updated.data.get_or_insert_default();
    if !root_ca.is_empty() && data.get("ca.crt").is_none_or(|ca| ca.0 != root_ca) {
        data.insert("ca.crt".into(), ByteString(root_ca.to_vec()));
    }
    if data.get("namespace").is_none_or(|value| value.0.is_empty()) {
        data.insert("namespace".into(), ByteString(namespace(&secret.metadata).into()));
    }
    if data.get("token").is_none_or(|value| value.0.is_empty()) {
        let token = sign(account, secret).map_err(SyncError::Other)?;
        data.insert("token".into(), ByteString(token.into()));
    }
    if updated == *secret {
        return Ok(None);
    }
    let annotations = updated.metadata.annotations.get_or_insert_default();
    annotations.insert(NAME.into(), name(&account.metadata).to_owned());
    annotations.insert(UID.into(), uid(&account.metadata).to_owned());
    Ok(Some(updated))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_secret_is_filled_once() {
        let mut secret = Secret::default();
        secret.metadata.namespace = Some("default".into());
        let mut account = ServiceAccount::default();
        account.metadata.name = Some("robot".into());
        let sign = |_: &ServiceAccount, _: &Secret| Ok("jwt".to_owned());
        let first = filled(&secret, &account, b"ca", sign).unwrap().unwrap();
        let data = first.data.clone().unwrap();
        assert_eq!((data["token"].0.as_slice(), data["namespace"].0.as_slice()), (b"jwt".as_slice(), b"default".as_slice()));
        assert_eq!(annotation(&first.metadata, NAME), Some("robot"));
        assert!(filled(&first, &account, b"ca", |_, _| Err("no second token".into())).unwrap().is_none());
        assert!(filled(&secret, &account, b"ca", |_, _| Err("no key".into())).is_err());
    }
}
