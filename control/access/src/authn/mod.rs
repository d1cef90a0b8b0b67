//! From a request's certificate, headers and token to a [`UserInfo`].
//!
//! Tried in order: the front proxy's headers, a client certificate, a bearer token. The first that succeeds decides; if one failed and
//! none succeeded the request is refused; a request without credentials is anonymous where that's allowed.

mod bearer;
mod certificates;
mod impersonation;

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use http::HeaderMap;
use rustls::pki_types::CertificateDer;

use crate::pki::Pki;
use crate::token::TokenIssuer;
use crate::user::{ANONYMOUS, GROUP_AUTHENTICATED, GROUP_UNAUTHENTICATED, UserInfo};
pub use bearer::{StaticToken, parse_token_file};
use certificates::Certificates;
pub use impersonation::{Impersonation, ImpersonationCheck, parse_impersonation, strip_impersonation};

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
    /// HTTP 400, for impersonation headers.
    #[error("{0}")]
    BadRequest(String),
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, AuthnError> {
    Err(AuthnError::Unauthorized(reason.into()))
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

#[derive(Default)]
pub struct AuthenticatorConfig {
    pub anonymous: AnonymousPolicy,
    /// Parsed by [`parse_token_file`].
    pub static_tokens: Vec<StaticToken>,
    pub bootstrap_tokens: bool,
}

/// Front proxy, x509, static, service account and bootstrap tokens, then anonymous.
pub struct Authenticator {
    certificates: Certificates,
    tokens: Arc<TokenIssuer>,
    lookup: Arc<dyn ObjectLookup>,
    config: AuthenticatorConfig,
    /// Tokens found good, by their hash, with the audiences asked for.
    verified: Recent<([u8; 32], Vec<String>), Authenticated>,
}

/// How long a good token is believed without looking up its objects again; as upstream.
const TOKEN_MEMORY: Duration = Duration::from_secs(10);

impl Authenticator {
    pub fn new(
        pki: &Pki,
        tokens: Arc<TokenIssuer>,
        lookup: Arc<dyn ObjectLookup>,
        config: AuthenticatorConfig,
    ) -> Result<Self, AuthnError> {
        let certificates =
            Certificates::new(pki.ca_pem(), pki.front_proxy_ca_pem()).map_err(|error| AuthnError::Unauthorized(error.to_string()))?;
        Ok(Self { certificates, tokens, lookup, config, verified: Recent::new(TOKEN_MEMORY) })
    }

    /// Identifies the sender, impersonation not yet applied.
    pub async fn authenticate(&self, request: RequestCredentials<'_>) -> Result<Authenticated, AuthnError> {
        let mut reasons = Vec::new();
        match self.certificates.authenticate(&request) {
            Ok(Some(user)) => return Ok(self.admitted(user)),
            Ok(None) => {}
            Err(error) => reasons.push(error.to_string()),
        }
        match bearer::token_of(&request) {
            Ok(Some(token)) => match self.authenticate_token(&token, &[]).await {
                Ok(authenticated) => return Ok(authenticated),
                Err(error) => reasons.push(error.to_string()),
            },
            Ok(None) => {}
            Err(error) => reasons.push(error.to_string()),
        }
        if !reasons.is_empty() {
            return refuse(reasons.join("; "));
        }
        let anonymous = match &self.config.anonymous {
            AnonymousPolicy::Everywhere => true,
            AnonymousPolicy::Never => false,
            AnonymousPolicy::Paths(paths) => paths.iter().any(|path| path == request.path),
        };
        if !anonymous {
            return refuse("no credentials, and anonymous requests are not allowed");
        }
        Ok(Authenticated { user: UserInfo::anonymous(), audiences: self.tokens.audiences().to_vec() })
    }

    /// Checks a token by itself, for `TokenReview`. `audiences` empty: the API server's own.
    pub async fn authenticate_token(&self, token: &str, audiences: &[String]) -> Result<Authenticated, AuthnError> {
        let key = (bearer::fingerprint(token), audiences.to_vec());
        if let Some(known) = self.verified.get(&key) {
            return Ok(known);
        }
        let authenticated = self.check_token(token, audiences).await?;
        self.verified.put(key, authenticated.clone());
        Ok(authenticated)
    }

    async fn check_token(&self, token: &str, audiences: &[String]) -> Result<Authenticated, AuthnError> {
        if let Some(user) = bearer::static_user(&self.config.static_tokens, token) {
            return self.for_api_audiences(user, audiences);
        }
        if let Some((user, audiences)) = bearer::service_account(&self.tokens, &*self.lookup, token, audiences).await? {
            return Ok(Authenticated { user: with_authenticated_group(user), audiences });
        }
        if self.config.bootstrap_tokens
            && let Some(user) = bearer::bootstrap_user(&*self.lookup, token).await?
        {
            return self.for_api_audiences(user, audiences);
        }
        refuse("invalid bearer token")
    }

    /// Credentials that say nothing of audiences are good for the API server's own.
    fn for_api_audiences(&self, user: UserInfo, audiences: &[String]) -> Result<Authenticated, AuthnError> {
        let own = self.tokens.audiences();
        let common: Vec<String> = match audiences {
            [] => own.to_vec(),
            _ => audiences.iter().filter(|audience| own.contains(audience)).cloned().collect(),
        };
        if common.is_empty() {
            return refuse("the token isn't meant for the audiences asked for");
        }
        Ok(Authenticated { user: with_authenticated_group(user), audiences: common })
    }

    fn admitted(&self, user: UserInfo) -> Authenticated {
        Authenticated { user: with_authenticated_group(user), audiences: self.tokens.audiences().to_vec() }
    }
}

/// Everyone but the anonymous is in `system:authenticated`.
fn with_authenticated_group(mut user: UserInfo) -> UserInfo {
    if user.name != ANONYMOUS && !user.in_group(GROUP_AUTHENTICATED) && !user.in_group(GROUP_UNAUTHENTICATED) {
        user.groups.push(GROUP_AUTHENTICATED.to_owned());
    }
    user
}

/// Answers that are true for a while.
struct Recent<K, V> {
    lifetime: Duration,
    entries: Mutex<HashMap<K, (Instant, V)>>,
}

/// Entries kept at most; beyond, the stale ones go, and if that's not enough all.
const RECENT_ENTRIES: usize = 2048;

impl<K: Eq + Hash, V: Clone> Recent<K, V> {
    fn new(lifetime: Duration) -> Self {
        Self { lifetime, entries: Mutex::new(HashMap::new()) }
    }

    fn get(&self, key: &K) -> Option<V> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.get(key).filter(|(since, _)| since.elapsed() < self.lifetime).map(|(_, value)| value.clone())
    }

    fn put(&self, key: K, value: V) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= RECENT_ENTRIES {
            entries.retain(|_, (since, _)| since.elapsed() < self.lifetime);
        }
        if entries.len() >= RECENT_ENTRIES {
            entries.clear();
        }
        entries.insert(key, (Instant::now(), value));
    }
}

#[cfg(test)]
mod tests;
