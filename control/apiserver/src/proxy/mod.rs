//! Requests sent on: to kubelets for logs, exec, attach and port-forward, and to pods, services and nodes by their proxy subresource.

pub mod forward;
mod mount;
pub mod pod;
mod websocket;

use std::sync::Arc;

use outrigger_access::pki::Identity;
use rustls::ClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::error::StartError;

/// Why a client's TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("trusted certificates: {0}")]
    Pem(#[from] rustls::pki_types::pem::Error),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error(transparent)]
    Identity(#[from] outrigger_access::pki::PkiError),
}

/// How kubelets are reached: with the server's client certificate, trusting whatever certificate they serve with, as upstream does
/// unless it is given their CA.
pub struct Kubelets {
    pub tls: Arc<ClientConfig>,
    /// For HTTPS backends of services and pods: no certificate of ours.
    pub anonymous_tls: Arc<ClientConfig>,
}

impl Kubelets {
    pub fn new(identity: &Identity) -> Result<Self, StartError> {
        let (tls, anonymous_tls) = (client_tls(Trust::Anybody, Some(identity))?, client_tls(Trust::Anybody, None)?);
        Ok(Self { tls: Arc::new(tls), anonymous_tls: Arc::new(anonymous_tls) })
    }
}

/// Which servers a client takes for whom they say they are.
pub enum Trust {
    Anybody,
    Only(RootCertStore),
}

impl Trust {
    /// The bundle's certificates (PEM), each of which must be one; without any the system's.
    pub fn bundle(pem: &[u8]) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        if pem.trim_ascii().is_empty() {
            roots.add_parsable_certificates(system_roots());
        }
        for certificate in CertificateDer::pem_slice_iter(pem) {
            roots.add(certificate?)?;
        }
        Ok(Self::Only(roots))
    }
}

/// The bundles of the distributions, as Go looks for them.
pub fn system_roots() -> Vec<CertificateDer<'static>> {
    const FILES: &[&str] =
        &["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem"];
    let found = FILES.iter().find_map(|file| CertificateDer::pem_file_iter(file).ok());
    found.into_iter().flatten().flatten().collect()
}

/// TLS of a client of HTTP/1.1; `identity` is shown to the server.
pub fn client_tls(trust: Trust, identity: Option<&Identity>) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let builder = match trust {
        Trust::Only(roots) => builder.with_root_certificates(roots),
        Trust::Anybody => builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyServer(provider))),
    };
    let mut config = match identity {
        Some(identity) => {
            let (chain, key) = identity.rustls_parts()?;
            builder.with_client_auth_cert(chain, key)?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Checks the handshake's signatures but not who signed the certificate.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
