//! What keeps the API server from starting.

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("TLS: {0}")]
    Tls(String),
    #[error("TLS: {0}")]
    Rustls(#[from] rustls::Error),
    #[error("TLS of the proxies: {0}")]
    Proxy(#[from] crate::proxy::TlsError),
    #[error("certificates: {0}")]
    Pki(#[from] outrigger_access::pki::PkiError),
    #[error("service account tokens: {0}")]
    Token(#[from] outrigger_access::token::TokenError),
    #[error("authentication: {0}")]
    Authn(#[from] outrigger_access::AuthnError),
    #[error("store: {0}")]
    Store(#[from] outrigger_store::StoreError),
    #[error("cannot create {what}: {status}")]
    Bootstrap { what: String, status: outrigger_api::Status },
}
