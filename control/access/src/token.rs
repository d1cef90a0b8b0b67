//! Service account tokens: ES256 JWTs with upstream's claims, signed, verified, and published as JWKS.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::user::{service_account_user, split_service_account};

/// The issuer of a cluster whose domain is `cluster.local`, and its default audience.
pub const DEFAULT_ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// The issuer of tokens in Secrets.
pub const LEGACY_ISSUER: &str = "kubernetes/serviceaccount";

const DEFAULT_EXPIRATION: i64 = 3600;
const MIN_EXPIRATION: i64 = 600;
const MAX_EXPIRATION: i64 = 1 << 32;
/// What the kubelet asks for when a pod's token has the default lifetime; such tokens live on for a year, so that clients which never
/// read them again keep working, and `warnafter` tells when they should have.
const WARN_ONLY_EXPIRATION: i64 = 3600 + 7;
const EXTENDED_EXPIRATION: i64 = 365 * 24 * 3600;
/// How far clocks may differ.
const LEEWAY: i64 = 60;
/// Longer than any token of ours; refuses to parse more.
const MAX_TOKEN: usize = 16 << 10;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not one of ours: another authenticator may know it.
    #[error("not a service account token of this issuer")]
    NotOurs,
    #[error("{0}")]
    Invalid(String),
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, TokenError> {
    Err(TokenError::Invalid(reason.into()))
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectRef {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
}

impl ObjectRef {
    pub fn new(name: impl Into<String>, uid: impl Into<String>) -> Self {
        Self { name: name.into(), uid: uid.into() }
    }
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
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aud: Vec<String>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub exp: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub iat: i64,
    pub iss: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub jti: String,
    #[serde(rename = "kubernetes.io")]
    pub kubernetes: KubernetesClaims,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub nbf: i64,
    pub sub: String,
}

// serde wants a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

impl Claims {
    /// Tokens in Secrets never expire and are checked against the Secret.
    pub fn is_legacy(&self) -> bool {
        self.iss == LEGACY_ISSUER
    }
}

/// Tokens in Secrets have flat claims.
#[derive(Serialize, Deserialize)]
struct LegacyClaims {
    iss: String,
    #[serde(rename = "kubernetes.io/serviceaccount/namespace")]
    namespace: String,
    #[serde(rename = "kubernetes.io/serviceaccount/secret.name")]
    secret: String,
    #[serde(rename = "kubernetes.io/serviceaccount/service-account.name")]
    name: String,
    #[serde(rename = "kubernetes.io/serviceaccount/service-account.uid")]
    uid: String,
    sub: String,
}

/// What a bound token is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bound {
    /// The pod, and the node it's assigned to if any.
    Pod {
        pod: ObjectRef,
        node: Option<ObjectRef>,
    },
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
    /// What to tell the client: for a token with `warnafter`, that time.
    pub expires: Timestamp,
}

impl std::fmt::Debug for IssuedToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IssuedToken").field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// Checks `spec.expirationSeconds` of a TokenRequest; the text goes behind the field's path.
pub fn check_expiration_seconds(seconds: i64) -> Result<(), &'static str> {
    match seconds {
        ..MIN_EXPIRATION => Err("may not specify a duration less than 10 minutes"),
        MAX_EXPIRATION.. if seconds > MAX_EXPIRATION => Err("may not specify a duration larger than 2^32 seconds"),
        _ => Ok(()),
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    kid: String,
}

/// Signs and verifies with ES256.
pub struct TokenIssuer {
    key: EcdsaKeyPair,
    random: SystemRandom,
    key_id: String,
    issuer: String,
    audiences: Vec<String>,
}

impl TokenIssuer {
    /// `key_pem`: PKCS#8 P-256, as [`crate::pki::Pki::service_account_key_pem`] gives it. `audiences` empty: the issuer.
    pub fn new(key_pem: &str, issuer: &str, audiences: Vec<String>) -> Result<Self, TokenError> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|error| TokenError::Invalid(format!("service account key: {error}")))?;
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.secret_pkcs8_der(), &random)
            .map_err(|error| TokenError::Invalid(format!("service account key: {error}")))?;
        let key_id = URL_SAFE_NO_PAD.encode(Sha256::digest(public_key_info(key.public_key().as_ref())));
        let audiences = if audiences.is_empty() { vec![issuer.to_owned()] } else { audiences };
        Ok(Self { key, random, key_id, issuer: issuer.to_owned(), audiences })
    }

    /// The API server's own audiences.
    pub fn audiences(&self) -> &[String] {
        &self.audiences
    }

    /// The TokenRequest logic: bounds, defaults, the kubelet's extended expiration with `warnafter`.
    pub fn issue(&self, wish: &TokenWish) -> Result<IssuedToken, TokenError> {
        let seconds = wish.expiration_seconds.unwrap_or(DEFAULT_EXPIRATION);
        check_expiration_seconds(seconds).map_err(|reason| TokenError::Invalid(reason.to_owned()))?;
        let audiences = if wish.audiences.is_empty() { self.audiences.clone() } else { wish.audiences.clone() };
        let now = Timestamp::now().as_second();
        // Only for a pod's token that's meant for the API server.
        let extended = seconds == WARN_ONLY_EXPIRATION
            && matches!(wish.bound, Some(Bound::Pod { .. }))
            && audiences.iter().all(|audience| self.audiences.contains(audience));
        let (pod, node, secret) = match wish.bound.clone() {
            Some(Bound::Pod { pod, node }) => (Some(pod), node, None),
            Some(Bound::Node(node)) => (None, Some(node), None),
            Some(Bound::Secret(secret)) => (None, None, Some(secret)),
            None => (None, None, None),
        };
        let claims = Claims {
            aud: audiences,
            exp: now + if extended { EXTENDED_EXPIRATION } else { seconds },
            iat: now,
            iss: self.issuer.clone(),
            jti: uuid::Uuid::new_v4().to_string(),
            kubernetes: KubernetesClaims {
                namespace: wish.namespace.clone(),
                node,
                pod,
                secret,
                serviceaccount: wish.service_account.clone(),
                warnafter: extended.then_some(now + seconds),
            },
            nbf: now,
            sub: service_account_user(&wish.namespace, &wish.service_account.name),
        };
        let expires = Timestamp::from_second(now + seconds).map_err(|error| TokenError::Invalid(error.to_string()))?;
        Ok(IssuedToken { token: self.sign(&claims)?, expires })
    }

    /// The text of a `kubernetes.io/service-account-token` Secret: no expiry, valid as long as the Secret holds it.
    pub fn issue_legacy(&self, namespace: &str, service_account: &ObjectRef, secret: &str) -> Result<String, TokenError> {
        self.sign(&LegacyClaims {
            iss: LEGACY_ISSUER.to_owned(),
            namespace: namespace.to_owned(),
            secret: secret.to_owned(),
            name: service_account.name.clone(),
            uid: service_account.uid.clone(),
            sub: service_account_user(namespace, &service_account.name),
        })
    }

    fn sign(&self, claims: &impl Serialize) -> Result<String, TokenError> {
        let encode = |value: Result<Vec<u8>, serde_json::Error>| {
            value.map(|json| URL_SAFE_NO_PAD.encode(json)).map_err(|error| TokenError::Invalid(error.to_string()))
        };
        let header = Header { alg: "ES256".to_owned(), kid: self.key_id.clone() };
        let signed = format!("{}.{}", encode(serde_json::to_vec(&header))?, encode(serde_json::to_vec(claims))?);
        let signature =
            self.key.sign(&self.random, signed.as_bytes()).map_err(|_| TokenError::Invalid("the token couldn't be signed".to_owned()))?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// Signature, issuer, times and audiences; returns the claims and those audiences that were asked for (`audiences` empty: the API
    /// server's own). Bound objects are the authenticator's part.
    pub fn verify(&self, token: &str, audiences: &[String]) -> Result<(Claims, Vec<String>), TokenError> {
        self.verify_at(token, audiences, Timestamp::now().as_second())
    }

    fn verify_at(&self, token: &str, audiences: &[String], now: i64) -> Result<(Claims, Vec<String>), TokenError> {
        let mut claims = self.verify_signature(token)?;
        let wanted = if audiences.is_empty() { self.audiences.as_slice() } else { audiences };
        if claims.is_legacy() {
            // They say nothing of audiences: good for the API server only.
            claims.aud = self.audiences.clone();
        } else {
            if claims.exp != 0 && now - LEEWAY > claims.exp {
                return refuse("service account token has expired");
            }
            if claims.nbf != 0 && now + LEEWAY < claims.nbf {
                return refuse("service account token is not valid yet");
            }
            if claims.iat != 0 && now + LEEWAY < claims.iat {
                return refuse("service account token is issued in the future");
            }
        }
        let common: Vec<String> = wanted.iter().filter(|audience| claims.aud.contains(audience)).cloned().collect();
        if common.is_empty() {
            return refuse(format!("token audiences {:?} is invalid for the target audiences {wanted:?}", claims.aud));
        }
        let subject = split_service_account(&claims.sub);
        if subject != Some((claims.kubernetes.namespace.as_str(), claims.kubernetes.serviceaccount.name.as_str())) {
            return refuse("service account token's subject doesn't match its claims");
        }
        Ok((claims, common))
    }

    fn verify_signature(&self, token: &str) -> Result<Claims, TokenError> {
        let mut parts = token.split('.');
        let (Some(header), Some(payload), Some(signature), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err(TokenError::NotOurs);
        };
        if token.len() > MAX_TOKEN {
            return Err(TokenError::NotOurs);
        }
        let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).map_err(|_| TokenError::NotOurs);
        let payload_json = decode(payload)?;
        #[derive(Deserialize)]
        struct Issued {
            iss: String,
        }
        let issued: Issued = serde_json::from_slice(&payload_json).map_err(|_| TokenError::NotOurs)?;
        if issued.iss != self.issuer && issued.iss != LEGACY_ISSUER {
            return Err(TokenError::NotOurs);
        }
        let header_fields: Header = serde_json::from_slice(&decode(header)?).map_err(|_| TokenError::NotOurs)?;
        let signed = &token.as_bytes()[..header.len() + 1 + payload.len()];
        // The algorithm is ours, never the token's choice.
        let valid = header_fields.alg == "ES256"
            && UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.key.public_key().as_ref()).verify(signed, &decode(signature)?).is_ok();
        if !valid {
            return refuse("invalid signature");
        }
        let malformed = |error: serde_json::Error| TokenError::Invalid(format!("service account token claims: {error}"));
        if issued.iss == LEGACY_ISSUER {
            let legacy: LegacyClaims = serde_json::from_slice(&payload_json).map_err(malformed)?;
            return Ok(Claims {
                iss: legacy.iss,
                sub: legacy.sub,
                kubernetes: KubernetesClaims {
                    namespace: legacy.namespace,
                    secret: Some(ObjectRef::new(legacy.secret, "")),
                    serviceaccount: ObjectRef::new(legacy.name, legacy.uid),
                    ..KubernetesClaims::default()
                },
                ..Claims::default()
            });
        }
        serde_json::from_slice(&payload_json).map_err(malformed)
    }

    /// `/openid/v1/jwks`
    pub fn jwks(&self) -> serde_json::Value {
        let point = self.key.public_key().as_ref();
        // An uncompressed point: 4, x, y.
        let (x, y) = (&point[1..33], &point[33..65]);
        serde_json::json!({ "keys": [{
            "use": "sig",
            "kty": "EC",
            "kid": self.key_id,
            "crv": "P-256",
            "alg": "ES256",
            "x": URL_SAFE_NO_PAD.encode(x),
            "y": URL_SAFE_NO_PAD.encode(y),
        }]})
    }

    /// `/.well-known/openid-configuration`
    pub fn discovery(&self, jwks_uri: &str) -> serde_json::Value {
        serde_json::json!({
            "issuer": self.issuer,
            "jwks_uri": jwks_uri,
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256"],
        })
    }
}

/// The DER of a P-256 public key, over which upstream computes key ids.
fn public_key_info(point: &[u8]) -> Vec<u8> {
    const PREFIX: [u8; 26] = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01,
        0x07, 0x03, 0x42, 0x00,
    ];
    [&PREFIX, point].concat()
}

#[cfg(test)]
#[path = "token_tests.rs"]
mod tests;
