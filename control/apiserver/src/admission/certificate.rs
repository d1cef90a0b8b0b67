//! CertificateApproval, CertificateSigning and CertificateSubjectRestriction.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use outrigger_access::Attributes as Access;
use outrigger_access::csr::Csr;
use outrigger_access::user::GROUP_MASTERS;
use outrigger_api::{Status, meta};
use serde_json::Value;

use super::{Attributes, Operation, Plugin};
use crate::engine::Engine;

pub struct CertificateApproval;

impl Plugin for CertificateApproval {
    fn validate(&self, engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        if !attributes.resource.is("certificates.k8s.io", "CertificateSigningRequest") {
            return Ok(());
        }
        let Some(request) = object else { return Ok(()) };
        let changed = |path: &str| attributes.old.is_some_and(|old| meta::get(old, path) != meta::get(request, path));
        match (attributes.operation, attributes.subresource) {
            (Operation::Update, "approval") => may(engine, attributes, request, "approve"),
            (Operation::Update, "status") if changed("status.certificate") => may(engine, attributes, request, "sign"),
            _ => Ok(()),
        }
    }
}

/// The verb on the signer, by its full name or by its domain's wildcard.
fn may(engine: &Engine, attributes: &Attributes<'_>, request: &Value, verb: &str) -> Result<(), Status> {
    let signer = meta::text(request, "spec.signerName");
    let domain = format!("{}/*", signer.split('/').next().unwrap_or_default());
    for name in [signer, &domain] {
        let wanted = Access { name, ..Access::resource(&attributes.call.user, verb, "certificates.k8s.io", "signers") };
        if engine.permit(&wanted).is_ok() {
            return Ok(());
        }
    }
    Err(attributes.forbidden(format!("user not permitted to {verb} requests with signerName {signer:?}")))
}

pub struct CertificateSubjectRestriction;

const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client";

impl Plugin for CertificateSubjectRestriction {
    fn validate(&self, _engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        let Some(request) = object.filter(|_| attributes.creates("certificates.k8s.io", "CertificateSigningRequest")) else {
            return Ok(());
        };
        check_subject(request).map_err(|why| attributes.forbidden(why))
    }
}

/// Nobody becomes the cluster's master by a request.
fn check_subject(request: &Value) -> Result<(), String> {
    if meta::text(request, "spec.signerName") != CLIENT_SIGNER {
        return Ok(());
    }
    let asked = asked(request).map_err(|error| format!("failed to parse CSR: {error}"))?;
    if asked.organizations.iter().any(|group| group == GROUP_MASTERS) {
        return Err(format!("use of {CLIENT_SIGNER} signer with {GROUP_MASTERS} group is not allowed"));
    }
    Ok(())
}

/// What a CertificateSigningRequest asks for.
pub fn asked(request: &Value) -> Result<Csr, String> {
    let text = meta::text(request, "spec.request").replace(['\r', '\n'], "");
    let pem = STANDARD.decode(text).map_err(|error| error.to_string())?;
    Csr::from_pem(&pem).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// O system:masters, CN a.
    const MASTER: &str = "-----BEGIN CERTIFICATE REQUEST-----
MIHgMIGHAgEAMCUxFzAVBgNVBAoMDnN5c3RlbTptYXN0ZXJzMQowCAYDVQQDDAFh
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAElxyHPEuQXHIzVcD/NrvjlZRMdIvO
P30V082kO5Nr1iXx0BTMVY9itmpaZGckhM79D0TsDjfHAkp0G3gPYcqpEqAAMAoG
CCqGSM49BAMCA0gAMEUCIQCQ6OlYAYIVh5gQZfK26JlKaJdWGRjBhbrlMFDjOQWP
CwIgLCLqk8tCO6NbSnKvAFP3vSf5w72Zc/mOaSiH8g360KM=
-----END CERTIFICATE REQUEST-----
";
    /// O system:nodes, CN system:node:a.
    const NODE: &str = include_str!("../../../access/testdata/node.csr");

    #[test]
    fn nobody_asks_for_masters() {
        let check = |signer: &str, pem: &str| check_subject(&json!({"spec": {"signerName": signer, "request": STANDARD.encode(pem)}}));
        let why = "use of kubernetes.io/kube-apiserver-client signer with system:masters group is not allowed";
        assert_eq!(check(CLIENT_SIGNER, MASTER), Err(why.to_owned()));
        assert_eq!(check(CLIENT_SIGNER, NODE), Ok(()));
        assert_eq!(check("example.com/any", MASTER), Ok(()));
        assert!(check(CLIENT_SIGNER, "nothing").is_err());
    }
}
