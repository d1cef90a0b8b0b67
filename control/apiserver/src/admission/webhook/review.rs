//! The AdmissionReview that a webhook is sent, and what its answer says.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use outrigger_api::{Status, meta};
use serde_json::{Value, json};

/// The versions of the review that are spoken.
pub const VERSIONS: &[&str] = &["v1", "v1beta1"];

pub const UNKNOWN_VERSIONS: &str = "webhook does not accept known AdmissionReview versions (v1, v1beta1)";

/// The whole review.
pub fn review(version: &str, uid: &str, mut request: Value, object: Value, old: Value) -> Value {
    request["uid"] = uid.into();
    request["object"] = object;
    request["oldObject"] = old;
    json!({"kind": "AdmissionReview", "apiVersion": format!("admission.k8s.io/{version}"), "request": request})
}

/// A well-formed answer.
#[derive(Debug, Default, PartialEq)]
pub struct Answer {
    pub allowed: bool,
    /// `metav1.Status` with which it was refused.
    pub result: Value,
    /// JSON patch operations.
    pub patch: Option<Value>,
    pub warnings: Vec<String>,
}

/// Reads an answer to the review `uid`; the error says what is wrong with it.
pub fn answer(version: &str, uid: &str, mutating: bool, review: &Value) -> Result<Answer, String> {
    let response = &review["response"];
    if !response.is_object() {
        return Err("webhook response was absent".into());
    }
    if version == "v1" {
        let said = meta::text(response, "uid");
        if said != uid {
            return Err(format!("expected response.uid={uid:?}, got {said:?}"));
        }
        if (meta::api_version(review), meta::kind(review)) != ("admission.k8s.io/v1", "AdmissionReview") {
            let (api_version, kind) = (meta::api_version(review), meta::kind(review));
            return Err(format!("expected webhook response of admission.k8s.io/v1, Kind=AdmissionReview, got {api_version}, Kind={kind}"));
        }
    }
    let (patch, kind) = (meta::text(response, "patch"), response["patchType"].as_str());
    check_patch(version, mutating, patch, kind)?;
    let patch = (mutating && !patch.is_empty()).then(|| decode_patch(patch)).transpose()?;
    Ok(Answer {
        allowed: response["allowed"] == true,
        result: response["status"].clone(),
        patch,
        warnings: meta::items(response, "warnings").iter().filter_map(|text| text.as_str().map(String::from)).collect(),
    })
}

fn check_patch(version: &str, mutating: bool, patch: &str, kind: Option<&str>) -> Result<(), String> {
    if version != "v1" {
        return Ok(());
    }
    let wrong = match (mutating, patch.is_empty(), kind) {
        (true, false, None) => "webhook returned response.patch but not response.patchType",
        (true, true, Some(_)) => "webhook returned response.patchType but not response.patch",
        (true, _, Some("")) => "webhook returned invalid response.patchType of \"\"",
        (false, false, _) => "validating webhook may not return response.patch",
        (false, _, Some(_)) => "validating webhook may not return response.patchType",
        (_, _, Some(kind)) if kind != "JSONPatch" => return Err(format!("unsupported patch type {kind:?}")),
        _ => return Ok(()),
    };
    Err(wrong.into())
}

fn decode_patch(text: &str) -> Result<Value, String> {
    let undecodable = |error: String| format!("received undecodable patch in webhook response: {error}");
    let bytes = STANDARD.decode(text).map_err(|error| undecodable(error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| undecodable(error.to_string()))
}

/// The status of a refusal: the webhook's own, made a failure and with its name.
pub fn refusal(webhook: &str, result: &Value) -> Status {
    let code = result["code"].as_u64().and_then(|code| u16::try_from(code).ok()).filter(|code| *code >= 400).unwrap_or(400);
    let (message, reason) = (meta::text(result, "message"), meta::text(result, "reason"));
    let denied = format!("admission webhook {webhook:?} denied the request");
    let message = match (message, reason) {
        ("", "") => format!("{denied} without explanation"),
        ("", reason) => format!("{denied}: {reason}"),
        (message, _) => format!("{denied}: {message}"),
    };
    let mut status = Status::new(code, reason.to_string(), message);
    status.details = Some(result["details"].clone()).filter(Value::is_object);
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reviewed(response: Value) -> Value {
        json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "response": response})
    }

    #[test]
    fn answers_are_read_or_refused() {
        let patch = STANDARD.encode(r#"[{"op": "remove", "path": "/a"}]"#);
        let good = reviewed(json!({"uid": "u", "allowed": true, "patchType": "JSONPatch", "patch": patch, "warnings": ["w"]}));
        let read = answer("v1", "u", true, &good).unwrap();
        assert_eq!(read.patch, Some(json!([{"op": "remove", "path": "/a"}])));
        assert_eq!((read.allowed, read.warnings), (true, vec!["w".to_string()]));
        for (mutating, response, error) in [
            (true, json!({"uid": "x"}), "expected response.uid=\"u\", got \"x\""),
            (true, json!({"uid": "u", "patch": patch}), "webhook returned response.patch but not response.patchType"),
            (true, json!({"uid": "u", "patchType": "JSONPatch"}), "webhook returned response.patchType but not response.patch"),
            (false, json!({"uid": "u", "patch": patch}), "validating webhook may not return response.patch"),
            (true, json!({"uid": "u", "patchType": "Other", "patch": patch}), "unsupported patch type \"Other\""),
            (true, json!(null), "webhook response was absent"),
        ] {
            assert_eq!(answer("v1", "u", mutating, &reviewed(response)), Err(error.to_string()));
        }
        // v1beta1 was never this strict.
        assert!(answer("v1beta1", "u", true, &json!({"response": {"allowed": true, "patch": patch}})).unwrap().patch.is_some());
    }

    #[test]
    fn refusals_carry_the_webhooks_words() {
        let told = |result: Value| {
            let status = refusal("a.b.c", &result);
            (status.code, status.reason.to_string(), status.message)
        };
        let denied = "admission webhook \"a.b.c\" denied the request";
        assert_eq!(told(json!(null)), (400, String::new(), format!("{denied} without explanation")));
        assert_eq!(told(json!({"code": 200, "reason": "Because"})), (400, "Because".into(), format!("{denied}: Because")));
        assert_eq!(told(json!({"code": 403, "message": "no"})), (403, String::new(), format!("{denied}: no")));
    }
}
