//! The `Impersonate-*` headers: whom a request wants to be, and what must be allowed before.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderValue};

use super::AuthnError;
use crate::attributes::Attributes;
use crate::user::{ANONYMOUS, GROUP_AUTHENTICATED, GROUP_SERVICE_ACCOUNTS, GROUP_UNAUTHENTICATED, UserInfo, split_service_account};

const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
const UID: &str = "impersonate-uid";
const EXTRA: &str = "impersonate-extra-";

/// One permission that an impersonation needs (verb `impersonate`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImpersonationCheck {
    pub api_group: &'static str,
    pub resource: &'static str,
    pub subresource: String,
    pub namespace: String,
    pub name: String,
}

impl ImpersonationCheck {
    fn new(api_group: &'static str, resource: &'static str, name: impl Into<String>) -> Self {
        Self { api_group, resource, subresource: String::new(), namespace: String::new(), name: name.into() }
    }

    /// What to ask the authorizer about `requestor`.
    pub fn attributes<'a>(&'a self, requestor: &'a UserInfo) -> Attributes<'a> {
        Attributes {
            api_version: if self.api_group.is_empty() { "" } else { "v1" },
            namespace: &self.namespace,
            subresource: &self.subresource,
            name: &self.name,
            ..Attributes::resource(requestor, "impersonate", self.api_group, self.resource)
        }
    }
}

/// The user to become and what must be allowed (verb `impersonate`) before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Impersonation {
    pub user: UserInfo,
    pub checks: Vec<ImpersonationCheck>,
}

/// Header values are UTF-8 by convention; anything else is shown lossily.
pub(super) fn header_text(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
}

/// The key of an extra header, %-decoded if it can be.
pub(super) fn extra_key(encoded: &str) -> String {
    let lower = encoded.to_ascii_lowercase();
    let mut bytes = Vec::with_capacity(lower.len());
    let mut rest = lower.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|byte| (byte as char).to_digit(16));
        let (Some(high), Some(low)) = (digit(rest.next()), digit(rest.next())) else { return lower };
        bytes.push((high * 16 + low) as u8);
    }
    String::from_utf8(bytes).unwrap_or(lower)
}

/// Reads the `Impersonate-*` headers; `None` if there are none.
pub fn parse_impersonation(headers: &HeaderMap) -> Result<Option<Impersonation>, AuthnError> {
    let name = headers.get(USER).map(header_text).unwrap_or_default();
    let uid = headers.get(UID).map(header_text).unwrap_or_default();
    let mut groups: Vec<String> = headers.get_all(GROUP).iter().map(header_text).collect();
    let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (header, value) in headers {
        if let Some(key) = header.as_str().strip_prefix(EXTRA) {
            extra.entry(extra_key(key)).or_default().push(header_text(value));
        }
    }
    if name.is_empty() {
        if groups.is_empty() && extra.is_empty() && uid.is_empty() {
            return Ok(None);
        }
        return Err(AuthnError::BadRequest("requested groups, extra or uid without impersonating a user".to_owned()));
    }
    let mut checks = Vec::new();
    match split_service_account(&name) {
        Some((namespace, account)) => {
            checks.push(ImpersonationCheck { namespace: namespace.to_owned(), ..ImpersonationCheck::new("", "serviceaccounts", account) });
        }
        None => checks.push(ImpersonationCheck::new("", "users", name.as_str())),
    }
    checks.extend(groups.iter().map(|group| ImpersonationCheck::new("", "groups", group.as_str())));
    for (key, values) in &extra {
        checks.extend(values.iter().map(|value| ImpersonationCheck {
            subresource: key.clone(),
            ..ImpersonationCheck::new("authentication.k8s.io", "userextras", value.as_str())
        }));
    }
    if !uid.is_empty() {
        checks.push(ImpersonationCheck::new("authentication.k8s.io", "uids", uid.as_str()));
    }
    complete_groups(&name, &mut groups);
    Ok(Some(Impersonation { user: UserInfo { name, uid, groups, extra }, checks }))
}

/// The groups that follow from the name, where none were asked for.
fn complete_groups(name: &str, groups: &mut Vec<String>) {
    if let Some((namespace, _)) = split_service_account(name)
        && groups.is_empty()
    {
        groups.extend([GROUP_SERVICE_ACCOUNTS.to_owned(), format!("{GROUP_SERVICE_ACCOUNTS}:{namespace}")]);
    }
    let has = |group: &str| groups.iter().any(|own| own == group);
    if name == ANONYMOUS {
        if !has(GROUP_UNAUTHENTICATED) {
            groups.push(GROUP_UNAUTHENTICATED.to_owned());
        }
    } else if !has(GROUP_AUTHENTICATED) && !has(GROUP_UNAUTHENTICATED) {
        groups.push(GROUP_AUTHENTICATED.to_owned());
    }
}

/// Takes the headers away once they are applied, so that nothing behind sees them.
pub fn strip_impersonation(headers: &mut HeaderMap) {
    let names: Vec<_> =
        headers.keys().filter(|name| [USER, GROUP, UID].contains(&name.as_str()) || name.as_str().starts_with(EXTRA)).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}
