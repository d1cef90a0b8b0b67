//! Kubeconfig files with embedded credentials.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::files;
use crate::pki::{Identity, PkiError};

/// One cluster, one user, one context.
pub struct Kubeconfig<'a> {
    pub cluster: &'a str,
    pub server: &'a str,
    pub ca_pem: &'a str,
    pub user: &'a str,
    pub identity: &'a Identity,
}

impl Kubeconfig<'_> {
    /// The file's YAML.
    pub fn render(&self) -> String {
        let (cluster, user, server) = (quoted(self.cluster), quoted(self.user), quoted(self.server));
        let context = quoted(&format!("{}@{}", self.user, self.cluster));
        let (ca, cert, key) =
            (STANDARD.encode(self.ca_pem), STANDARD.encode(&self.identity.cert_pem), STANDARD.encode(&self.identity.key_pem));
        format!(
            "apiVersion: v1\nkind: Config\n\
             clusters:\n- name: {cluster}\n  cluster:\n    certificate-authority-data: {ca}\n    server: {server}\n\
             contexts:\n- name: {context}\n  context:\n    cluster: {cluster}\n    user: {user}\n\
             current-context: {context}\npreferences: {{}}\n\
             users:\n- name: {user}\n  user:\n    client-certificate-data: {cert}\n    client-key-data: {key}\n"
        )
    }

    /// Writes it atomically with mode 0600.
    pub fn write(&self, path: &Path) -> Result<(), PkiError> {
        files::write(path, &self.render(), 0o600)
    }
}

/// A double-quoted YAML scalar: JSON's strings are such.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
