//! Who is asking, and whether they may.
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use http::{HeaderMap, Method, StatusCode, header};
use outrigger_cluster::access::{NodeAccess, Reviews, User};
use rustls::pki_types::CertificateDer;
use tracing::warn;
use x509_parser::prelude::{FromDer, X509Certificate};

/// How long answers are believed; upstream's defaults are 2 min, 5 min and 30 s.
const TOKEN: Duration = Duration::from_secs(120);
const ALLOWED: Duration = Duration::from_secs(300);
const DENIED: Duration = Duration::from_secs(30);
const MAX_CACHED: usize = 4096;
const AUTHENTICATED: &str = "system:authenticated";

/// The user that a verified client certificate names.
pub fn user_of(certificate: &CertificateDer<'_>) -> Option<User> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let mut groups: Vec<String> = subject.iter_organization().filter_map(|group| group.as_str().ok()).map(str::to_owned).collect();
    groups.push(AUTHENTICATED.to_owned());
    Some(User { name, groups, ..User::default() })
}

/// Answers that stay valid for a while.
struct Cache<K, V>(Mutex<HashMap<K, (Instant, V)>>);

impl<K: Hash + Eq, V: Clone> Cache<K, V> {
    fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<K, (Instant, V)>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn get(&self, key: &K) -> Option<V> {
        self.lock().get(key).filter(|(until, _)| *until > Instant::now()).map(|(_, value)| value.clone())
    }

    fn put(&self, key: K, value: V, valid: Duration) {
        let (mut entries, now) = (self.lock(), Instant::now());
        if entries.len() >= MAX_CACHED {
            entries.retain(|_, (until, _)| *until > now);
            if entries.len() >= MAX_CACHED {
                entries.clear();
            }
        }
        entries.insert(key, (now + valid, value));
    }
}

/// Decides by asking the API server, with a short memory.
pub struct Gate {
    reviews: Reviews,
    node_name: String,
    tokens: Cache<String, Option<User>>,
    decisions: Cache<(User, NodeAccess), bool>,
}

/// Why a request is turned away.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal(pub StatusCode, pub String);

impl Gate {
    pub fn new(reviews: Reviews, node_name: String) -> Self {
        Self { reviews, node_name, tokens: Cache::new(), decisions: Cache::new() }
    }

    /// The user, or a refusal.
    pub async fn admit(&self, certificate: Option<User>, method: &Method, path: &str, headers: &HeaderMap) -> Result<User, Refusal> {
        let user = match certificate {
            Some(user) => Some(user),
            None => match bearer_token(headers) {
                Some(token) => self.owner(token).await?,
                None => None,
            },
        };
        let user = user.ok_or_else(|| Refusal(StatusCode::UNAUTHORIZED, "Unauthorized".to_owned()))?;
        let verb = verb(method);
        let subresources = subresources(path);
        for subresource in &subresources {
            let access = NodeAccess { verb: verb.to_owned(), node: self.node_name.clone(), subresource: (*subresource).to_owned() };
            if self.may(&user, access).await? {
                return Ok(user);
            }
        }
        let message = format!("Forbidden (user={}, verb={verb}, resource=nodes, subresource(s)=[{}])\n", user.name, subresources.join(" "));
        Err(Refusal(StatusCode::FORBIDDEN, message))
    }

    async fn owner(&self, token: &str) -> Result<Option<User>, Refusal> {
        let key = token.to_owned();
        if let Some(known) = self.tokens.get(&key) {
            return Ok(known);
        }
        match self.reviews.token(token).await {
            Ok(user) => {
                // An unknown token may be known a moment later.
                if user.is_some() {
                    self.tokens.put(key, user.clone(), TOKEN);
                }
                Ok(user)
            }
            Err(error) => {
                warn!(%error, "a token can't be reviewed");
                Err(Refusal(StatusCode::UNAUTHORIZED, "Unauthorized".to_owned()))
            }
        }
    }

    async fn may(&self, user: &User, access: NodeAccess) -> Result<bool, Refusal> {
        let key = (user.clone(), access);
        if let Some(known) = self.decisions.get(&key) {
            return Ok(known);
        }
        match self.reviews.allowed(user, &key.1).await {
            Ok(allowed) => {
                self.decisions.put(key, allowed, if allowed { ALLOWED } else { DENIED });
                Ok(allowed)
            }
            Err(error) => {
                warn!(%error, user = user.name, "access can't be reviewed");
                let message = format!(
                    "Authorization error (user={}, verb={}, resource=nodes, subresource(s)=[{}])",
                    user.name, key.1.verb, key.1.subresource
                );
                Err(Refusal(StatusCode::INTERNAL_SERVER_ERROR, message))
            }
        }
    }
}

fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    Some(token.trim()).filter(|token| scheme.eq_ignore_ascii_case("bearer") && !token.is_empty())
}

fn verb(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::GET => "get",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "",
    }
}

/// The subresources of `nodes` of which any opens this path.
fn subresources(path: &str) -> Vec<&'static str> {
    let below = |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let fine = [("/pods", "pods"), ("/healthz", "healthz"), ("/configz", "configz"), ("/runningpods", "pods")];
    let coarse = [("/stats", "stats"), ("/metrics", "metrics"), ("/logs", "log"), ("/checkpoint", "checkpoint")];
    let find = |table: &[(&str, &'static str)]| table.iter().find(|(prefix, _)| below(prefix)).map(|(_, subresource)| *subresource);
    find(&fine).into_iter().chain([find(&coarse).unwrap_or("proxy")]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_belong_to_subresources() {
        let cases: [(&str, &[&str]); 9] = [
            ("/pods", &["pods", "proxy"]),
            ("/runningpods/", &["pods", "proxy"]),
            ("/healthz/syncloop", &["healthz", "proxy"]),
            ("/configz", &["configz", "proxy"]),
            ("/stats/summary", &["stats"]),
            ("/metrics/cadvisor", &["metrics"]),
            ("/metricsx", &["proxy"]),
            ("/logs/syslog", &["log"]),
            ("/exec/a/b/c", &["proxy"]),
        ];
        for (path, expected) in cases {
            assert_eq!(subresources(path), expected, "{path}");
        }
    }

    #[test]
    fn certificates_name_users_and_groups() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec![]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "kube-apiserver-kubelet-client");
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:masters");
        let certificate = params.self_signed(&key).unwrap();
        let user = user_of(certificate.der()).unwrap();
        assert_eq!(
            (user.name.as_str(), user.groups),
            ("kube-apiserver-kubelet-client", vec!["system:masters".to_owned(), AUTHENTICATED.to_owned()])
        );
    }

    #[test]
    fn only_bearer_tokens_count() {
        let cases = [("Bearer abc", Some("abc")), ("bearer  abc ", Some("abc")), ("Basic abc", None), ("Bearer ", None), ("abc", None)];
        for (value, expected) in cases {
            let headers = HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
            assert_eq!(bearer_token(&headers), expected, "{value:?}");
        }
    }

    #[test]
    fn answers_are_forgotten_in_time() {
        let cache = Cache::new();
        cache.put("a", 1, Duration::from_secs(60));
        cache.put("b", 2, Duration::ZERO);
        assert_eq!((cache.get(&"a"), cache.get(&"b"), cache.get(&"c")), (Some(1), None, None));
    }
}
