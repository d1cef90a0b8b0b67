//! Requests sent on: to kubelets for logs, exec, attach and port-forward, and to pods, services and nodes by their proxy subresource.

pub mod forward;
pub mod pod;

use std::sync::Arc;

use outrigger_access::pki::Identity;
use rustls::ClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};

use crate::error::StartError;

/// How kubelets are reached: with the server's client certificate, trusting whatever certificate they serve with, as upstream does
/// unless it is given their CA.
pub struct Kubelets {
    pub tls: Arc<ClientConfig>,
    /// For HTTPS backends of services and pods: no certificate of ours.
    pub anonymous_tls: Arc<ClientConfig>,
}

impl Kubelets {
    pub fn new(identity: &Identity) -> Result<Self, StartError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Arc::new(AnyServer(provider.clone()));
        let builder = || {
            let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
            Ok::<_, rustls::Error>(builder.dangerous().with_custom_certificate_verifier(verifier.clone()))
        };
        let (chain, key) = identity.rustls_parts()?;
        let mut tls = builder()?.with_client_auth_cert(chain, key)?;
        let mut anonymous_tls = builder()?.with_no_client_auth();
        for config in [&mut tls, &mut anonymous_tls] {
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
        }
        Ok(Self { tls: Arc::new(tls), anonymous_tls: Arc::new(anonymous_tls) })
    }
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
