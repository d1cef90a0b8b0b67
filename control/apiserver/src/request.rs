//! What a request asks for: verb, resource, name and options, read from its method, path and query as upstream's RequestInfo does.

use std::collections::BTreeMap;

use http::Method;

/// The path's and the query's meaning. Empty strings stand for "not given", as in upstream's attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestInfo {
    pub is_resource: bool,
    pub path: String,
    /// get, list, watch, create, update, patch, delete, deletecollection; for other paths the lower case method.
    pub verb: String,
    /// "api" or "apis"
    pub prefix: String,
    pub group: String,
    pub version: String,
    pub namespace: String,
    pub resource: String,
    pub subresource: String,
    pub name: String,
    /// Everything after the version, with the subresource's own trailing path.
    pub parts: Vec<String>,
}

impl RequestInfo {
    /// The path behind a subresource (`.../pods/p/proxy/a/b` gives "a/b"), as sent on by the proxies.
    pub fn trailing(&self) -> String {
        let skip = if self.namespace.is_empty() || self.resource == "namespaces" { 3 } else { 5 };
        self.parts.get(skip..).map(|p| p.join("/")).unwrap_or_default()
    }

    pub fn group_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }
}

/// The query's parameters; a repeated one keeps all its values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query(BTreeMap<String, Vec<String>>);

impl Query {
    pub fn parse(query: Option<&str>) -> Self {
        let mut map: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for pair in query.unwrap_or_default().split('&').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            map.entry(decode(key, true)).or_default().push(decode(value, true));
        }
        Self(map)
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|v| v.first()).map(String::as_str)
    }

    pub fn text(&self, key: &str) -> &str {
        self.get(key).unwrap_or_default()
    }

    pub fn all(&self, key: &str) -> &[String] {
        self.0.get(key).map(Vec::as_slice).unwrap_or_default()
    }

    /// A flag as upstream's conversion reads it: present means true, except for "false" and "0".
    pub fn flag(&self, key: &str) -> bool {
        self.get(key).is_some_and(|v| !matches!(v, "false" | "0" | "False" | "FALSE" | "f" | "F"))
    }

    pub fn number(&self, key: &str) -> Option<i64> {
        self.get(key).and_then(|v| v.parse().ok())
    }
}

/// Percent decoding; `plus` turns '+' into a space, as query strings have it.
pub fn decode(text: &str, plus: bool) -> String {
    if !text.bytes().any(|b| b == b'%' || (plus && b == b'+')) {
        return text.to_string();
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        match bytes[i] {
            b'%' => match text.get(i + 1..i + 3).and_then(|h| u8::from_str_radix(h, 16).ok()) {
                Some(byte) => {
                    out.push(byte);
                    i += 2;
                }
                None => out.push(b'%'),
            },
            b'+' if plus => out.push(b' '),
            byte => out.push(byte),
        }
        i += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Percent encoding of one query value or path segment.
pub fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

pub fn request_info(method: &Method, path: &str, query: &Query) -> RequestInfo {
    let mut info = RequestInfo { path: path.to_string(), verb: method.as_str().to_ascii_lowercase(), ..Default::default() };
    let mut parts: Vec<String> = path.split('/').filter(|p| !p.is_empty()).map(|p| decode(p, false)).collect();
    if parts.len() < 3 || !matches!(parts[0].as_str(), "api" | "apis") {
        return info;
    }
    info.prefix = parts.remove(0);
    if info.prefix == "apis" {
        if parts.len() < 3 {
            return info;
        }
        info.group = parts.remove(0);
    }
    info.is_resource = true;
    info.version = parts.remove(0);
    info.verb = match *method {
        Method::POST => "create",
        Method::GET | Method::HEAD => "get",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "",
    }
    .into();
    if parts[0] == "watch" && parts.len() > 1 {
        info.verb = "watch".into();
        parts.remove(0);
    }
    locate(&mut info, parts);
    if info.name.is_empty() && info.verb == "get" {
        info.verb = if query.flag("watch") { "watch" } else { "list" }.into();
    }
    if info.name.is_empty() && info.verb == "delete" {
        info.verb = "deletecollection".into();
    }
    if matches!(info.verb.as_str(), "list" | "watch" | "deletecollection")
        && info.name.is_empty()
        && let Some(name) = single_name(query.text("fieldSelector"))
    {
        info.name = name;
    }
    info
}

fn locate(info: &mut RequestInfo, parts: Vec<String>) {
    info.parts = parts.clone();
    let mut rest = parts.as_slice();
    if rest[0] == "namespaces" && rest.len() > 1 {
        info.namespace = rest[1].clone();
        // namespaces/NAME/status and /finalize belong to the Namespace itself
        if rest.len() > 2 && !matches!(rest[2].as_str(), "status" | "finalize") {
            rest = &rest[2..];
        }
    }
    info.resource = rest[0].clone();
    info.name = rest.get(1).cloned().unwrap_or_default();
    info.subresource = rest.get(2).cloned().unwrap_or_default();
}

/// The name that a field selector of the form `metadata.name=X` pins, so that a list of one can be authorized by name.
fn single_name(selector: &str) -> Option<String> {
    selector.split(',').find_map(|term| {
        let (key, value) = term.split_once('=')?;
        (key == "metadata.name").then(|| value.trim_start_matches('=').to_string()).filter(|v| !v.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(method: Method, target: &str) -> RequestInfo {
        let (path, query) = target.split_once('?').map_or((target, None), |(p, q)| (p, Some(q)));
        request_info(&method, path, &Query::parse(query))
    }

    #[test]
    fn paths_are_read_as_upstream_reads_them() {
        let cases = [
            (Method::GET, "/api/v1/namespaces", "list", "", "", "namespaces", "", ""),
            (Method::GET, "/api/v1/namespaces/other", "get", "", "other", "namespaces", "", "other"),
            (Method::PUT, "/api/v1/namespaces/other/finalize", "update", "", "other", "namespaces", "finalize", "other"),
            (Method::GET, "/api/v1/namespaces/other/pods", "list", "", "other", "pods", "", ""),
            (Method::GET, "/api/v1/namespaces/other/pods/foo/log", "get", "", "other", "pods", "log", "foo"),
            (Method::GET, "/api/v1/pods?watch=1", "watch", "", "", "pods", "", ""),
            (Method::GET, "/api/v1/watch/namespaces/other/pods", "watch", "", "other", "pods", "", ""),
            (Method::DELETE, "/apis/apps/v1/namespaces/a/deployments", "deletecollection", "apps", "a", "deployments", "", ""),
            (Method::GET, "/apis/apps/v1/deployments?fieldSelector=metadata.name%3Dx", "list", "apps", "", "deployments", "", "x"),
        ];
        for (method, target, verb, group, namespace, resource, subresource, name) in cases {
            let got = info(method, target);
            assert!(got.is_resource, "{target}");
            assert_eq!(
                (&*got.verb, &*got.group, &*got.namespace, &*got.resource, &*got.subresource, &*got.name),
                (verb, group, namespace, resource, subresource, name),
                "{target}"
            );
        }
        for target in ["/api", "/api/v1", "/apis/apps", "/apis/apps/v1", "/version", "/"] {
            assert!(!info(Method::GET, target).is_resource, "{target}");
        }
    }

    #[test]
    fn a_proxy_path_keeps_its_tail() {
        assert_eq!(info(Method::GET, "/api/v1/namespaces/a/services/s/proxy/x/y").trailing(), "x/y");
        assert_eq!(info(Method::GET, "/api/v1/nodes/n/proxy/metrics/cadvisor").trailing(), "metrics/cadvisor");
        assert_eq!(info(Method::GET, "/api/v1/nodes/n/proxy").trailing(), "");
    }

    #[test]
    fn queries_decode() {
        let query = Query::parse(Some("a=1%2C2&b&a=x+y&watch=false"));
        assert_eq!(query.all("a"), ["1,2", "x y"]);
        assert!(query.flag("b"));
        assert!(!query.flag("watch"));
    }
}
