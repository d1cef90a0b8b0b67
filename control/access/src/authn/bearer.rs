//! Bearer tokens: of a static file, of service accounts, of bootstrap Secrets.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL};
use jiff::Timestamp;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::impersonation::header_text;
use super::{AuthnError, LookupKind, ObjectLookup, RequestCredentials, refuse};
use crate::token::{Claims, ObjectRef, TokenError, TokenIssuer};
use crate::user::{
    BOOTSTRAP_USER_PREFIX, EXTRA_CREDENTIAL_ID, EXTRA_NODE_NAME, EXTRA_NODE_UID, EXTRA_POD_NAME, EXTRA_POD_UID, GROUP_BOOTSTRAPPERS,
    GROUP_SERVICE_ACCOUNTS, UserInfo,
};

/// How browsers, which can't set headers on a WebSocket, hand over a token.
const WEBSOCKET_PREFIX: &str = "base64url.bearer.authorization.k8s.io.";
const BOOTSTRAP_NAMESPACE: &str = "kube-system";
/// Deletions younger than this don't count yet, in seconds.
const DELETION_LEEWAY: i64 = 60;

/// One line of a static token file.
#[derive(Clone)]
pub struct StaticToken {
    pub token: String,
    pub user: UserInfo,
}

pub(super) fn fingerprint(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

/// The request's token, if it carries one.
pub(super) fn token_of(request: &RequestCredentials<'_>) -> Result<Option<String>, AuthnError> {
    if let Some(value) = request.headers.get(AUTHORIZATION) {
        let text = header_text(value);
        let (scheme, token) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        if scheme.eq_ignore_ascii_case("bearer") {
            // More than one space is somebody else's scheme, as upstream sees it.
            return Ok((!token.is_empty()).then(|| token.to_owned()));
        }
    }
    if !request.is_websocket {
        return Ok(None);
    }
    let protocols = request.headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().map(header_text).collect::<Vec<_>>().join(",");
    let mut found = None;
    for protocol in protocols.split(',').map(str::trim) {
        let Some(encoded) = protocol.strip_prefix(WEBSOCKET_PREFIX) else { continue };
        if found.is_some() {
            return refuse("multiple base64.bearer.authorization tokens specified");
        }
        let token = URL_SAFE_NO_PAD.decode(encoded).ok().and_then(|bytes| String::from_utf8(bytes).ok()).filter(|token| !token.is_empty());
        found = Some(token.ok_or_else(|| AuthnError::Unauthorized("invalid base64.bearer.authorization token encoding".to_owned()))?);
    }
    Ok(found)
}

/// Takes the same time wherever the texts differ.
fn same_secret(left: &[u8], right: &[u8]) -> bool {
    let difference = left.iter().zip(right).fold(0, |difference, (left, right)| difference | (left ^ right));
    left.len() == right.len() && std::hint::black_box(difference) == 0
}

fn is_token(known: &StaticToken, token: &str) -> bool {
    same_secret(known.token.as_bytes(), token.as_bytes())
}

pub(super) fn static_user(tokens: &[StaticToken], token: &str) -> Option<UserInfo> {
    // All are compared, so that time doesn't tell which one came close; of twins the last counts.
    let matching = |found, known| if is_token(known, token) { Some(known) } else { found };
    tokens.iter().fold(None, matching).map(|known| known.user.clone())
}

/// Reads the CSV `token,user,uid,"group1,group2"`.
pub fn parse_token_file(text: &str) -> Result<Vec<StaticToken>, AuthnError> {
    let mut tokens = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let fields =
            csv_fields(line).ok_or_else(|| AuthnError::Unauthorized(format!("token file, line {}: unbalanced quote", number + 1)))?;
        let [token, name, uid, rest @ ..] = fields.as_slice() else {
            return refuse(format!("token file must have at least 3 columns (token, user name, user uid), found {}", fields.len()));
        };
        if token.is_empty() {
            tracing::warn!(line = number + 1, "empty token in the token file");
            continue;
        }
        let groups = rest.first().map(|groups| groups.split(',').map(str::to_owned).collect()).unwrap_or_default();
        let user = UserInfo { name: name.clone(), uid: uid.clone(), groups, ..UserInfo::default() };
        tokens.push(StaticToken { token: token.clone(), user });
    }
    Ok(tokens)
}

/// `None`: a quote isn't closed.
fn csv_fields(line: &str) -> Option<Vec<String>> {
    let mut fields = vec![String::new()];
    let (mut quoted, mut chars) = (false, line.chars().peekable());
    while let Some(char) = chars.next() {
        let last = fields.len() - 1;
        match char {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                fields[last].push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            other => fields[last].push(other),
        }
    }
    (!quoted).then_some(fields)
}

/// `None`: not a service account's token.
pub(super) async fn service_account(
    tokens: &TokenIssuer,
    lookup: &dyn ObjectLookup,
    token: &str,
    audiences: &[String],
) -> Result<Option<(UserInfo, Vec<String>)>, AuthnError> {
    let (claims, audiences) = match tokens.verify(token, audiences) {
        Ok(verified) => verified,
        Err(TokenError::NotOurs) => return Ok(None),
        Err(TokenError::Invalid(reason)) => return refuse(reason),
    };
    check_objects(lookup, &claims, token).await?;
    Ok(Some((user_of(&claims), audiences)))
}

/// The account still exists, and so does what the token is bound to.
async fn check_objects(lookup: &dyn ObjectLookup, claims: &Claims, token: &str) -> Result<(), AuthnError> {
    let kubernetes = &claims.kubernetes;
    let namespace = kubernetes.namespace.as_str();
    check_object(lookup, LookupKind::ServiceAccount, namespace, &kubernetes.serviceaccount).await?;
    if let Some(secret) = &kubernetes.secret {
        let stored = check_object(lookup, LookupKind::Secret, namespace, secret).await?;
        if claims.is_legacy() {
            let text = secret_data(&stored, "token").unwrap_or_default();
            if !same_secret(&text, token.as_bytes()) || stored.pointer("/metadata/deletionTimestamp").is_some() {
                return refuse("service account token does not match its secret");
            }
        }
    }
    match (&kubernetes.pod, &kubernetes.node) {
        (Some(pod), _) => check_object(lookup, LookupKind::Pod, namespace, pod).await.map(drop),
        (None, Some(node)) => check_object(lookup, LookupKind::Node, "", node).await.map(drop),
        (None, None) => Ok(()),
    }
}

async fn check_object(lookup: &dyn ObjectLookup, kind: LookupKind, namespace: &str, wanted: &ObjectRef) -> Result<Value, AuthnError> {
    let found = lookup.get(kind, namespace, &wanted.name).await.map_err(AuthnError::Unauthorized)?;
    let what = || format!("{} {namespace}/{}", kind.resource(), wanted.name);
    let Some(object) = found else { return refuse(format!("service account token has been invalidated: no {}", what())) };
    let uid = object.pointer("/metadata/uid").and_then(Value::as_str).unwrap_or_default();
    // Legacy tokens name their secret without a uid.
    if !wanted.uid.is_empty() && uid != wanted.uid {
        return refuse(format!("{}: UID ({uid}) does not match claim ({})", what(), wanted.uid));
    }
    let deleted = object.pointer("/metadata/deletionTimestamp").and_then(Value::as_str).and_then(|text| text.parse::<Timestamp>().ok());
    if deleted.is_some_and(|at| at.as_second() < Timestamp::now().as_second() - DELETION_LEEWAY) {
        return refuse(format!("service account token has been invalidated: {} has been deleted", what()));
    }
    Ok(object)
}

fn user_of(claims: &Claims) -> UserInfo {
    let kubernetes = &claims.kubernetes;
    let groups = [GROUP_SERVICE_ACCOUNTS.to_owned(), format!("{GROUP_SERVICE_ACCOUNTS}:{}", kubernetes.namespace)];
    let mut user = UserInfo::new(claims.sub.as_str(), groups);
    user.uid.clone_from(&kubernetes.serviceaccount.uid);
    let mut extra = |key: &str, value: &str| {
        if !value.is_empty() {
            user.extra.insert(key.to_owned(), vec![value.to_owned()]);
        }
    };
    if let Some(pod) = &kubernetes.pod {
        extra(EXTRA_POD_NAME, &pod.name);
        extra(EXTRA_POD_UID, &pod.uid);
    }
    if let Some(node) = &kubernetes.node {
        extra(EXTRA_NODE_NAME, &node.name);
        extra(EXTRA_NODE_UID, &node.uid);
    }
    if !claims.jti.is_empty() {
        extra(EXTRA_CREDENTIAL_ID, &format!("JTI={}", claims.jti));
    }
    user
}

fn secret_data(secret: &Value, key: &str) -> Option<Vec<u8>> {
    STANDARD.decode(secret.get("data")?.get(key)?.as_str()?).ok()
}

/// A token `id.secret` of a Secret `bootstrap-token-id`; `None` if it's none or not good.
pub(super) async fn bootstrap_user(lookup: &dyn ObjectLookup, token: &str) -> Result<Option<UserInfo>, AuthnError> {
    let is_part = |text: &str, length| text.len() == length && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let Some((id, secret)) = token.split_once('.').filter(|(id, secret)| is_part(id, 6) && is_part(secret, 16)) else {
        return Ok(None);
    };
    let name = format!("bootstrap-token-{id}");
    let Some(stored) = lookup.get(LookupKind::Secret, BOOTSTRAP_NAMESPACE, &name).await.map_err(AuthnError::Unauthorized)? else {
        return Ok(None);
    };
    match bootstrap_groups(&stored, id, secret) {
        Ok(groups) => Ok(Some(UserInfo::new(format!("{BOOTSTRAP_USER_PREFIX}{id}"), groups))),
        Err(reason) => {
            tracing::debug!(secret = %name, reason, "a bootstrap token was refused");
            Ok(None)
        }
    }
}

fn bootstrap_groups(stored: &Value, id: &str, secret: &str) -> Result<BTreeSet<String>, &'static str> {
    if stored.pointer("/metadata/deletionTimestamp").is_some() {
        return Err("it is deleted and awaiting removal");
    }
    if stored.get("type").and_then(Value::as_str) != Some("bootstrap.kubernetes.io/token") {
        return Err("its type is another");
    }
    let text = |key| secret_data(stored, key).and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default();
    if !same_secret(text("token-secret").as_bytes(), secret.as_bytes()) {
        return Err("token-secret differs");
    }
    if text("token-id") != id {
        return Err("token-id differs");
    }
    let expiration = text("expiration");
    if !expiration.is_empty() && !expiration.parse::<Timestamp>().is_ok_and(|at| at > Timestamp::now()) {
        return Err("it expired");
    }
    if text("usage-bootstrap-authentication") != "true" {
        return Err("it isn't marked usage-bootstrap-authentication");
    }
    let mut groups = BTreeSet::from([GROUP_BOOTSTRAPPERS.to_owned()]);
    let extra = text("auth-extra-groups");
    for group in extra.split(',').filter(|group| !group.is_empty()) {
        if !is_bootstrap_group(group) {
            return Err("auth-extra-groups names a group outside of system:bootstrappers:");
        }
        groups.insert(group.to_owned());
    }
    Ok(groups)
}

fn is_bootstrap_group(group: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    group.strip_prefix("system:bootstrappers:").is_some_and(|rest| {
        rest.len() <= 256
            && rest.bytes().all(|byte| is_plain(byte) || byte == b':' || byte == b'-')
            && rest.bytes().next_back().is_some_and(is_plain)
    })
}
