//! CertificateSigningRequests: approves nodes' own, signs what is approved, forgets old ones.
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestStatus};
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use kube::core::Request;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::error::{SyncError, unless_gone};
use crate::informers::Informers;
use crate::objects::{Key, name, seconds};
use crate::worker::{self, Outcome, Queue};
use crate::{Config, Context};

const CLIENT_KUBELET: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const SERVING: &str = "kubernetes.io/kubelet-serving";
const CLIENT: &str = "kubernetes.io/kube-apiserver-client";
const LEGACY: &str = "kubernetes.io/legacy-unknown";
const CLEANING: Duration = Duration::from_secs(3600);

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.csrs.on_change(move |_, new| {
        if let Some(request) = new {
            add.add(Key::of(&**request));
        }
    });
    let (informers, config) = (context.informers.clone(), context.config.clone());
    tasks.spawn(worker::run("csr", queue, 2, move |key| sync(informers.clone(), config.clone(), key)));
    tasks.spawn(clean(context.informers.clone()));
}

fn conditions(request: &CertificateSigningRequest) -> &[CertificateSigningRequestCondition] {
    request.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default()
}

fn has(request: &CertificateSigningRequest, kind: &str) -> bool {
    conditions(request).iter().any(|condition| condition.type_ == kind)
}

fn is_issued(request: &CertificateSigningRequest) -> bool {
    request.status.as_ref().and_then(|status| status.certificate.as_ref()).is_some_and(|certificate| !certificate.0.is_empty())
}

async fn sync(informers: Arc<Informers>, config: Arc<Config>, key: Key) -> Outcome {
    let Some(request) = informers.csrs.get(&key) else { return Ok(None) };
    if is_issued(&request) || has(&request, "Denied") || has(&request, "Failed") {
        return Ok(None);
    }
    if has(&request, "Approved") {
        return sign(&informers, &config, &request).await;
    }
    if request.spec.signer_name == CLIENT_KUBELET {
        return approve(&informers, &request).await;
    }
    Ok(None)
}

/// What a node's request for a client certificate must look like, whoever sends it.
fn is_kubelet_client(request: &CertificateSigningRequest) -> bool {
    let usages = request.spec.usages.clone().unwrap_or_default();
    let allowed = ["key encipherment", "digital signature", "client auth"];
    usages.iter().all(|usage| allowed.contains(&usage.as_str())) && usages.iter().any(|usage| usage == "client auth")
}

/// Approves if the requester may: for itself as a node, or as one that brings nodes in.
async fn approve(informers: &Informers, request: &CertificateSigningRequest) -> Outcome {
    let user = request.spec.username.clone().unwrap_or_default();
    // Nobody can be asked whether they may if they aren't named.
    if !is_kubelet_client(request) || user.is_empty() {
        return Ok(None);
    }
    let recognizers = [
        ("selfnodeclient", user.starts_with("system:node:"), "Auto approving self kubelet client certificate after SubjectAccessReview."),
        ("nodeclient", true, "Auto approving kubelet client certificate after SubjectAccessReview."),
    ];
    for (subresource, applies, message) in recognizers {
        if applies && may_create(informers, request, subresource).await? {
            let mut approved = request.clone();
            let now = seconds(Timestamp::now());
            let condition = CertificateSigningRequestCondition {
                type_: "Approved".into(),
                status: "True".into(),
                reason: Some("AutoApproved".into()),
                message: Some(message.into()),
                last_update_time: Some(now.clone()),
                last_transition_time: Some(now),
            };
            approved.status.get_or_insert_default().conditions.get_or_insert_default().push(condition);
            let bytes = serde_json::to_vec(&approved).map_err(kube::Error::SerdeError)?;
            let path = Request::new("/apis/certificates.k8s.io/v1/certificatesigningrequests");
            let put = path
                .replace_subresource("approval", name(&request.metadata), &PostParams::default(), bytes)
                .map_err(kube::Error::BuildRequest)?;
            informers.client.request::<serde_json::Value>(put).await?;
            return Ok(None);
        }
    }
    Ok(None)
}

async fn may_create(informers: &Informers, request: &CertificateSigningRequest, subresource: &str) -> Result<bool, SyncError> {
    let spec = &request.spec;
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: spec.username.clone(),
            uid: spec.uid.clone(),
            groups: spec.groups.clone(),
            extra: spec.extra.clone(),
            resource_attributes: Some(ResourceAttributes {
                group: Some("certificates.k8s.io".into()),
                resource: Some("certificatesigningrequests".into()),
                subresource: Some(subresource.into()),
                verb: Some("create".into()),
                version: Some("*".into()),
                ..Default::default()
            }),
            ..Default::default()
        },
        ..Default::default()
    };
    let api = Api::<SubjectAccessReview>::all(informers.client.clone());
    let answer = api.create(&PostParams::default(), &review).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

async fn sign(informers: &Informers, config: &Config, request: &CertificateSigningRequest) -> Outcome {
    let ours = [CLIENT_KUBELET, SERVING, CLIENT, LEGACY].contains(&request.spec.signer_name.as_str());
    let Some(signer) = config.sign_certificate.as_ref().filter(|_| ours) else { return Ok(None) };
    let mut updated = request.clone();
    let status: &mut CertificateSigningRequestStatus = updated.status.get_or_insert_default();
    match usages_fit(request).and_then(|()| signer(request)) {
        Ok(certificate) => status.certificate = Some(ByteString(certificate)),
        Err(problem) => {
            warn!(request = name(&request.metadata), %problem, "can't sign the request");
            let now = seconds(Timestamp::now());
            status.conditions.get_or_insert_default().push(CertificateSigningRequestCondition {
                type_: "Failed".into(),
                status: "True".into(),
                reason: Some("SignerValidationFailure".into()),
                message: Some(problem),
                last_update_time: Some(now.clone()),
                last_transition_time: Some(now),
            });
        }
    }
    informers.csrs.update_status(&updated).await?;
    info!(request = name(&request.metadata), signer = request.spec.signer_name, "request answered");
    Ok(None)
}

/// Each signer issues certificates for one purpose only.
fn usages_fit(request: &CertificateSigningRequest) -> Result<(), String> {
    let usages = request.spec.usages.clone().unwrap_or_default();
    let needed = match request.spec.signer_name.as_str() {
        CLIENT_KUBELET | CLIENT => Some("client auth"),
        SERVING => Some("server auth"),
        _ => None,
    };
    let Some(needed) = needed else { return Ok(()) };
    let allowed = ["key encipherment", "digital signature", needed];
    if usages.iter().any(|usage| usage == needed) && usages.iter().all(|usage| allowed.contains(&usage.as_str())) {
        return Ok(());
    }
    Err(format!("invalid usage for {} certificate: {:?} not allowed", if needed == "client auth" { "client" } else { "server" }, usages))
}

async fn clean(informers: Arc<Informers>) {
    loop {
        for request in informers.csrs.list() {
            if is_old(&request, Timestamp::now())
                && let Err(error) = unless_gone(informers.csrs.delete(&request, DeleteParams::default()).await)
            {
                warn!(request = name(&request.metadata), error = %error.message(), "can't delete an old request");
            }
        }
        tokio::time::sleep(CLEANING).await;
    }
}

/// Undecided for a day, or decided for an hour.
fn is_old(request: &CertificateSigningRequest, now: Timestamp) -> bool {
    const HOUR: i64 = 3600;
    let age = |time: Option<Timestamp>| time.map_or(0, |time| now.as_second() - time.as_second());
    let decided = |kind: &str| {
        let condition = conditions(request).iter().find(|condition| condition.type_ == kind)?;
        condition.last_update_time.as_ref().map(|time| time.0)
    };
    let created = request.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let any = ["Approved", "Denied", "Failed"].iter().filter_map(|kind| decided(kind)).max();
    match any {
        None => age(created) > 24 * HOUR,
        Some(time) => age(Some(time)) > HOUR,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::certificates::v1::CertificateSigningRequestSpec;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn request(signer: &str, usages: &[&str]) -> CertificateSigningRequest {
        CertificateSigningRequest {
            spec: CertificateSigningRequestSpec {
                signer_name: signer.into(),
                usages: Some(usages.iter().map(|usage| (*usage).to_owned()).collect()),
                ..Default::default()
            },
            ..Default::default()
        }
    }

    #[test]
    fn signers_have_one_purpose() {
        let cases = [
            (CLIENT_KUBELET, vec!["digital signature", "client auth"], true),
            (CLIENT_KUBELET, vec!["server auth"], false),
            (SERVING, vec!["key encipherment", "digital signature", "server auth"], true),
            (CLIENT, vec!["client auth", "server auth"], false),
            (LEGACY, vec!["server auth"], true),
        ];
        for (signer, usages, fits) in cases {
            assert_eq!(usages_fit(&request(signer, &usages)).is_ok(), fits, "{signer} {usages:?}");
        }
    }

    #[test]
    fn old_requests_are_told_from_new_ones() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let mut waiting = request(CLIENT, &[]);
        waiting.metadata.creation_timestamp = Some(Time(at(0)));
        assert!(!is_old(&waiting, at(3600 * 23)) && is_old(&waiting, at(3600 * 25)));
        waiting.status.get_or_insert_default().conditions = Some(vec![CertificateSigningRequestCondition {
            type_: "Approved".into(),
            last_update_time: Some(Time(at(100))),
            ..Default::default()
        }]);
        assert!(!is_old(&waiting, at(3000)) && is_old(&waiting, at(3800)));
    }
}
