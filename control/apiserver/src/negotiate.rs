//! Content types: what a client wants back, and how the body it sent is to be read.

use bytes::Bytes;
use http::HeaderMap;
use http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE};
use outrigger_api::Status;
use outrigger_api::types::{Notes, Tracking};
use serde::de::DeserializeSeed;
use serde_json::Value;

pub const JSON: &str = "application/json";
pub const YAML: &str = "application/yaml";
pub const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
pub const SUPPORTED: &[&str] = &[JSON, YAML, PROTOBUF];

/// Nodes and bytes of text that a YAML document's aliases may add to it.
const ALIASED: usize = 400_000;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    #[default]
    Json,
    Yaml,
    /// Only for those who accept nothing else: the caches hold JSON.
    Protobuf,
}

/// What the objects of an answer are turned into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    #[default]
    Plain,
    /// `metav1.Table`
    Table,
    /// `metav1.PartialObjectMetadata`, for one object or a list's items
    Metadata,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accept {
    pub encoding: Encoding,
    pub form: Form,
    pub gzip: bool,
}

/// One media type of an Accept header with its parameters.
pub struct MediaType<'a> {
    pub name: &'a str,
    params: Vec<(&'a str, &'a str)>,
}

impl<'a> MediaType<'a> {
    pub fn parse(text: &'a str) -> Self {
        let mut parts = text.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        Self { name, params: parts.filter_map(|p| p.split_once('=')).map(|(k, v)| (k.trim(), v.trim().trim_matches('"'))).collect() }
    }

    pub fn param(&self, key: &str) -> Option<&'a str> {
        self.params.iter().find(|(k, _)| *k == key).map(|(_, v)| *v)
    }

    fn quality(&self) -> f32 {
        self.param("q").and_then(|q| q.parse().ok()).unwrap_or(1.0)
    }
}

/// The header's media types, best first (equal ones in the order given).
pub fn media_types(header: &str) -> Vec<MediaType<'_>> {
    let mut types: Vec<_> = header.split(',').map(str::trim).filter(|t| !t.is_empty()).map(MediaType::parse).collect();
    types.sort_by(|a, b| b.quality().total_cmp(&a.quality()));
    types
}

pub fn header_text<'a>(headers: &'a HeaderMap, name: &http::HeaderName) -> &'a str {
    headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
}

/// The first form and encoding of the Accept header that can be made. `forms` is false where only plain objects are answered.
pub fn accept(headers: &HeaderMap, forms: bool) -> Result<Accept, Status> {
    let gzip = header_text(headers, &ACCEPT_ENCODING).split(',').any(|e| e.trim().split(';').next() == Some("gzip"));
    let header = headers.get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok()).collect::<Vec<_>>().join(",");
    if header.trim().is_empty() {
        return Ok(Accept { gzip, ..Default::default() });
    }
    let types = media_types(&header);
    let mut protobuf = None;
    for media in types {
        let encoding = match media.name {
            "application/json" | "*/*" | "application/*" => Encoding::Json,
            "application/yaml" => Encoding::Yaml,
            PROTOBUF => Encoding::Protobuf,
            _ => continue,
        };
        let form = match media.param("as") {
            None => Form::Plain,
            Some(_) if !forms => continue,
            Some(_) if media.param("g").is_some_and(|g| g != "meta.k8s.io") => continue,
            Some("Table") => Form::Table,
            Some("PartialObjectMetadata" | "PartialObjectMetadataList") => Form::Metadata,
            Some(_) => continue,
        };
        let accept = Accept { encoding, form, gzip };
        if encoding != Encoding::Protobuf {
            return Ok(accept);
        }
        if form == Form::Plain {
            protobuf.get_or_insert(accept);
        }
    }
    protobuf.ok_or_else(|| Status::not_acceptable(SUPPORTED))
}

/// The body as a JSON value; the text is returned too when it was JSON, for duplicate-field checks.
pub fn decode_body(headers: &HeaderMap, body: &Bytes) -> Result<Value, Status> {
    match MediaType::parse(header_text(headers, &CONTENT_TYPE)).name {
        "" | "application/json" | "*/*" => decode_json(body),
        "application/yaml" => decode_yaml(body),
        PROTOBUF => crate::protobuf::decode(body).map_err(|error| Status::bad_request(error.to_string())),
        other => Err(Status::unsupported_media_type(other, SUPPORTED)),
    }
}

pub fn decode_json(body: &[u8]) -> Result<Value, Status> {
    serde_json::from_slice(body).map_err(|error| Status::bad_request(format!("couldn't get version/kind; json parse error: {error}")))
}

pub fn decode_yaml(body: &[u8]) -> Result<Value, Status> {
    decode_yaml_strictly(body).map(|(value, _)| value)
}

/// YAML, and its duplicate fields as upstream's strict YAML reader reports them: in one finding, with their lines.
pub fn decode_yaml_strictly(body: &[u8]) -> Result<(Value, Vec<String>), Status> {
    // Text without aliases makes no more than this of itself; aliases may add as much as upstream lets a small document have.
    let mut notes = Notes::locating(body.len().saturating_mul(4).saturating_add(ALIASED));
    let value = Tracking::new(&mut notes)
        .deserialize(serde_yaml_ng::Deserializer::from_slice(body))
        .map_err(|error| Status::bad_request(format!("error converting YAML to JSON: {error}")))?;
    let places = notes.repeated.iter().filter_map(|(key, error)| {
        let line = error.rsplit_once(" at line ")?.1.split(' ').next()?;
        Some(format!("\n  line {line}: key {key:?} already set in map"))
    });
    let places: String = places.collect();
    let findings = (!places.is_empty()).then(|| format!("yaml: unmarshal errors:{places}"));
    Ok((value, findings.into_iter().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Accept, Status> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, text.parse().unwrap());
        accept(&headers, true)
    }

    #[test]
    fn the_first_possible_form_is_taken() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(of(kubectl).unwrap().form, Form::Table);
        assert_eq!(of("application/vnd.kubernetes.protobuf,application/json").unwrap().form, Form::Plain);
        assert_eq!(of("application/vnd.kubernetes.protobuf").unwrap().encoding, Encoding::Protobuf);
        assert_eq!(of("application/vnd.kubernetes.protobuf, */*").unwrap().encoding, Encoding::Json);
        assert_eq!(of("application/yaml").unwrap().encoding, Encoding::Yaml);
        assert_eq!(of("application/json;q=0.1, application/yaml").unwrap().encoding, Encoding::Yaml);
        assert_eq!(of("application/json;as=Nonsense;v=v1;g=meta.k8s.io").unwrap_err().code, 406);
        let metadata = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json";
        assert_eq!(of(metadata).unwrap().form, Form::Metadata);
    }
    #[test]
    fn duplicate_yaml_keys_are_found_with_their_lines() {
        let (value, findings) = decode_yaml_strictly(b"\na: 1\nspec:\n  foo: x\n  foo: y\na: 2\n").unwrap();
        assert_eq!(value, serde_json::json!({"a": 2, "spec": {"foo": "y"}}));
        let expected = "yaml: unmarshal errors:\n  line 5: key \"foo\" already set in map\n  line 6: key \"a\" already set in map";
        assert_eq!(findings, [expected]);
        assert_eq!(decode_yaml_strictly(b"a: 1\n").unwrap().1, Vec::<String>::new());
    }
    #[test]
    fn yaml_aliases_cannot_fill_the_memory() {
        assert_eq!(decode_yaml(b"a: &x [1, two]\nb: *x\n").unwrap(), serde_json::json!({"a": [1, "two"], "b": [1, "two"]}));
        let tens = |name: &str| [name; 10].join(", ");
        let mut bomb = format!("a0: &a0 [{}]\n", tens("x"));
        for level in 1..8 {
            bomb.push_str(&format!("a{level}: &a{level} [{}]\n", tens(&format!("*a{}", level - 1))));
        }
        assert_eq!(decode_yaml(bomb.as_bytes()).unwrap_err().code, 400);
        let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(100_000), tens("*a"));
        assert_eq!(decode_yaml(long.as_bytes()).unwrap_err().code, 400);
    }
}
