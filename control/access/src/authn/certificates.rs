//! Client certificates: CN is the user, O are the groups; and the front proxy, which names the user in headers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::impersonation::{extra_key, header_text};
use super::{AuthnError, Recent, RequestCredentials, refuse};
use crate::pki::PkiError;
use crate::tls::chain_verifier;
use crate::user::{EXTRA_CREDENTIAL_ID, UserInfo};

/// The only name the front proxy's certificate may have.
const FRONT_PROXY_NAME: &str = "front-proxy-client";
const REMOTE_USER: &str = "x-remote-user";
const REMOTE_UID: &str = "x-remote-uid";
const REMOTE_GROUP: &str = "x-remote-group";
const REMOTE_EXTRA: &str = "x-remote-extra-";

/// How long a verified chain is believed; a certificate that expires meanwhile lives on for so long.
const CHAIN_MEMORY: Duration = Duration::from_secs(60);

/// Checks chains against the two CAs.
pub(super) struct Certificates {
    client_ca: Arc<dyn ClientCertVerifier>,
    front_proxy_ca: Arc<dyn ClientCertVerifier>,
    verified: Recent<[u8; 32], UserInfo>,
}

impl Certificates {
    pub(super) fn new(client_ca_pem: &str, front_proxy_ca_pem: &str) -> Result<Self, PkiError> {
        Ok(Self {
            client_ca: chain_verifier(client_ca_pem)?,
            front_proxy_ca: chain_verifier(front_proxy_ca_pem)?,
            verified: Recent::new(CHAIN_MEMORY),
        })
    }

    pub(super) fn authenticate(&self, request: &RequestCredentials<'_>) -> Result<Option<UserInfo>, AuthnError> {
        let Some((leaf, intermediates)) = request.peer_certificates.split_first() else { return Ok(None) };
        if let Some(user) = self.front_proxied(leaf, intermediates, request.headers) {
            return Ok(Some(user));
        }
        let fingerprint: [u8; 32] = Sha256::digest(leaf).into();
        if let Some(known) = self.verified.get(&fingerprint) {
            return Ok(Some(known));
        }
        if let Err(error) = self.client_ca.verify_client_cert(leaf, intermediates, UnixTime::now()) {
            return refuse(format!("verifying the client certificate failed: {error}"));
        }
        let user = user_of(leaf, &fingerprint)?;
        if let Some(user) = &user {
            self.verified.put(fingerprint, user.clone());
        }
        Ok(user)
    }

    fn front_proxied(&self, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], headers: &HeaderMap) -> Option<UserInfo> {
        let name = headers.get(REMOTE_USER).map(header_text).filter(|name| !name.is_empty())?;
        let (_, cert) = X509Certificate::from_der(leaf).ok()?;
        let is_proxy = cert.subject().iter_common_name().any(|name| name.as_str() == Ok(FRONT_PROXY_NAME));
        if !is_proxy || self.front_proxy_ca.verify_client_cert(leaf, intermediates, UnixTime::now()).is_err() {
            return None;
        }
        let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (header, value) in headers {
            if let Some(key) = header.as_str().strip_prefix(REMOTE_EXTRA) {
                extra.entry(extra_key(key)).or_default().push(header_text(value));
            }
        }
        Some(UserInfo {
            name,
            uid: headers.get(REMOTE_UID).map(header_text).unwrap_or_default(),
            groups: headers.get_all(REMOTE_GROUP).iter().map(header_text).collect(),
            extra,
        })
    }
}

/// `None` without a common name: such a certificate names nobody.
fn user_of(leaf: &CertificateDer<'_>, fingerprint: &[u8; 32]) -> Result<Option<UserInfo>, AuthnError> {
    let Ok((_, cert)) = X509Certificate::from_der(leaf) else { return refuse("the client certificate can't be read") };
    let Some(name) = cert.subject().iter_common_name().filter_map(|name| name.as_str().ok()).find(|name| !name.is_empty()) else {
        return Ok(None);
    };
    let groups = cert.subject().iter_organization().filter_map(|name| name.as_str().ok()).map(str::to_owned).collect();
    let mut credential = "X509SHA256=".to_owned();
    for byte in fingerprint {
        // Writing to a String can't fail.
        let _ = write!(credential, "{byte:02x}");
    }
    Ok(Some(UserInfo {
        name: name.to_owned(),
        uid: String::new(),
        groups,
        extra: BTreeMap::from([(EXTRA_CREDENTIAL_ID.to_owned(), vec![credential])]),
    }))
}
