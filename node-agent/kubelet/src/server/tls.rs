//! The serving side's TLS: a certificate of the node's own, and client certificates of the cluster's CA.
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;

use super::Config;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kubelet certificate: {0}")]
    Make(#[from] rcgen::Error),
    #[error("kubelet certificate: {0}")]
    Store(#[from] std::io::Error),
    #[error("kubelet certificate: {0}")]
    Read(#[from] rustls::pki_types::pem::Error),
    #[error("client CA: {0}")]
    ClientCa(String),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

pub fn server_config(config: &Config) -> Result<rustls::ServerConfig, Error> {
    let (chain, key) = serving_certificate(config)?;
    let provider = Arc::new(ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let builder = if config.client_cas.is_empty() {
        builder.with_no_client_auth()
    } else {
        let mut roots = RootCertStore::empty();
        for certificate in &config.client_cas {
            roots.add(CertificateDer::from_slice(certificate))?;
        }
        // Clients with tokens have no certificate.
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).allow_unauthenticated().build();
        builder.with_client_cert_verifier(verifier.map_err(|error| Error::ClientCa(error.to_string()))?)
    };
    let mut tls = builder.with_single_cert(chain, key)?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(tls)
}

/// The certificate in `pki/`, made when it isn't there; self-signed, as upstream's is when no other is given.
fn serving_certificate(config: &Config) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Error> {
    let directory = config.data_dir.join("pki");
    let (certificate_path, key_path) = (directory.join("kubelet.crt"), directory.join("kubelet.key"));
    if !certificate_path.exists() || !key_path.exists() {
        fs::create_dir_all(&directory)?;
        let mut names: Vec<String> = vec![config.node_name.clone()];
        names.extend(config.node_ips.iter().map(ToString::to_string));
        let key = rcgen::KeyPair::generate()?;
        let certificate = rcgen::CertificateParams::new(names)?.self_signed(&key)?;
        write_private(&key_path, &key.serialize_pem())?;
        write_private(&certificate_path, &certificate.pem())?;
    }
    let chain = CertificateDer::pem_file_iter(&certificate_path)?.collect::<Result<Vec<_>, _>>()?;
    Ok((chain, PrivateKeyDer::from_pem_file(&key_path)?))
}

fn write_private(path: &Path, content: &str) -> std::io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(content.as_bytes())
}
