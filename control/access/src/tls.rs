//! Client certificates in TLS: proof of possession in the handshake, trust decided after it.

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};

use crate::pki::{Pki, PkiError, certificates};

/// For `rustls::ServerConfig`: asks for a client certificate, requires none, and proves possession of its key. Whether its CA is trusted
/// is decided later by the authenticator, so that an unknown certificate is answered by 401 and not by a broken handshake.
pub fn client_cert_acceptor(pki: &Pki) -> Result<Arc<dyn ClientCertVerifier>, PkiError> {
    // The hints matter: Go's clients send only a certificate whose issuer is among them.
    let mut hints = roots(pki.ca_pem())?.subjects();
    hints.extend(roots(pki.front_proxy_ca_pem())?.subjects());
    Ok(Arc::new(Acceptor { hints, provider: ring::default_provider() }))
}

pub(crate) fn roots(ca_pem: &str) -> Result<RootCertStore, PkiError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca_pem)? {
        roots.add(certificate).map_err(|error| PkiError::Invalid { what: "CA".to_owned(), reason: error.to_string() })?;
    }
    Ok(roots)
}

/// Checks chains for client authentication against one CA bundle.
pub(crate) fn chain_verifier(ca_pem: &str) -> Result<Arc<dyn ClientCertVerifier>, PkiError> {
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca_pem)?), Arc::new(ring::default_provider()))
        .build()
        .map_err(|error| PkiError::Invalid { what: "client CA".to_owned(), reason: error.to_string() })
}

#[derive(Debug)]
struct Acceptor {
    hints: Vec<DistinguishedName>,
    provider: CryptoProvider,
}

impl ClientCertVerifier for Acceptor {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(&self, _: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: UnixTime) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
