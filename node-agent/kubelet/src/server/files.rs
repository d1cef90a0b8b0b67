//! `/logs/`: the node's log folder, read-only.
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio_stream::StreamExt;
use tokio_util::io::ReaderStream;

use super::{Body, answer, text};

pub async fn serve(root: &Path, segments: &[&str], has_slash: bool) -> Response<Body> {
    let Some(path) = resolve(root, segments) else { return text(StatusCode::BAD_REQUEST, "invalid URL path\n") };
    let metadata = match tokio::fs::metadata(&path).await {
        Ok(metadata) => metadata,
        Err(_) => return text(StatusCode::NOT_FOUND, "404 page not found\n"),
    };
    if !metadata.is_dir() {
        return file(&path).await;
    }
    if !has_slash {
        let mut response = text(StatusCode::MOVED_PERMANENTLY, "");
        let last = segments.last().copied().unwrap_or("logs");
        if let Ok(location) = header::HeaderValue::from_str(&format!("{last}/")) {
            response.headers_mut().insert(header::LOCATION, location);
        }
        return response;
    }
    listing(&path).await
}

/// `None` for names that would leave the folder.
fn resolve(root: &Path, segments: &[&str]) -> Option<PathBuf> {
    let mut path = root.to_owned();
    for segment in segments {
        let name: String = form_urlencoded::parse(format!("x={}", segment.replace('+', "%2B")).as_bytes()).next()?.1.into_owned();
        match Path::new(&name).components().collect::<Vec<_>>().as_slice() {
            [Component::Normal(name)] => path.push(name),
            [] => {}
            _ => return None,
        }
    }
    Some(path)
}

async fn file(path: &Path) -> Response<Body> {
    let file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(error) => return text(StatusCode::FORBIDDEN, format!("{error}\n")),
    };
    let stream = ReaderStream::new(file).map(|piece| piece.map(Frame::<Bytes>::data));
    let mut response = Response::new(StreamBody::new(stream).boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

async fn listing(path: &Path) -> Response<Body> {
    let mut names = Vec::new();
    match tokio::fs::read_dir(path).await {
        Ok(mut entries) => {
            while let Ok(Some(entry)) = entries.next_entry().await {
                let slash = if entry.file_type().await.is_ok_and(|kind| kind.is_dir()) { "/" } else { "" };
                names.push(format!("{}{slash}", entry.file_name().to_string_lossy()));
            }
        }
        Err(error) => return text(StatusCode::FORBIDDEN, format!("{error}\n")),
    }
    names.sort();
    let escape = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;");
    let link = |name: &String| {
        format!(
            "<a href=\"{}\">{}</a>\n",
            form_urlencoded::byte_serialize(name.as_bytes()).collect::<String>().replace('+', "%20").replace("%2F", "/"),
            escape(name)
        )
    };
    let page = format!(
        "<!doctype html>\n<meta name=\"viewport\" content=\"width=device-width\">\n<pre>\n{}</pre>\n",
        names.iter().map(link).collect::<String>()
    );
    answer(StatusCode::OK, "text/html; charset=utf-8", page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_the_folder_is_named() {
        let cases: [(&[&str], Option<&str>); 6] = [
            (&["syslog"], Some("/var/log/syslog")),
            (&["pods", "a%20b+c"], Some("/var/log/pods/a b+c")),
            (&[], Some("/var/log")),
            (&["..", "shadow"], None),
            (&["%2e%2e"], None),
            (&["a%2F..%2F..%2Fshadow"], None),
        ];
        for (segments, expected) in cases {
            assert_eq!(resolve(Path::new("/var/log"), segments), expected.map(PathBuf::from), "{segments:?}");
        }
    }
}
