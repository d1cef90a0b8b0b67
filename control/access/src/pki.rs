//! The cluster's own CA and the certificates made from it, kept in `DIR/pki`.
//!
//! Keys are ECDSA P-256. Everything is written by rename, keys with mode 0600. A leaf is made anew when it expires within 30 days, when
//! its key or CA doesn't fit, or when other names are wanted; a CA never is, since clients hold copies of it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::csr::{self, Csr};
use crate::files;
pub use crate::tls::client_cert_acceptor;

const DAY: Duration = Duration::from_secs(24 * 3600);
const CA_LIFETIME: Duration = Duration::from_secs(3650 * 24 * 3600);
const LEAF_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// A leaf with less than this left is renewed.
const RENEW_BEFORE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Certificates begin a little in the past, for peers whose clock is behind.
const CLOCK_SKEW: Duration = Duration::from_secs(300);

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("{operation} {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{what}: {reason}")]
    Invalid { what: String, reason: String },
}

pub(crate) fn invalid<E: std::fmt::Display>(what: impl Into<String>) -> impl FnOnce(E) -> PkiError {
    let what = what.into();
    move |reason| PkiError::Invalid { what, reason: reason.to_string() }
}

#[derive(Debug, Clone)]
pub struct PkiConfig {
    /// `DIR/pki`; made with mode 0700.
    pub dir: PathBuf,
    /// The first address of the service range, e.g. 10.96.0.1.
    pub service_ip: IpAddr,
    /// e.g. `cluster.local`.
    pub cluster_domain: String,
    /// Further names and addresses of the API server's certificate.
    pub sans: Vec<String>,
}

impl PkiConfig {
    /// Every name and address under which clients may call the API server.
    fn api_server_sans(&self) -> Vec<String> {
        let mut sans: Vec<String> = ["kubernetes", "kubernetes.default", "kubernetes.default.svc"].map(str::to_owned).into();
        sans.push(format!("kubernetes.default.svc.{}", self.cluster_domain));
        sans.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
        sans.push(self.service_ip.to_string());
        for san in &self.sans {
            if !sans.contains(san) {
                sans.push(san.clone());
            }
        }
        sans
    }
}

/// A certificate with its key.
#[derive(Clone)]
pub struct Identity {
    /// Leaf first.
    pub cert_pem: String,
    pub key_pem: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("cert_pem", &self.cert_pem).finish_non_exhaustive()
    }
}

impl Identity {
    /// For `rustls::ServerConfig::with_single_cert` and its client counterpart.
    pub fn rustls_parts(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), PkiError> {
        let chain = certificates(&self.cert_pem)?;
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).map_err(invalid("private key"))?;
        Ok((chain, key))
    }
}

/// All certificates of a PEM text.
pub(crate) fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().map_err(invalid("certificate"))
}

/// What a new certificate says.
#[derive(Debug, Clone, Default)]
pub struct CertRequest {
    pub common_name: String,
    pub organizations: Vec<String>,
    /// DNS names and IP addresses; makes it a serving certificate too.
    pub sans: Vec<String>,
    pub client: bool,
    /// Default one year.
    pub lifetime: Option<Duration>,
}

impl CertRequest {
    /// A client certificate.
    pub fn client<O: Into<String>>(common_name: impl Into<String>, organizations: impl IntoIterator<Item = O>) -> Self {
        Self {
            common_name: common_name.into(),
            organizations: organizations.into_iter().map(Into::into).collect(),
            client: true,
            ..Self::default()
        }
    }

    /// A serving certificate.
    pub fn serving(common_name: impl Into<String>, sans: Vec<String>) -> Self {
        Self { common_name: common_name.into(), sans, ..Self::default() }
    }

    fn subject(&self) -> Result<DistinguishedName, PkiError> {
        let mut subject = DistinguishedName::new();
        // rcgen keeps one value per type. The attribute's number is a second type for it, so two groups fit; nothing here needs more.
        let types = [DnType::OrganizationName, DnType::CustomDnType(ORGANIZATION_OID.to_vec())];
        if self.organizations.len() > types.len() {
            return Err(PkiError::Invalid { what: "certificate subject".to_owned(), reason: "more than two organizations".to_owned() });
        }
        for (kind, organization) in types.into_iter().zip(&self.organizations) {
            subject.push(kind, organization.as_str());
        }
        subject.push(DnType::CommonName, self.common_name.as_str());
        Ok(subject)
    }
}

const ORGANIZATION_OID: [u64; 4] = [2, 5, 4, 10];

/// A CA that can sign.
struct Authority {
    cert_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// Everything at hand, read or made at start.
pub struct Pki {
    ca: Authority,
    front_proxy_ca: Authority,
    api_server: Identity,
    kubelet_client: Identity,
    front_proxy_client: Identity,
    admin: Identity,
    service_account_key_pem: String,
}

impl Pki {
    /// Reads the folder and makes what is missing, expires soon, or doesn't fit the wanted names any more.
    pub fn open(config: PkiConfig) -> Result<Self, PkiError> {
        let dir = &config.dir;
        files::make_private_folder(dir)?;
        let ca = Authority::open(dir, "ca", "kubernetes")?;
        let front_proxy_ca = Authority::open(dir, "front-proxy-ca", "front-proxy-ca")?;
        let leaf = |ca: &Authority, name: &str, request: CertRequest| ca.leaf(dir, name, &request);
        Ok(Self {
            api_server: leaf(&ca, "apiserver", CertRequest::serving("kube-apiserver", config.api_server_sans()))?,
            kubelet_client: leaf(
                &ca,
                "apiserver-kubelet-client",
                CertRequest::client("kube-apiserver-kubelet-client", [crate::user::GROUP_MASTERS]),
            )?,
            front_proxy_client: leaf(&front_proxy_ca, "front-proxy-client", CertRequest::client("front-proxy-client", [""; 0]))?,
            admin: leaf(&ca, "admin", CertRequest::client("kubernetes-admin", [crate::user::GROUP_MASTERS]))?,
            service_account_key_pem: service_account_key(dir)?,
            ca,
            front_proxy_ca,
        })
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca.cert_pem
    }

    pub fn front_proxy_ca_pem(&self) -> &str {
        &self.front_proxy_ca.cert_pem
    }

    /// The API server's serving certificate.
    pub fn api_server(&self) -> &Identity {
        &self.api_server
    }

    /// The API server's client certificate towards kubelets.
    pub fn kubelet_client(&self) -> &Identity {
        &self.kubelet_client
    }

    /// The API server's client certificate towards aggregated API servers.
    pub fn front_proxy_client(&self) -> &Identity {
        &self.front_proxy_client
    }

    /// CN kubernetes-admin, O system:masters.
    pub fn admin(&self) -> &Identity {
        &self.admin
    }

    /// PKCS#8 PEM of the service account signing key.
    pub fn service_account_key_pem(&self) -> &str {
        &self.service_account_key_pem
    }

    /// A new key and certificate from the cluster CA.
    pub fn issue(&self, request: &CertRequest) -> Result<Identity, PkiError> {
        self.ca.issue(request)
    }

    /// Signs a PEM CSR as the `kubernetes.io/*` signers do; returns the certificate's PEM. `usages` as in a CertificateSigningRequest's spec.
    pub fn sign_csr(&self, csr_pem: &str, usages: &[String], lifetime: Duration) -> Result<String, PkiError> {
        let der = csr::der(csr_pem.as_bytes())?;
        let mut csr = CertificateSigningRequestParams::from_der(&der).map_err(invalid("certificate signing request"))?;
        // Read again because rcgen keeps only one organization.
        let Csr { common_name, organizations, .. } = Csr::from_der(&der)?;
        let params = &mut csr.params;
        params.distinguished_name = CertRequest { common_name, organizations, ..CertRequest::default() }.subject()?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages.clear();
        params.extended_key_usages.clear();
        params.custom_extensions.clear();
        for usage in usages {
            match named_usage(usage) {
                Some(Usage::Key(purpose)) => params.key_usages.push(purpose),
                Some(Usage::Extended(purpose)) => params.extended_key_usages.push(purpose),
                None => return Err(PkiError::Invalid { what: "key usage".to_owned(), reason: format!("{usage:?} is not known") }),
            }
        }
        set_validity(params, lifetime);
        Ok(csr.signed_by(&self.ca.issuer).map_err(invalid("certificate signing request"))?.pem())
    }
}

/// A key and certificate from the CA kept in `dir`, for the command line: leaves the server's own certificates alone. Also the CA's PEM.
pub fn issue_from(dir: &std::path::Path, request: &CertRequest) -> Result<(String, Identity), PkiError> {
    files::make_private_folder(dir)?;
    let ca = Authority::open(dir, "ca", "kubernetes")?;
    let identity = ca.issue(request)?;
    Ok((ca.cert_pem, identity))
}

enum Usage {
    Key(KeyUsagePurpose),
    Extended(ExtendedKeyUsagePurpose),
}

/// The usages of `certificates.k8s.io/v1 KeyUsage` that X.509 has a bit or an OID for.
fn named_usage(name: &str) -> Option<Usage> {
    use ExtendedKeyUsagePurpose as E;
    use KeyUsagePurpose as K;
    let key = match name {
        "signing" | "digital signature" => K::DigitalSignature,
        "content commitment" => K::ContentCommitment,
        "key encipherment" => K::KeyEncipherment,
        "data encipherment" => K::DataEncipherment,
        "key agreement" => K::KeyAgreement,
        "cert sign" => K::KeyCertSign,
        "crl sign" => K::CrlSign,
        "encipher only" => K::EncipherOnly,
        "decipher only" => K::DecipherOnly,
        _ => {
            let extended = match name {
                "any" => E::Any,
                "server auth" => E::ServerAuth,
                "client auth" => E::ClientAuth,
                "code signing" => E::CodeSigning,
                "email protection" | "s/mime" => E::EmailProtection,
                "timestamping" => E::TimeStamping,
                "ocsp signing" => E::OcspSigning,
                "ipsec end system" => E::Other(vec![1, 3, 6, 1, 5, 5, 7, 3, 5]),
                "ipsec tunnel" => E::Other(vec![1, 3, 6, 1, 5, 5, 7, 3, 6]),
                "ipsec user" => E::Other(vec![1, 3, 6, 1, 5, 5, 7, 3, 7]),
                "microsoft sgc" => E::Other(vec![1, 3, 6, 1, 4, 1, 311, 10, 3, 3]),
                "netscape sgc" => E::Other(vec![2, 16, 840, 1, 113730, 4, 1]),
                _ => return None,
            };
            return Some(Usage::Extended(extended));
        }
    };
    Some(Usage::Key(key))
}

fn set_validity(params: &mut CertificateParams, lifetime: Duration) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + now + lifetime;
}

impl Authority {
    fn open(dir: &Path, name: &str, common_name: &str) -> Result<Self, PkiError> {
        let (cert_path, key_path) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
        let (cert_pem, key_pem) = match (files::read(&cert_path)?, files::read(&key_path)?) {
            (Some(cert_pem), Some(key_pem)) => (cert_pem, key_pem),
            (None, _) => {
                let (cert_pem, key_pem) = Self::generate(common_name)?;
                files::write(&key_path, &key_pem, 0o600)?;
                files::write(&cert_path, &cert_pem, 0o644)?;
                (cert_pem, key_pem)
            }
            // Making another CA would lock out every client of this one.
            (Some(_), None) => {
                return Err(PkiError::Invalid { what: cert_path.display().to_string(), reason: "its key is missing".to_owned() });
            }
        };
        let key = KeyPair::from_pem(&key_pem).map_err(invalid(key_path.display().to_string()))?;
        let facts = Facts::read(&cert_pem)?;
        if facts.public_key != key.public_key_raw() {
            return Err(PkiError::Invalid { what: cert_path.display().to_string(), reason: "its key belongs to another".to_owned() });
        }
        if facts.remaining() < RENEW_BEFORE * 6 {
            tracing::warn!(certificate = %cert_path.display(), days = facts.remaining().as_secs() / DAY.as_secs(), "the CA expires soon");
        }
        let issuer = Issuer::from_ca_cert_pem(&cert_pem, key).map_err(invalid(cert_path.display().to_string()))?;
        Ok(Self { cert_pem, issuer })
    }

    fn generate(common_name: &str) -> Result<(String, String), PkiError> {
        let key = KeyPair::generate().map_err(invalid("CA key"))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, CA_LIFETIME);
        let cert = params.self_signed(&key).map_err(invalid("CA certificate"))?;
        Ok((cert.pem(), key.serialize_pem()))
    }

    fn issue(&self, request: &CertRequest) -> Result<Identity, PkiError> {
        let key = KeyPair::generate().map_err(invalid("key"))?;
        let mut params = CertificateParams::new(request.sans.clone()).map_err(invalid("subject alternative names"))?;
        params.distinguished_name = request.subject()?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if !request.sans.is_empty() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if request.client {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        set_validity(&mut params, request.lifetime.unwrap_or(LEAF_LIFETIME));
        let cert = params.signed_by(&key, &self.issuer).map_err(invalid("certificate"))?;
        Ok(Identity { cert_pem: cert.pem(), key_pem: key.serialize_pem() })
    }

    /// The stored leaf if it still does, else a new one.
    fn leaf(&self, dir: &Path, name: &str, request: &CertRequest) -> Result<Identity, PkiError> {
        let (cert_path, key_path) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
        if let (Some(cert_pem), Some(key_pem)) = (files::read(&cert_path)?, files::read(&key_path)?) {
            let stored = Identity { cert_pem, key_pem };
            match self.unfit(&stored, request) {
                None => return Ok(stored),
                Some(reason) => tracing::info!(certificate = %cert_path.display(), reason, "making the certificate anew"),
            }
        }
        let fresh = self.issue(request)?;
        files::write(&key_path, &fresh.key_pem, 0o600)?;
        files::write(&cert_path, &fresh.cert_pem, 0o644)?;
        Ok(fresh)
    }

    /// Why a stored leaf can't be used any more.
    fn unfit(&self, stored: &Identity, request: &CertRequest) -> Option<&'static str> {
        let Ok(facts) = Facts::read(&stored.cert_pem) else { return Some("it can't be read") };
        let Ok(key) = KeyPair::from_pem(&stored.key_pem) else { return Some("its key can't be read") };
        let Ok(ca) = certificates(&self.cert_pem) else { return Some("the CA can't be read") };
        let signed_by_ca = ca.first().is_some_and(|ca| facts.is_signed_by(ca));
        let mut wanted: Vec<String> = request.sans.clone();
        wanted.sort();
        match () {
            () if facts.public_key != key.public_key_raw() => Some("its key belongs to another"),
            () if !signed_by_ca => Some("another CA signed it"),
            () if facts.remaining() < RENEW_BEFORE => Some("it expires soon"),
            () if facts.sans != wanted => Some("other names are wanted"),
            () if facts.common_name != request.common_name || facts.organizations != request.organizations => {
                Some("another subject is wanted")
            }
            () => None,
        }
    }
}

/// What a certificate says, for comparison.
struct Facts {
    der: CertificateDer<'static>,
    public_key: Vec<u8>,
    common_name: String,
    organizations: Vec<String>,
    /// Sorted.
    sans: Vec<String>,
    /// Seconds since 1970.
    not_after: i64,
}

impl Facts {
    fn read(pem: &str) -> Result<Self, PkiError> {
        let der = certificates(pem)?
            .into_iter()
            .next()
            .ok_or_else(|| PkiError::Invalid { what: "certificate".to_owned(), reason: "there is none in the file".to_owned() })?;
        let (_, cert) = X509Certificate::from_der(&der).map_err(invalid("certificate"))?;
        let text = |name: &x509_parser::x509::AttributeTypeAndValue<'_>| name.as_str().unwrap_or_default().to_owned();
        let mut sans: Vec<String> = match cert.subject_alternative_name() {
            Ok(Some(extension)) => extension.value.general_names.iter().filter_map(san_text).collect(),
            _ => Vec::new(),
        };
        sans.sort();
        let facts = (
            cert.public_key().subject_public_key.data.to_vec(),
            cert.subject().iter_common_name().next().map(text).unwrap_or_default(),
            cert.subject().iter_organization().map(text).collect(),
            cert.validity().not_after.timestamp(),
        );
        let (public_key, common_name, organizations, not_after) = facts;
        Ok(Self { public_key, common_name, organizations, sans, not_after, der })
    }

    fn remaining(&self) -> Duration {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Duration::from_secs(u64::try_from(self.not_after).unwrap_or(0)).saturating_sub(now)
    }

    fn is_signed_by(&self, ca: &CertificateDer<'_>) -> bool {
        let (Ok((_, own)), Ok((_, ca))) = (X509Certificate::from_der(&self.der), X509Certificate::from_der(ca)) else { return false };
        own.issuer() == ca.subject() && own.verify_signature(Some(ca.public_key())).is_ok()
    }
}

fn san_text(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
            _ => None,
        },
        _ => None,
    }
}

fn service_account_key(dir: &Path) -> Result<String, PkiError> {
    let (key_path, public_path) = (dir.join("sa.key"), dir.join("sa.pub"));
    let key_pem = match files::read(&key_path)? {
        Some(key_pem) => key_pem,
        None => {
            let key = KeyPair::generate().map_err(invalid("service account key"))?;
            files::write(&key_path, &key.serialize_pem(), 0o600)?;
            key.serialize_pem()
        }
    };
    let public_pem = KeyPair::from_pem(&key_pem).map_err(invalid(key_path.display().to_string()))?.public_key_pem();
    if files::read(&public_path)?.as_deref() != Some(&public_pem) {
        files::write(&public_path, &public_pem, 0o644)?;
    }
    Ok(key_pem)
}
