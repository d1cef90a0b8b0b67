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
use outrigger_access::csr::Csr;
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

/// Approves if the requester may: for itself as a node, or as one that brings nodes in.
async fn approve(informers: &Informers, request: &CertificateSigningRequest) -> Outcome {
    let user = request.spec.username.clone().unwrap_or_default();
    let Ok(asked) = Csr::from_pem(&request.spec.request.0) else { return Ok(None) };
    // Nobody can be asked whether they may if they aren't named.
    if user.is_empty() || asked.check_kubelet_client(request.spec.usages.as_deref().unwrap_or_default()).is_err() {
        return Ok(None);
    }
    let recognizers = [
        ("selfnodeclient", user == asked.common_name, "Auto approving self kubelet client certificate after SubjectAccessReview."),
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
    match fits(request).and_then(|()| signer(request)) {
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

/// What each signer demands of a request; the error says what doesn't fit.
fn fits(request: &CertificateSigningRequest) -> Result<(), String> {
    let usages = request.spec.usages.clone().unwrap_or_default();
    let asked = || Csr::from_pem(&request.spec.request.0).map_err(|error| error.to_string());
    match request.spec.signer_name.as_str() {
        CLIENT_KUBELET => asked()?.check_kubelet_client(&usages),
        SERVING => asked()?.check_kubelet_serving(&usages),
        CLIENT => check_client_usages(&usages),
        _ => Ok(()),
    }
}

fn check_client_usages(usages: &[String]) -> Result<(), String> {
    let allowed = ["digital signature", "key encipherment", "client auth"];
    if let Some(other) = usages.iter().find(|usage| !allowed.contains(&usage.as_str())) {
        return Err(format!("invalid usage for client certificate: {other}"));
    }
    if usages.iter().any(|usage| usage == "client auth") {
        return Ok(());
    }
    Err("missing required usage for client certificate: client auth".to_owned())
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

    /// O system:nodes, CN system:node:a.
    const NODE: &str = include_str!("../../access/testdata/node.csr");
    /// The same with a DNS name and an address.
    const NODE_SERVING: &str = "-----BEGIN CERTIFICATE REQUEST-----
MIIBDzCBtgIBADAvMRUwEwYDVQQKDAxzeXN0ZW06bm9kZXMxFjAUBgNVBAMMDXN5
c3RlbTpub2RlOmEwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAATcAZ9aefDruL65
OA3eAkucmwbEOoEqEDIw4FqVg5ooyf5AdS1GJLxPctTjvjmiLQWrn269g5OpLxCr
s09NAjuvoCUwIwYJKoZIhvcNAQkOMRYwFDASBgNVHREECzAJggFhhwQKAAABMAoG
CCqGSM49BAMCA0gAMEUCIGqVtVYsjOHJVEsbpc1zJ7IpXaN7czuevFl4Hs4BHUNC
AiEAlhMz7o2QzHfLADBsaXjSznfqW3iqO/lmWVc05OMxZKg=
-----END CERTIFICATE REQUEST-----
";

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
    fn signers_have_one_purpose_and_subject() {
        let (client, serving) = (vec!["digital signature", "client auth"], vec!["key encipherment", "digital signature", "server auth"]);
        let cases = [
            (CLIENT_KUBELET, NODE, client.clone(), true),
            (CLIENT_KUBELET, NODE, vec!["server auth"], false),
            (CLIENT_KUBELET, NODE_SERVING, client.clone(), false),
            (CLIENT_KUBELET, "", client.clone(), false),
            (SERVING, NODE_SERVING, serving.clone(), true),
            (SERVING, NODE, serving.clone(), false),
            (CLIENT, NODE, client, true),
            (CLIENT, NODE, vec!["client auth", "server auth"], false),
            (CLIENT, NODE, vec!["digital signature"], false),
            (LEGACY, NODE, serving, true),
        ];
        for (signer, pem, usages, fit) in cases {
            let mut request = request(signer, &usages);
            request.spec.request = ByteString(pem.as_bytes().to_vec());
            assert_eq!(fits(&request).is_ok(), fit, "{signer} {usages:?} {pem}");
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
