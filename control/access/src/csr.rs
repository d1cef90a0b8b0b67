//! What certificate signing requests ask for, and what the signers of nodes' certificates demand of them.

use std::collections::BTreeSet;

use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509CertificationRequest};

use crate::pki::{PkiError, invalid};
use crate::user::{GROUP_NODES, NODE_USER_PREFIX};

/// The subject that a request asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Csr {
    pub common_name: String,
    pub organizations: Vec<String>,
    /// Which kinds of alternative names there are: `DNS`, `Email`, `IP`, `URI`.
    kinds: BTreeSet<&'static str>,
}

impl Csr {
    pub fn from_pem(pem: &[u8]) -> Result<Self, PkiError> {
        Self::from_der(&der(pem)?)
    }

    pub(crate) fn from_der(der: &CertificateSigningRequestDer<'_>) -> Result<Self, PkiError> {
        let (_, csr) = X509CertificationRequest::from_der(der).map_err(invalid("certificate signing request"))?;
        let subject = &csr.certification_request_info.subject;
        let text = |name: &x509_parser::x509::AttributeTypeAndValue<'_>| name.as_str().unwrap_or_default().to_owned();
        let mut kinds = BTreeSet::new();
        for extension in csr.requested_extensions().into_iter().flatten() {
            if let ParsedExtension::SubjectAlternativeName(names) = extension {
                kinds.extend(names.general_names.iter().filter_map(kind_of));
            }
        }
        Ok(Self {
            common_name: subject.iter_common_name().next().map(text).unwrap_or_default(),
            organizations: subject.iter_organization().map(text).collect(),
            kinds,
        })
    }

    /// Whether this is a node's client certificate (`kubernetes.io/kube-apiserver-client-kubelet`); the error says why it isn't.
    pub fn check_kubelet_client(&self, usages: &[String]) -> Result<(), String> {
        self.check_organization()?;
        self.refuse_names(&["DNS", "Email", "IP", "URI"])?;
        self.check_common_name()?;
        check_usages(usages, "client auth")
    }

    /// The same of the certificate that a node serves with (`kubernetes.io/kubelet-serving`).
    pub fn check_kubelet_serving(&self, usages: &[String]) -> Result<(), String> {
        self.check_organization()?;
        if !self.kinds.contains("DNS") && !self.kinds.contains("IP") {
            return Err("DNS or IP subjectAltName is required".to_owned());
        }
        self.refuse_names(&["Email", "URI"])?;
        check_usages(usages, "server auth")?;
        self.check_common_name()
    }

    fn check_organization(&self) -> Result<(), String> {
        if self.organizations == [GROUP_NODES] { Ok(()) } else { Err(format!("subject organization is not {GROUP_NODES}")) }
    }

    fn check_common_name(&self) -> Result<(), String> {
        if self.common_name.starts_with(NODE_USER_PREFIX) {
            return Ok(());
        }
        Err(format!("subject common name does not begin with {NODE_USER_PREFIX}"))
    }

    fn refuse_names(&self, kinds: &[&str]) -> Result<(), String> {
        match kinds.iter().find(|kind| self.kinds.contains(**kind)) {
            Some(kind) => Err(format!("{kind} subjectAltNames are not allowed")),
            None => Ok(()),
        }
    }
}

pub(crate) fn der(pem: &[u8]) -> Result<CertificateSigningRequestDer<'static>, PkiError> {
    CertificateSigningRequestDer::from_pem_slice(pem).map_err(invalid("certificate signing request"))
}

fn kind_of(name: &GeneralName<'_>) -> Option<&'static str> {
    match name {
        GeneralName::DNSName(_) => Some("DNS"),
        GeneralName::RFC822Name(_) => Some("Email"),
        GeneralName::IPAddress(_) => Some("IP"),
        GeneralName::URI(_) => Some("URI"),
        _ => None,
    }
}

/// Exactly signing and the purpose, with or without the encipherment that RSA keys need.
fn check_usages(usages: &[String], purpose: &str) -> Result<(), String> {
    let mut all = ["digital signature", "key encipherment", purpose];
    all.sort_unstable();
    let given: BTreeSet<&str> = usages.iter().map(String::as_str).collect();
    let fits = given.contains("digital signature") && given.contains(purpose) && given.iter().all(|usage| all.contains(usage));
    if fits { Ok(()) } else { Err(format!("usages did not match [{}]", all.join(" "))) }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

    use super::*;

    fn csr(organization: &str, common_name: &str, names: &[&str], email: Option<&str>) -> Csr {
        let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        params.subject_alt_names.extend(email.map(|email| SanType::Rfc822Name(email.try_into().unwrap())));
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, organization);
        params.distinguished_name.push(DnType::CommonName, common_name);
        let pem = params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        Csr::from_pem(pem.as_bytes()).unwrap()
    }

    fn usages(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn client_certificates_are_for_nodes_only() {
        let node = csr("system:nodes", "system:node:a", &[], None);
        let good = usages(&["digital signature", "client auth"]);
        assert_eq!(node.check_kubelet_client(&good), Ok(()));
        assert_eq!(node.check_kubelet_client(&usages(&["digital signature", "key encipherment", "client auth"])), Ok(()));
        assert_eq!(
            node.check_kubelet_client(&usages(&["client auth"])),
            Err("usages did not match [client auth digital signature key encipherment]".to_owned())
        );
        let cases = [
            (csr("system:masters", "system:node:a", &[], None), "subject organization is not system:nodes"),
            (csr("system:nodes", "admin", &[], None), "subject common name does not begin with system:node:"),
            (csr("system:nodes", "system:node:a", &["a.example"], None), "DNS subjectAltNames are not allowed"),
            (csr("system:nodes", "system:node:a", &["10.0.0.1"], None), "IP subjectAltNames are not allowed"),
            (csr("system:nodes", "system:node:a", &[], Some("a@example.com")), "Email subjectAltNames are not allowed"),
        ];
        for (asked, why) in cases {
            assert_eq!(asked.check_kubelet_client(&good), Err(why.to_owned()));
        }
    }

    #[test]
    fn serving_certificates_name_where_the_node_is() {
        let good = usages(&["digital signature", "server auth"]);
        assert_eq!(csr("system:nodes", "system:node:a", &["a", "10.0.0.1"], None).check_kubelet_serving(&good), Ok(()));
        let cases = [
            (csr("system:nodes", "system:node:a", &[], None), "DNS or IP subjectAltName is required"),
            (csr("system:nodes", "system:node:a", &["a"], Some("a@example.com")), "Email subjectAltNames are not allowed"),
            (csr("system:masters", "system:node:a", &["a"], None), "subject organization is not system:nodes"),
            (csr("system:nodes", "a", &["a"], None), "subject common name does not begin with system:node:"),
        ];
        for (asked, why) in cases {
            assert_eq!(asked.check_kubelet_serving(&good), Err(why.to_owned()));
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        assert!(Csr::from_pem(b"nothing").is_err());
        assert!(Csr::from_pem(b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n").is_err());
    }
}
