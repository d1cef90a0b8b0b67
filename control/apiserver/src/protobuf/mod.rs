//! Kubernetes' protobuf content type, without generated code: a table of field numbers drives both directions between the wire and JSON.
//!
//! The envelope is `k8s\0` and a `runtime.Unknown` with the object's type and bytes.

mod decode;
mod encode;
mod table;
pub mod wire;

use outrigger_api::meta;
use serde_json::Value;

pub use table::Message;

const MAGIC: &[u8] = b"k8s\0";
/// Each message is up to two levels of JSON, whose readers stop at 128.
const MAX_DEPTH: usize = 60;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtobufError {
    #[error("provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]")]
    NoEnvelope,
    #[error("{0}")]
    Wire(&'static str),
    #[error("no protobuf form is known of {0}")]
    UnknownKind(String),
    #[error("field {0} does not fit its protobuf type")]
    Mismatch(String),
    #[error("exceeded max depth")]
    TooDeep,
}

/// An enveloped object as JSON, with its apiVersion and kind.
pub fn decode(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let body = bytes.strip_prefix(MAGIC).ok_or(ProtobufError::NoEnvelope)?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    for field in wire::fields(body) {
        match field? {
            (1, wire::Data::Bytes(type_meta)) => {
                for field in wire::fields(type_meta) {
                    match field? {
                        (1, wire::Data::Bytes(text)) => api_version = String::from_utf8_lossy(text).into_owned(),
                        (2, wire::Data::Bytes(text)) => kind = String::from_utf8_lossy(text).into_owned(),
                        _ => {}
                    }
                }
            }
            (2, wire::Data::Bytes(inner)) => raw = inner,
            _ => {}
        }
    }
    let message = table::of_kind(&api_version, &kind).ok_or_else(|| ProtobufError::UnknownKind(format!("{api_version} {kind}")))?;
    let mut object = decode::message(message, raw, MAX_DEPTH)?;
    if meta::deeper_than(&object, meta::MAX_DEPTH) {
        return Err(ProtobufError::TooDeep);
    }
    if !api_version.is_empty() {
        meta::set_type(&mut object, &api_version, &kind);
    }
    Ok(object)
}

/// An object (its apiVersion and kind say which) in its envelope.
pub fn encode(object: &Value) -> Result<Vec<u8>, ProtobufError> {
    let (api_version, kind) = (meta::api_version(object), meta::kind(object));
    let message = table::of_kind(api_version, kind).ok_or_else(|| ProtobufError::UnknownKind(format!("{api_version} {kind}")))?;
    let mut type_meta = Vec::new();
    wire::put_bytes(&mut type_meta, 1, api_version.as_bytes());
    wire::put_bytes(&mut type_meta, 2, kind.as_bytes());
    let mut out = MAGIC.to_vec();
    wire::put_bytes(&mut out, 1, &type_meta);
    wire::put_bytes(&mut out, 2, &encode::message(message, object)?);
    wire::put_bytes(&mut out, 3, b"");
    wire::put_bytes(&mut out, 4, b"");
    Ok(out)
}

/// Whether objects of this kind have a protobuf form.
pub fn knows(api_version: &str, kind: &str) -> bool {
    table::of_kind(api_version, kind).is_some()
}

/// One event of a watch as a length-delimited frame.
pub fn watch_frame(kind: &str, object: &Value) -> Result<Vec<u8>, ProtobufError> {
    let mut extension = Vec::new();
    wire::put_bytes(&mut extension, 1, &encode(object)?);
    let mut event = Vec::new();
    wire::put_bytes(&mut event, 1, kind.as_bytes());
    wire::put_bytes(&mut event, 2, &extension);
    let mut frame = u32::try_from(event.len()).map_err(|_| ProtobufError::Wire("event too large"))?.to_be_bytes().to_vec();
    frame.extend(event);
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn objects_come_back_as_they_were() {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "p", "labels": {"a": "b"}, "creationTimestamp": "2024-01-02T03:04:05Z", "generation": 2},
            "spec": {
                "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Gi"}}, {"name": "s", "secret": {"secretName": "x", "defaultMode": 420}}],
                "containers": [{
                    "name": "c", "image": "i", "args": ["a", ""],
                    "env": [{"name": "E", "valueFrom": {"secretKeyRef": {"name": "n", "key": "k"}}}],
                    "livenessProbe": {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 3},
                    "readinessProbe": {"tcpSocket": {"port": 80}},
                    "resources": {"limits": {"cpu": "100m"}},
                }],
                "terminationGracePeriodSeconds": 0, "hostNetwork": true,
            },
        });
        assert_eq!(decode(&encode(&pod).unwrap()).unwrap(), pod);
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"k": "AAEC"}, "type": "Opaque"});
        assert_eq!(decode(&encode(&secret).unwrap()).unwrap(), secret);
        let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "r"}, "rules": [{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}]});
        assert_eq!(decode(&encode(&role).unwrap()).unwrap(), role);
        let definition = json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "r"},
            "spec": {"group": "g", "names": {"plural": "p", "kind": "K"}, "scope": "Namespaced", "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object", "x-kubernetes-preserve-unknown-fields": true,
                "properties": {"a": {"type": "array", "items": {"type": "string", "default": "x"}, "additionalProperties": false}},
            }}}]},
        });
        assert_eq!(decode(&encode(&definition).unwrap()).unwrap(), definition);
    }

    #[test]
    fn fields_whose_protobuf_names_are_written_otherwise_are_found() {
        for object in [
            json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration", "metadata": {"name": "w"},
                "webhooks": [{"name": "a.b.c", "clientConfig": {"url": "https://x"}, "admissionReviewVersions": ["v1"]}]}),
            json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy", "metadata": {"name": "p"},
                "spec": {"validations": [{"expression": "true"}], "variables": [{"name": "v", "expression": "1"}]}}),
            json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "metadata": {"name": "t"},
                "spec": {"audiences": [], "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "p", "uid": "u"}}}),
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "IngressClass", "metadata": {"name": "i"},
                "spec": {"controller": "c", "parameters": {"apiGroup": "g", "kind": "K", "name": "n"}}}),
        ] {
            let back = decode(&encode(&object).unwrap()).unwrap();
            let kept = |path: &str| assert_eq!(back.pointer(path), object.pointer(path), "{path} of {}", object["kind"]);
            ["/webhooks", "/spec/validations", "/spec/variables", "/spec/boundObjectRef", "/spec/parameters"].into_iter().for_each(kept);
        }
    }

    #[test]
    fn depth_is_limited() {
        let nested = |levels| {
            let schema = (0..levels).fold(json!({"type": "string"}), |inner, _| json!({"type": "array", "items": inner}));
            json!({
                "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "r"},
                "spec": {"group": "g", "names": {"plural": "p", "kind": "K"}, "scope": "Namespaced",
                    "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}]},
            })
        };
        assert!(decode(&encode(&nested(MAX_DEPTH / 2)).unwrap()).is_ok());
        assert_eq!(decode(&encode(&nested(MAX_DEPTH)).unwrap()), Err(ProtobufError::TooDeep));
    }

    #[test]
    fn foreign_bytes_are_refused() {
        assert_eq!(decode(b"{}"), Err(ProtobufError::NoEnvelope));
        assert!(decode(b"k8s\0\xff\xff").is_err());
    }

    #[test]
    fn every_reference_of_the_table_resolves() {
        assert_eq!(table::unresolved(), Vec::<String>::new());
    }
}
