//! One request passed on to an aggregated server.

use http::header::{HeaderMap, HeaderName, HeaderValue};
use outrigger_access::UserInfo;
use outrigger_api::Status;

use super::Remote;
use crate::body::{Request, Response};
use crate::engine::Engine;
use crate::proxy::forward::{Target, endpoint, forward};
use crate::reply;

const PREFIX: &str = "x-remote-";

/// Sends the request to the remote server in the user's name.
pub async fn pass_on(engine: &Engine, remote: &Remote, user: &UserInfo, request: Request) -> Result<Response, Status> {
    if !remote.available {
        return Ok(reply::text(503, "service unavailable\n"));
    }
    send(engine, remote, user, request).await
}

/// The same, whatever is known of the server's availability.
pub async fn send(engine: &Engine, remote: &Remote, user: &UserInfo, mut request: Request) -> Result<Response, Status> {
    let tls = remote.tls.clone().map_err(Status::service_unavailable)?;
    let (host, port) = endpoint(engine, &remote.namespace, &remote.service, &remote.port.to_string())?;
    let server_name = Some(format!("{}.{}.svc", remote.service, remote.namespace));
    let target = Target { host, port, tls: Some(tls), server_name };
    let path = request.uri().path_and_query().map_or_else(|| "/".to_string(), |path| path.to_string());
    name_user(request.headers_mut(), user);
    forward(request, &target, &path).await
}

/// Says who the caller is, instead of what the caller said.
fn name_user(headers: &mut HeaderMap, user: &UserInfo) {
    let told: Vec<HeaderName> = headers.keys().filter(|name| name.as_str().starts_with(PREFIX)).cloned().collect();
    for name in told {
        headers.remove(name);
    }
    let mut add = |name: String, value: &str| {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_str(value)) {
            headers.append(name, value);
        }
    };
    add(format!("{PREFIX}user"), &user.name);
    if !user.uid.is_empty() {
        add(format!("{PREFIX}uid"), &user.uid);
    }
    for group in &user.groups {
        add(format!("{PREFIX}group"), group);
    }
    for (key, values) in &user.extra {
        for value in values {
            add(format!("{PREFIX}extra-{}", escaped(key)), value);
        }
    }
}

/// A key as a header's name may have it: what may not stand there is percent-encoded.
fn escaped(key: &str) -> String {
    let mut out = String::new();
    for byte in key.to_ascii_lowercase().bytes() {
        match byte {
            b'a'..=b'z'
            | b'0'..=b'9'
            | b'!'
            | b'#'
            | b'$'
            | b'&'
            | b'\''
            | b'*'
            | b'+'
            | b'-'
            | b'.'
            | b'^'
            | b'_'
            | b'`'
            | b'|'
            | b'~' => {
                out.push(byte as char);
            }
            byte => out.push_str(&format!("%{byte:02x}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caller_cannot_say_who_it_is() {
        let mut headers = HeaderMap::new();
        headers.insert("x-remote-user", HeaderValue::from_static("root"));
        headers.insert("x-remote-extra-a", HeaderValue::from_static("b"));
        let mut user = UserInfo::new("me", ["g1", "g2"]);
        user.extra.insert("Example.org/Key".into(), vec!["v".into()]);
        name_user(&mut headers, &user);
        let mut shown: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        shown.sort();
        let expected =
            [("x-remote-extra-example.org%2fkey", "v"), ("x-remote-group", "g1"), ("x-remote-group", "g2"), ("x-remote-user", "me")];
        assert_eq!(shown, expected);
    }
}
