//! From a request's certificate, headers and token to a [`UserInfo`].

use std::sync::Arc;

use futures::future::BoxFuture;
use http::HeaderMap;
use rustls::pki_types::CertificateDer;

use crate::pki::Pki;
use crate::token::TokenIssuer;
use crate::user::UserInfo;

/// Kinds that authentication looks up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LookupKind {
    ServiceAccount,
    Secret,
    Pod,
    /// `namespace` is empty.
    Node,
}

impl LookupKind {
    /// The core/v1 resource.
    pub fn resource(self) -> &'static str {
        match self {
            Self::ServiceAccount => "serviceaccounts",
            Self::Secret => "secrets",
            Self::Pod => "pods",
            Self::Node => "nodes",
        }
    }
}

/// Reads core objects for the authenticators, from the API server's cache or store.
pub trait ObjectLookup: Send + Sync {
    fn get<'a>(&'a self, kind: LookupKind, namespace: &'a str, name: &'a str) -> BoxFuture<'a, Result<Option<serde_json::Value>, String>>;
}

/// Who asks, and for which audiences the credential was good (empty: not limited).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authenticated {
    pub user: UserInfo,
    pub audiences: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthnError {
    /// HTTP 401; the text is for the server's log, the client only hears `Unauthorized`.
    #[error("{0}")]
    Unauthorized(String),
    /// HTTP 400 or 403, for impersonation headers.
    #[error("{0}")]
    BadRequest(String),
}

/// What of a request identifies its sender.
#[derive(Clone, Copy)]
pub struct RequestCredentials<'a> {
    pub headers: &'a HeaderMap,
    /// The peer's certificate chain of the TLS session, leaf first; empty if none was sent.
    pub peer_certificates: &'a [CertificateDer<'static>],
    pub path: &'a str,
    /// `websocket` subprotocol tokens are accepted if the request upgrades.
    pub is_websocket: bool,
}

/// Whom to let in without credentials.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum AnonymousPolicy {
    #[default]
    Everywhere,
    Never,
    /// Only these exact paths.
    Paths(Vec<String>),
}

/// One line of a static token file.
#[derive(Clone)]
pub struct StaticToken {
    pub token: String,
    pub user: UserInfo,
}

pub struct AuthenticatorConfig {
    pub anonymous: AnonymousPolicy,
    /// Parsed by [`parse_token_file`].
    pub static_tokens: Vec<StaticToken>,
    pub bootstrap_tokens: bool,
}

/// x509, static, bootstrap and service account tokens, then anonymous.
pub struct Authenticator {
    _p: (),
}

impl Authenticator {
    pub fn new(
        pki: &Pki,
        tokens: Arc<TokenIssuer>,
        lookup: Arc<dyn ObjectLookup>,
        config: AuthenticatorConfig,
    ) -> Result<Self, AuthnError> {
        let _ = (pki, tokens, lookup, config);
        todo!()
    }

    /// Identifies the sender, impersonation not yet applied.
    pub async fn authenticate(&self, request: RequestCredentials<'_>) -> Result<Authenticated, AuthnError> {
        let _ = request;
        todo!()
    }

    /// Checks a token by itself, for `TokenReview`. `audiences` empty: the API server's own.
    pub async fn authenticate_token(&self, token: &str, audiences: &[String]) -> Result<Authenticated, AuthnError> {
        let _ = (token, audiences);
        todo!()
    }
}

/// Reads the CSV `token,user,uid,"group1,group2"`.
pub fn parse_token_file(text: &str) -> Result<Vec<StaticToken>, AuthnError> {
    let _ = text;
    todo!()
}

/// One permission that an impersonation needs (verb `impersonate`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImpersonationCheck {
    pub api_group: &'static str,
    pub resource: &'static str,
    pub subresource: String,
    pub namespace: String,
    pub name: String,
}

/// The user to become and what must be allowed (verb `impersonate`) before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Impersonation {
    pub user: UserInfo,
    pub checks: Vec<ImpersonationCheck>,
}

/// Reads the `Impersonate-*` headers; `None` if there are none.
pub fn parse_impersonation(headers: &HeaderMap) -> Result<Option<Impersonation>, AuthnError> {
    let _ = headers;
    todo!()
}
