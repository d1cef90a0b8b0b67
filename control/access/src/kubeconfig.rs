//! Kubeconfig files with embedded credentials.

use std::path::Path;

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
        todo!()
    }

    /// Writes it atomically with mode 0600.
    pub fn write(&self, path: &Path) -> Result<(), PkiError> {
        let _ = path;
        todo!()
    }
}
