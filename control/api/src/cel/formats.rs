//! Named formats: `format.dns1123Label().validate(name)`.
use outrigger_cel::{Error, Library, Opaque, Value};

use crate::names;

#[derive(Clone, Copy, Debug)]
struct Format {
    name: &'static str,
    check: fn(&str) -> Vec<String>,
}

impl Opaque for Format {
    fn type_name(&self) -> &'static str {
        "kubernetes.NamedFormat"
    }

    fn equals(&self, other: &dyn Opaque) -> bool {
        other.downcast::<Format>().is_some_and(|other| other.name == self.name)
    }
}

fn uri(text: &str) -> Vec<String> {
    let known = text.starts_with('/') || text.split_once(':').is_some_and(|(scheme, _)| !scheme.is_empty());
    if known { Vec::new() } else { vec!["invalid URI for request".into()] }
}

fn uuid(text: &str) -> Vec<String> {
    let groups: Vec<&str> = text.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    let hex = groups.iter().all(|group| group.bytes().all(|byte| byte.is_ascii_hexdigit()));
    if hex && (lengths == [8, 4, 4, 4, 12] || lengths == [32]) { Vec::new() } else { vec!["does not match the UUID format".into()] }
}

fn byte(text: &str) -> Vec<String> {
    use base64::Engine as _;
    let decoded = base64::engine::general_purpose::STANDARD.decode(text);
    decoded.err().map(|error| format!("invalid base64: {error}")).into_iter().collect()
}

fn date(text: &str) -> Vec<String> {
    if text.parse::<jiff::civil::Date>().is_ok() { Vec::new() } else { vec!["invalid date".into()] }
}

fn date_time(text: &str) -> Vec<String> {
    if text.parse::<jiff::Timestamp>().is_ok() { Vec::new() } else { vec!["invalid datetime".into()] }
}

/// A prefix of a name: what is generated gets more characters.
fn prefix(text: &str, check: fn(&str) -> Vec<String>) -> Vec<String> {
    check(text.strip_suffix('-').filter(|rest| !rest.is_empty()).unwrap_or(text))
}

const ALL: &[Format] = &[
    Format { name: "dns1123Label", check: names::dns_label },
    Format { name: "dns1123Subdomain", check: names::dns_subdomain },
    Format { name: "dns1035Label", check: names::dns_1035_label },
    Format { name: "qualifiedName", check: names::qualified_name },
    Format { name: "dns1123LabelPrefix", check: |text| prefix(text, names::dns_label) },
    Format { name: "dns1123SubdomainPrefix", check: |text| prefix(text, names::dns_subdomain) },
    Format { name: "dns1035LabelPrefix", check: |text| prefix(text, names::dns_1035_label) },
    Format { name: "labelValue", check: names::label_value },
    Format { name: "uri", check: uri },
    Format { name: "uuid", check: uuid },
    Format { name: "byte", check: byte },
    Format { name: "date", check: date },
    Format { name: "datetime", check: date_time },
];

fn named(name: &str) -> Option<Value> {
    ALL.iter().find(|format| format.name == name).map(|format| Value::opaque(*format))
}

fn known(name: &str) -> Result<Value, Error> {
    named(name).ok_or_else(Error::no_overload)
}

pub const FORMATS: Library = &[
    ("format.named(string) -> optional(kubernetes.NamedFormat)", |a| Ok(named(a[0].as_str().unwrap_or_default()).into())),
    ("format.dns1123Label() -> kubernetes.NamedFormat", |_| known("dns1123Label")),
    ("format.dns1123Subdomain() -> kubernetes.NamedFormat", |_| known("dns1123Subdomain")),
    ("format.dns1035Label() -> kubernetes.NamedFormat", |_| known("dns1035Label")),
    ("format.qualifiedName() -> kubernetes.NamedFormat", |_| known("qualifiedName")),
    ("format.dns1123LabelPrefix() -> kubernetes.NamedFormat", |_| known("dns1123LabelPrefix")),
    ("format.dns1123SubdomainPrefix() -> kubernetes.NamedFormat", |_| known("dns1123SubdomainPrefix")),
    ("format.dns1035LabelPrefix() -> kubernetes.NamedFormat", |_| known("dns1035LabelPrefix")),
    ("format.labelValue() -> kubernetes.NamedFormat", |_| known("labelValue")),
    ("format.uri() -> kubernetes.NamedFormat", |_| known("uri")),
    ("format.uuid() -> kubernetes.NamedFormat", |_| known("uuid")),
    ("format.byte() -> kubernetes.NamedFormat", |_| known("byte")),
    ("format.date() -> kubernetes.NamedFormat", |_| known("date")),
    ("format.datetime() -> kubernetes.NamedFormat", |_| known("datetime")),
    ("kubernetes.NamedFormat.validate(string) -> optional(list(string))", |a| {
        let format = a[0].downcast::<Format>().ok_or_else(Error::no_overload)?;
        let found: Vec<Value> = (format.check)(a[1].as_str().unwrap_or_default()).into_iter().map(Value::from).collect();
        Ok(if found.is_empty() { None } else { Some(Value::from(found)) }.into())
    }),
];
