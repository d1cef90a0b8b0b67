//! Links and redirects as they come out of the proxy.

use super::*;

fn mount() -> Mount {
    Mount { prefix: "/api/v1/namespaces/n/pods/https:p:443/proxy".into(), backend: "10.0.0.7:443".into(), host: "api:6443".into() }
}

#[test]
fn urls_are_led_through_the_prefix() {
    let cases = [
        ("/", Some("{}/")),
        ("/a/b/", Some("{}/a/b/")),
        ("/a/../b//c?d=/e#f", Some("{}/b/c?d=/e#f")),
        ("//10.0.0.7:443/a", Some("{}/a")),
        ("https://10.0.0.7:443/a?b", Some("{}/a?b")),
        ("https://u@10.0.0.7:443/a", Some("{}/a")),
        // A name that the client itself asks for stays.
        ("https://api:6443/a", Some("https://api:6443{}/a")),
        // Led already, relative, without a path, of another host.
        ("/api/v1/namespaces/n/pods/https:p:443/proxy/a", None),
        ("", None),
        ("a/b", None),
        ("?a=/b", None),
        ("#/a", None),
        ("https://10.0.0.7:443", None),
        ("mailto:a@b", None),
        ("//example.com/a", None),
        ("https://example.com:443/a", None),
        ("https://10.0.0.7/a", None),
    ];
    for (url, expected) in cases {
        let mount = mount();
        assert_eq!(mount.url(url), expected.map(|url| url.replace("{}", &mount.prefix)), "{url}");
    }
}

#[test]
fn pages_change_in_their_links_alone() {
    let cases = [
        (r#"<a href="/x">test</a>"#, r#"<a href="{}/x">test</a>"#),
        (r#"<A HREF='/x?a&amp;b="c' id=1>/x</A>"#, r#"<A HREF='{}/x?a&amp;b=&#34;c' id=1>/x</A>"#),
        ("<a href=/x>1</a><img src = /y alt=/z/>", r#"<a href="{}/x">1</a><img src = "{}/y" alt=/z/>"#),
        ("<form\r\n action=\"/x\"\r\n><input formaction='/y'\r\n>", "<form\r\n action=\"{}/x\"\r\n><input formaction='{}/y'\r\n>"),
        ("<script src='/s'>'<a href=\"/x\">'</script><a href=\"/y\">", "<script src='{}/s'>'<a href=\"/x\">'</script><a href=\"{}/y\">"),
        ("<!-- <a href='/x'> --><p href='/x' title='/x'></a href='/x'>", "<!-- <a href='/x'> --><p href='/x' title='/x'></a href='/x'>"),
        (
            "\u{e9}<a href='/\u{e9}'>&eacute;<a href='y'><a href><a href='/x",
            "\u{e9}<a href='{}/\u{e9}'>&eacute;<a href='y'><a href><a href='/x",
        ),
        ("", ""),
    ];
    for (page, expected) in cases {
        let mount = mount();
        assert_eq!(String::from_utf8(mount.page(page.as_bytes())).unwrap(), expected.replace("{}", &mount.prefix), "{page}");
    }
}

#[test]
fn bytes_that_are_no_text_stay() {
    assert_eq!(mount().page(b"\xff<a href='/\xff'>\xff"), b"\xff<a href='/\xff'>\xff");
}

fn answer(headers: &[(&str, &str)], body: Bytes) -> Response {
    headers.iter().fold(http::Response::builder(), |builder, (name, value)| builder.header(*name, *value)).body(full(body)).unwrap()
}

async fn led(headers: &[(&str, &str)], body: &[u8]) -> (HeaderMap, Vec<u8>) {
    let (parts, body) = mount().response(answer(headers, Bytes::copy_from_slice(body))).await.unwrap().into_parts();
    (parts.headers, body.collect().await.unwrap().to_bytes().to_vec())
}

#[tokio::test]
async fn answers_are_rewritten_by_their_kind_and_coding() {
    let (page, prefix) = (b"<a href='/x'>".as_slice(), mount().prefix);
    let expected = format!("<a href='{prefix}/x'>").into_bytes();
    let html = ("content-type", "text/html; charset=utf-8");
    for (name, coding) in [("", Coding::Identity), ("gzip", Coding::Gzip), ("deflate", Coding::Deflate)] {
        let sent = coding.encode(page.to_vec());
        let length = sent.len().to_string();
        let (headers, body) = led(&[html, ("content-encoding", name), ("content-length", length.as_str())], &sent).await;
        assert_eq!((coding.decode(&body).unwrap(), headers.get(CONTENT_LENGTH)), (expected.clone(), None), "{name}");
    }
    assert_eq!(led(&[html, ("content-encoding", "br")], page).await.1, page);
    assert_eq!(led(&[("content-type", "text/plain")], page).await.1, page);
    let (headers, body) = led(&[html, ("location", "/y"), ("access-control-allow-origin", "*")], page).await;
    assert_eq!((headers[LOCATION].to_str().unwrap(), body.as_slice()), (format!("{prefix}/y").as_str(), page));
    assert_eq!(headers.get(ACCESS_CONTROL_ALLOW_ORIGIN), None);
    // The answer to HEAD tells of a body that it doesn't have.
    assert_eq!(led(&[html, ("content-length", "13")], b"").await.0[CONTENT_LENGTH], "13");
    assert_eq!(mount().response(answer(&[html, ("content-encoding", "gzip")], "no gzip".into())).await.err().map(|e| e.code), Some(503));
}

#[test]
fn the_backend_learns_the_outer_path() {
    for (path, expected) in [("", ""), ("/", "/"), ("/a//b/", "/a/b/"), ("/a%20b", "/a%20b")] {
        let (mount, mut headers) = (mount(), HeaderMap::new());
        mount.announce(&mut headers, path);
        assert_eq!(headers["x-forwarded-uri"].to_str().unwrap(), format!("{}{expected}", mount.prefix));
    }
}
