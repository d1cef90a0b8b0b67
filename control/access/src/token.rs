//! Service account tokens: signed, verified, published as JWKS.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not one of ours: another authenticator may know it.
    #[error("not a service account token of this issuer")]
    NotOurs,
    #[error("{0}")]
    Invalid(String),
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectRef {
    pub name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
}

/// The private claim `kubernetes.io`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KubernetesClaims {
    pub namespace: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<ObjectRef>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<ObjectRef>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<ObjectRef>,
    pub serviceaccount: ObjectRef,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warnafter: Option<i64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    #[serde(default)]
    pub aud: Vec<String>,
    #[serde(default)]
    pub exp: i64,
    #[serde(default)]
    pub iat: i64,
    pub iss: String,
    #[serde(default)]
    pub jti: String,
    #[serde(rename = "kubernetes.io")]
    pub kubernetes: KubernetesClaims,
    #[serde(default)]
    pub nbf: i64,
    pub sub: String,
}

/// What a bound token is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bound {
    /// The pod, and the node it's assigned to if any.
    Pod { pod: ObjectRef, node: Option<ObjectRef> },
    Node(ObjectRef),
    Secret(ObjectRef),
}

/// Input of the `token` subresource of a service account, already checked to exist.
#[derive(Debug, Clone)]
pub struct TokenWish {
    pub namespace: String,
    pub service_account: ObjectRef,
    /// Empty: the API server's own audiences.
    pub audiences: Vec<String>,
    /// `None`: one hour. At least 600, at most 2^32.
    pub expiration_seconds: Option<i64>,
    pub bound: Option<Bound>,
}

#[derive(Clone)]
pub struct IssuedToken {
    pub token: String,
    pub expires: jiff::Timestamp,
}

/// Signs and verifies with ES256.
pub struct TokenIssuer {
    _p: (),
}

impl TokenIssuer {
    /// `key_pem`: PKCS#8 P-256, as [`crate::pki::Pki::service_account_key_pem`] gives it. `audiences` empty: the issuer.
    pub fn new(key_pem: &str, issuer: &str, audiences: Vec<String>) -> Result<Self, TokenError> {
        let _ = (key_pem, issuer, audiences);
        todo!()
    }
    pub fn audiences(&self) -> &[String] {
        todo!()
    }
    /// The TokenRequest logic: bounds, defaults, the kubelet's extended expiration with `warnafter`.
    pub fn issue(&self, wish: &TokenWish) -> Result<IssuedToken, TokenError> {
        let _ = wish;
        todo!()
    }
    /// The text of a `kubernetes.io/service-account-token` Secret: no expiry, bound to the secret by lookup.
    pub fn issue_legacy(&self, namespace: &str, service_account: &ObjectRef, secret: &str) -> Result<String, TokenError> {
        let _ = (namespace, service_account, secret);
        todo!()
    }
    /// Signature, issuer, times and audiences. Bound objects are the authenticator's part.
    pub fn verify(&self, token: &str, audiences: &[String]) -> Result<(Claims, Vec<String>), TokenError> {
        let _ = (token, audiences);
        todo!()
    }
    /// `/openid/v1/jwks`
    pub fn jwks(&self) -> serde_json::Value {
        todo!()
    }
    /// `/.well-known/openid-configuration`
    pub fn discovery(&self, jwks_uri: &str) -> serde_json::Value {
        let _ = jwks_uri;
        todo!()
    }
}
