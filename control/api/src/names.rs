//! The formats of names, labels, keys and ports. Every check returns upstream's messages, none when the text is fine.
use std::sync::LazyLock;

use regex::Regex;

const LABEL: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
const SUBDOMAIN: &str = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*";
const LABEL_1035: &str = "[a-z]([-a-z0-9]*[a-z0-9])?";
const QUALIFIED: &str = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]";
const LABEL_VALUE: &str = "(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?";
const C_IDENTIFIER: &str = "[A-Za-z_][A-Za-z0-9_]*";
const CONFIG_KEY: &str = "[-._a-zA-Z0-9]+";
const PERCENT: &str = "[0-9]+%";
const HTTP_HEADER: &str = "[-A-Za-z0-9]+";
const WILDCARD: &str = r"\*\.[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*";

const QUALIFIED_MESSAGE: &str =
    "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character";
const SUBDOMAIN_MESSAGE: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character";

macro_rules! pattern {
    ($name:ident, $text:expr) => {
        static $name: LazyLock<Regex> =
            LazyLock::new(|| Regex::new(&format!("^(?:{})$", $text)).expect("a constant pattern, compiled by the tests"));
    };
}
pattern!(LABEL_PATTERN, LABEL);
pattern!(SUBDOMAIN_PATTERN, SUBDOMAIN);
pattern!(LABEL_1035_PATTERN, LABEL_1035);
pattern!(QUALIFIED_PATTERN, QUALIFIED);
pattern!(C_IDENTIFIER_PATTERN, C_IDENTIFIER);
pattern!(CONFIG_KEY_PATTERN, CONFIG_KEY);
pattern!(HTTP_HEADER_PATTERN, HTTP_HEADER);
pattern!(WILDCARD_PATTERN, WILDCARD);

/// `message (e.g. 'a',  or 'b', regex used for validation is '…')`
fn regex_message(message: &str, pattern: &str, examples: &[&str]) -> String {
    if examples.is_empty() {
        return format!("{message} (regex used for validation is '{pattern}')");
    }
    let quoted: Vec<String> = examples.iter().map(|example| format!("'{example}', ")).collect();
    format!("{message} (e.g. {}regex used for validation is '{pattern}')", quoted.join(" or "))
}

fn too_long(bytes: usize) -> String {
    format!("must be no more than {bytes} bytes")
}

/// Older checks count "characters" in their message, though they too count bytes.
fn too_long_characters(bytes: usize) -> String {
    format!("must be no more than {bytes} characters")
}

/// RFC 1123 label: namespaces, container names, volume names.
pub fn dns_label(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if value.len() > 63 {
        errors.push(too_long_characters(63));
    }
    if !LABEL_PATTERN.is_match(value) {
        if SUBDOMAIN_PATTERN.is_match(value) {
            errors.push("must not contain dots".into());
        } else {
            let message = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character";
            errors.push(regex_message(message, LABEL, &["my-name", "123-abc"]));
        }
    }
    errors
}

/// RFC 1123 subdomain: most object names.
pub fn dns_subdomain(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if value.len() > 253 {
        errors.push(too_long_characters(253));
    }
    if !SUBDOMAIN_PATTERN.is_match(value) {
        errors.push(regex_message(SUBDOMAIN_MESSAGE, SUBDOMAIN, &["example.com"]));
    }
    errors
}

/// RFC 1035 label: services, port names of some kinds.
pub fn dns_1035_label(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if value.len() > 63 {
        errors.push(too_long_characters(63));
    }
    if !LABEL_1035_PATTERN.is_match(value) {
        let message = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character";
        errors.push(regex_message(message, LABEL_1035, &["my-name", "abc-123"]));
    }
    errors
}

/// `*.example.com`
pub fn wildcard_subdomain(value: &str) -> Vec<String> {
    if WILDCARD_PATTERN.is_match(value) {
        return Vec::new();
    }
    let message = "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain, which must consist of lower case alphanumeric characters, '-' or '.' and end with an alphanumeric character";
    vec![regex_message(message, WILDCARD, &["*.example.com"])]
}

/// Label keys, finalizers, condition types: `prefix/name`.
pub fn qualified_name(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    let name = match value.split('/').collect::<Vec<_>>().as_slice() {
        [name] => *name,
        [prefix, name] => {
            if prefix.is_empty() {
                errors.push("prefix part must be non-empty".into());
            } else {
                let mut found = Vec::new();
                if prefix.len() > 253 {
                    found.push(too_long(253));
                }
                if !SUBDOMAIN_PATTERN.is_match(prefix) {
                    found.push(regex_message(SUBDOMAIN_MESSAGE, SUBDOMAIN, &["example.com"]));
                }
                errors.extend(found.into_iter().map(|message| format!("prefix part {message}")));
            }
            *name
        }
        _ => {
            let message = regex_message(QUALIFIED_MESSAGE, QUALIFIED, &["MyName", "my.name", "123-abc"]);
            return vec![format!("a valid label key {message} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')")];
        }
    };
    if name.is_empty() {
        errors.push("name part must be non-empty".into());
    } else if name.len() > 63 {
        errors.push(format!("name part {}", too_long(63)));
    }
    if !QUALIFIED_PATTERN.is_match(name) {
        errors.push(format!("name part {}", regex_message(QUALIFIED_MESSAGE, QUALIFIED, &["MyName", "my.name", "123-abc"])));
    }
    errors
}

pub fn label_value(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if value.len() > 63 {
        errors.push(too_long(63));
    }
    if !value.is_empty() && !QUALIFIED_PATTERN.is_match(value) {
        let message = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character";
        errors.push(regex_message(message, LABEL_VALUE, &["MyValue", "my_value", "12345"]));
    }
    errors
}

pub fn c_identifier(value: &str) -> Vec<String> {
    if C_IDENTIFIER_PATTERN.is_match(value) {
        return Vec::new();
    }
    let message =
        "a valid C identifier must start with alphabetic character or '_', followed by a string of alphanumeric characters or '_'";
    vec![regex_message(message, C_IDENTIFIER, &["my_name", "MY_NAME", "MyName"])]
}

/// Environment variable names: any printable ASCII but `=`.
pub fn env_name(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if value.is_empty() {
        errors.push("environment variable name must be non-empty".into());
    }
    if value.chars().any(|letter| !(' '..='~').contains(&letter) || letter == '=') {
        errors.push("a valid environment variable name must consist only of printable ASCII characters other than '='".into());
    }
    errors
}

/// Keys of ConfigMaps and Secrets.
pub fn config_key(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if value.len() > 253 {
        errors.push(too_long_characters(253));
    }
    if !CONFIG_KEY_PATTERN.is_match(value) {
        let message = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'";
        errors.push(regex_message(message, CONFIG_KEY, &["key.name", "KEY_NAME", "key-name"]));
    }
    if value == "." || value == ".." {
        errors.push(format!("must not be '{value}'"));
    } else if value.starts_with("..") {
        errors.push("must not start with '..'".into());
    }
    errors
}

pub fn port_number(value: i64) -> Vec<String> {
    in_range(value, 1, 65535)
}

pub fn in_range(value: i64, low: i64, high: i64) -> Vec<String> {
    if (low..=high).contains(&value) { Vec::new() } else { vec![format!("must be between {low} and {high}, inclusive")] }
}

/// IANA service names: named ports of containers and probes.
pub fn port_name(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if value.len() > 15 {
        errors.push(too_long_characters(15));
    }
    if value.is_empty() || value.bytes().any(|byte| !(byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')) {
        errors.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".into());
    }
    if !value.bytes().any(|byte| byte.is_ascii_lowercase()) {
        errors.push("must contain at least one letter (a-z)".into());
    }
    if value.contains("--") {
        errors.push("must not contain consecutive hyphens".into());
    }
    if value.starts_with('-') || value.ends_with('-') {
        errors.push("must not begin or end with a hyphen".into());
    }
    errors
}

pub fn percent(value: &str) -> Vec<String> {
    let digits = value.strip_suffix('%').unwrap_or_default();
    if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Vec::new();
    }
    vec![regex_message("a valid percent string must be a numeric string followed by an ending '%'", PERCENT, &["1%", "93%"])]
}

pub fn http_header(value: &str) -> Vec<String> {
    if HTTP_HEADER_PATTERN.is_match(value) {
        return Vec::new();
    }
    vec![regex_message("a valid HTTP header must consist of alphanumeric characters or '-'", HTTP_HEADER, &["X-Header-Name"])]
}

/// Names that only have to fit a URL: RBAC kinds.
pub fn path_segment(value: &str) -> Vec<String> {
    if value == "." || value == ".." {
        return vec![format!("may not be '{value}'")];
    }
    ["/", "%"].into_iter().filter(|symbol| value.contains(symbol)).map(|symbol| format!("may not contain '{symbol}'")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    type Check = fn(&str) -> Vec<String>;

    #[test]
    fn good_names_pass_and_bad_ones_do_not() {
        let long = "a".repeat(64);
        let cases: [(Check, &[&str], &[&str]); 10] = [
            (dns_label, &["a", "a-1", "1"], &["", "A", "-a", "a.b", "a_b", &long]),
            (dns_subdomain, &["a", "a.b-c.d"], &["", ".a", "a..b", "A"]),
            (dns_1035_label, &["a1"], &["1a", "a-", ""]),
            (qualified_name, &["a", "A.b_c", "x.io/Name"], &["", "/a", "a/", "a/b/c", "X/a", &long]),
            (label_value, &["", "a", "A_1.b"], &["-a", "a b", &long]),
            (env_name, &["A", "a.b-c", "1A"], &["", "A=B", "é"]),
            (config_key, &["a.b", "..a".trim_start_matches('.')], &["", ".", "..", "..a", "a b"]),
            (port_name, &["http", "a-1"], &["", "A", "1", "a--b", "-a", "abcdefghijklmnop"]),
            (percent, &["1%", "100%"], &["%", "1", "a%"]),
            (path_segment, &["system:x", "a b"], &[".", "..", "a/b", "a%"]),
        ];
        for (check, good, bad) in cases {
            for value in good {
                assert_eq!(check(value), Vec::<String>::new(), "{value:?}");
            }
            for value in bad {
                assert!(!check(value).is_empty(), "{value:?}");
            }
        }
        assert!(wildcard_subdomain("*.a.b").is_empty() && !wildcard_subdomain("a.b").is_empty());
        assert!(c_identifier("_a1").is_empty() && !c_identifier("1a").is_empty());
        assert!(http_header("X-A").is_empty() && !http_header("X A").is_empty());
    }

    #[test]
    fn messages_are_upstreams() {
        assert_eq!(
            dns_label("A"),
            [
                "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
            ]
        );
        assert_eq!(in_range(0, 1, 65535), ["must be between 1 and 65535, inclusive"]);
    }
}
