//! The serving side's TLS: a certificate of the node's own, and client certificates of the cluster's CA.
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use tracing::warn;

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
    let provider = Arc::new(ring::default_provider());
    let (chain, key) = serving_certificate(config, &provider)?;
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

type Pair = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The certificate in `pki/`, made when there is none that can be used; self-signed, as upstream's is when no other is given.
fn serving_certificate(config: &Config, provider: &CryptoProvider) -> Result<Pair, Error> {
    let directory = config.data_dir.join("pki");
    let (certificate_path, key_path) = (directory.join("kubelet.crt"), directory.join("kubelet.key"));
    if certificate_path.exists() && key_path.exists() {
        match read_pair(&certificate_path, &key_path, provider) {
            Ok(pair) => return Ok(pair),
            Err(error) => warn!(%error, path = %certificate_path.display(), "the serving certificate can't be used: making another"),
        }
    }
    fs::create_dir_all(&directory)?;
    let mut names: Vec<String> = vec![config.node_name.clone()];
    names.extend(config.node_ips.iter().map(ToString::to_string));
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(names)?.self_signed(&key)?;
    write_private(&key_path, &key.serialize_pem())?;
    write_private(&certificate_path, &certificate.pem())?;
    read_pair(&certificate_path, &key_path, provider)
}

/// Fails too when the key is another certificate's.
fn read_pair(certificate: &Path, key: &Path, provider: &CryptoProvider) -> Result<Pair, Error> {
    let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(key)?;
    CertifiedKey::from_der(chain.clone(), key.clone_key(), provider)?.end_entity_cert()?;
    Ok((chain, key))
}

/// The file is there whole or not at all, even after a crash.
fn write_private(path: &Path, content: &str) -> std::io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_that_cannot_be_used_is_made_anew_and_a_good_one_kept() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            node_name: "node-1".into(),
            address: "127.0.0.1".parse().unwrap(),
            port: 0,
            node_ips: vec!["192.0.2.1".parse().unwrap()],
            data_dir: dir.path().to_owned(),
            client_cas: Vec::new(),
            log_dir: dir.path().to_owned(),
        };
        let (certificate, key) = (dir.path().join("pki/kubelet.crt"), dir.path().join("pki/kubelet.key"));
        let now = || (fs::read_to_string(&certificate).unwrap(), fs::read_to_string(&key).unwrap());
        server_config(&config).unwrap();
        let first = now();
        server_config(&config).unwrap();
        assert_eq!(now(), first);
        let other = rcgen::KeyPair::generate().unwrap().serialize_pem();
        let half = &first.0[..first.0.len() / 2];
        for (path, content) in [(&certificate, ""), (&certificate, half), (&key, ""), (&key, other.as_str())] {
            let before = now();
            fs::write(path, content).unwrap();
            server_config(&config).unwrap();
            let after = now();
            assert!(after.0 != before.0 && after.1 != before.1, "{content:?}");
        }
        assert_eq!(fs::read_dir(dir.path().join("pki")).unwrap().count(), 2);
    }
}
