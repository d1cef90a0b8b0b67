//! CertificateApproval, CertificateSigning and CertificateSubjectRestriction.

use outrigger_access::Attributes as Access;
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
