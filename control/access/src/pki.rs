//! The cluster's own CA and the certificates made from it, kept in `DIR/pki`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("{operation} {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{what}: {reason}")]
    Invalid { what: String, reason: String },
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

/// A certificate with its key.
#[derive(Clone)]
pub struct Identity {
    /// Leaf first.
    pub cert_pem: String,
    pub key_pem: String,
}

impl Identity {
    /// For `rustls::ServerConfig::with_single_cert` and its client counterpart.
    pub fn rustls_parts(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), PkiError> {
        todo!()
    }
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

/// Everything at hand, read or made at start.
pub struct Pki {
    _p: (),
}

impl Pki {
    /// Reads the folder and makes what is missing, expires soon, or doesn't fit the wanted names any more.
    pub fn open(config: PkiConfig) -> Result<Self, PkiError> {
        let _ = config;
        todo!()
    }
    pub fn ca_pem(&self) -> &str {
        todo!()
    }
    pub fn front_proxy_ca_pem(&self) -> &str {
        todo!()
    }
    /// The API server's serving certificate.
    pub fn api_server(&self) -> &Identity {
        todo!()
    }
    /// The API server's client certificate towards kubelets.
    pub fn kubelet_client(&self) -> &Identity {
        todo!()
    }
    /// The API server's client certificate towards aggregated API servers.
    pub fn front_proxy_client(&self) -> &Identity {
        todo!()
    }
    /// CN kubernetes-admin, O system:masters.
    pub fn admin(&self) -> &Identity {
        todo!()
    }
    /// PKCS#8 PEM of the service account signing key.
    pub fn service_account_key_pem(&self) -> &str {
        todo!()
    }
    /// A new key and certificate from the cluster CA.
    pub fn issue(&self, request: &CertRequest) -> Result<Identity, PkiError> {
        let _ = request;
        todo!()
    }
    /// Signs a PEM CSR as the `kubernetes.io/*` signers do; returns the certificate's PEM.
    pub fn sign_csr(&self, csr_pem: &str, usages: &[String], lifetime: Duration) -> Result<String, PkiError> {
        let _ = (csr_pem, usages, lifetime);
        todo!()
    }
}

/// For `rustls::ServerConfig`: asks for a client certificate, requires none, and proves possession of its key. Whether its CA is trusted
/// is decided later by the authenticator, so that an unknown certificate is answered by 401 and not by a broken handshake.
pub fn client_cert_acceptor(pki: &Pki) -> Arc<dyn rustls::server::danger::ClientCertVerifier> {
    let _ = pki;
    todo!()
}
