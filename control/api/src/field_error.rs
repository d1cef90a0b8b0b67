//! One finding of validation, rendered as upstream's field errors are.
use serde_json::{Value, json};

/// The kinds of finding; `reason` and the text before the detail follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldErrorKind {
    Required,
    Duplicate,
    Invalid,
    TypeInvalid,
    NotSupported,
    Forbidden,
    TooLong,
    TooMany,
    NotFound,
    Internal,
}

/// Where, what and why. `value` is shown for the kinds that show one.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    pub kind: FieldErrorKind,
    /// `spec.containers[0].name`
    pub field: String,
    pub value: Value,
    pub detail: String,
}

impl FieldError {
    pub fn new(kind: FieldErrorKind, field: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> FieldError {
        FieldError { kind, field: field.into(), value: value.into(), detail: detail.into() }
    }

    pub fn required(field: impl Into<String>, detail: impl Into<String>) -> FieldError {
        FieldError::new(FieldErrorKind::Required, field, Value::Null, detail)
    }

    pub fn invalid(field: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> FieldError {
        FieldError::new(FieldErrorKind::Invalid, field, value, detail)
    }

    pub fn type_invalid(field: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> FieldError {
        FieldError::new(FieldErrorKind::TypeInvalid, field, value, detail)
    }

    pub fn duplicate(field: impl Into<String>, value: impl Into<Value>) -> FieldError {
        FieldError::new(FieldErrorKind::Duplicate, field, value, "")
    }

    pub fn forbidden(field: impl Into<String>, detail: impl Into<String>) -> FieldError {
        FieldError::new(FieldErrorKind::Forbidden, field, Value::Null, detail)
    }

    pub fn not_found(field: impl Into<String>, value: impl Into<Value>) -> FieldError {
        FieldError::new(FieldErrorKind::NotFound, field, value, "")
    }

    pub fn too_long(field: impl Into<String>, max_bytes: usize) -> FieldError {
        FieldError::new(FieldErrorKind::TooLong, field, Value::Null, format!("may not be more than {max_bytes} bytes"))
    }

    pub fn too_many(field: impl Into<String>, actual: usize, max_items: usize) -> FieldError {
        FieldError::new(FieldErrorKind::TooMany, field, actual, format!("must have at most {max_items} items"))
    }

    /// `supported` are shown in the given order, quoted.
    pub fn not_supported(field: impl Into<String>, value: impl Into<Value>, supported: &[&str]) -> FieldError {
        let quoted: Vec<String> = supported.iter().map(|word| format!("\"{word}\"")).collect();
        FieldError::new(FieldErrorKind::NotSupported, field, value, format!("supported values: {}", quoted.join(", ")))
    }

    /// The cause's machine-readable reason.
    pub fn reason(&self) -> &'static str {
        match self.kind {
            FieldErrorKind::Required => "FieldValueRequired",
            FieldErrorKind::Duplicate => "FieldValueDuplicate",
            FieldErrorKind::Invalid => "FieldValueInvalid",
            FieldErrorKind::TypeInvalid => "FieldValueTypeInvalid",
            FieldErrorKind::NotSupported => "FieldValueNotSupported",
            FieldErrorKind::Forbidden => "FieldValueForbidden",
            FieldErrorKind::TooLong => "FieldValueTooLong",
            FieldErrorKind::TooMany => "FieldValueTooMany",
            FieldErrorKind::NotFound => "FieldValueNotFound",
            FieldErrorKind::Internal => "InternalError",
        }
    }

    fn label(&self) -> &'static str {
        match self.kind {
            FieldErrorKind::Required => "Required value",
            FieldErrorKind::Duplicate => "Duplicate value",
            FieldErrorKind::Invalid | FieldErrorKind::TypeInvalid => "Invalid value",
            FieldErrorKind::NotSupported => "Unsupported value",
            FieldErrorKind::Forbidden => "Forbidden",
            FieldErrorKind::TooLong => "Too long",
            FieldErrorKind::TooMany => "Too many",
            FieldErrorKind::NotFound => "Not found",
            FieldErrorKind::Internal => "Internal error",
        }
    }

    /// The text without the field: `Invalid value: "x": must be …`.
    pub fn body(&self) -> String {
        let label = self.label();
        let shown = match self.kind {
            FieldErrorKind::Required | FieldErrorKind::Forbidden | FieldErrorKind::TooLong | FieldErrorKind::Internal => label.to_string(),
            _ => format!("{label}: {}", show_value(&self.value)),
        };
        if self.detail.is_empty() { shown } else { format!("{shown}: {}", self.detail) }
    }

    /// An entry of `status.details.causes`.
    pub fn cause(&self) -> Value {
        json!({"reason": self.reason(), "message": self.body(), "field": self.field})
    }
}

impl std::fmt::Display for FieldError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.field.is_empty() { write!(formatter, "{}", self.body()) } else { write!(formatter, "{}: {}", self.field, self.body()) }
    }
}

/// Strings are quoted as Go quotes them, objects are shown as JSON.
fn show_value(value: &Value) -> String {
    match value {
        Value::String(text) => format!("{text:?}"),
        Value::Null => "null".to_string(),
        other => other.to_string(),
    }
}

/// One finding alone, several as `[a, b]`: how a Status' message shows them.
pub fn aggregate(errors: &[FieldError]) -> String {
    let mut texts: Vec<String> = Vec::with_capacity(errors.len());
    for error in errors {
        let text = error.to_string();
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    match texts.as_slice() {
        [only] => only.clone(),
        _ => format!("[{}]", texts.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_read_as_upstream_writes_them() {
        for (error, expected) in [
            (FieldError::required("spec.containers[0].name", ""), "spec.containers[0].name: Required value"),
            (FieldError::invalid("a", "x y", "must be z"), "a: Invalid value: \"x y\": must be z"),
            (FieldError::invalid("a", -1, "must be greater"), "a: Invalid value: -1: must be greater"),
            (FieldError::not_supported("p", "x", &["A", "B"]), "p: Unsupported value: \"x\": supported values: \"A\", \"B\""),
            (FieldError::duplicate("p", "x"), "p: Duplicate value: \"x\""),
            (FieldError::forbidden("p", "no"), "p: Forbidden: no"),
            (FieldError::too_long("p", 63), "p: Too long: may not be more than 63 bytes"),
            (FieldError::too_many("p", 3, 2), "p: Too many: 3: must have at most 2 items"),
            (FieldError::not_found("p", "v"), "p: Not found: \"v\""),
        ] {
            assert_eq!(error.to_string(), expected);
        }
        let both = [FieldError::required("a", ""), FieldError::required("b", ""), FieldError::required("b", "")];
        assert_eq!(aggregate(&both), "[a: Required value, b: Required value]");
    }
}
