//! The string formats that schemas may ask for. Unknown ones are not checked, as upstream does not.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whether the text has the format; true for formats that are not known.
pub(super) fn has_format(format: &str, text: &str) -> bool {
    match format {
        "date-time" | "datetime" => is_date_time(text),
        "date" => text.parse::<jiff::civil::Date>().is_ok() && text.len() == 10,
        "ipv4" => text.parse::<Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<Ipv6Addr>().is_ok(),
        "cidr" => is_cidr(text),
        "mac" => is_mac(text),
        "uuid" | "uuid3" | "uuid4" | "uuid5" => is_uuid(format, text),
        "byte" => {
            use base64::Engine as _;
            base64::engine::general_purpose::STANDARD.decode(text).is_ok()
        }
        "hostname" => text.len() <= 253 && text.split('.').all(|label| crate::names::dns_label(&label.to_lowercase()).is_empty()),
        "email" => text.split_once('@').is_some_and(|(user, host)| !user.is_empty() && !host.is_empty() && !host.contains('@')),
        "uri" => {
            text.split_once(':').is_some_and(|(scheme, _)| scheme.starts_with(|letter: char| letter.is_ascii_alphabetic()))
                || text.starts_with('/')
        }
        "duration" => is_duration(text),
        _ => true,
    }
}

fn is_date_time(text: &str) -> bool {
    text.contains(['T', 't']) && crate::time::parse(&text.to_uppercase()).is_some()
}

fn is_cidr(text: &str) -> bool {
    let Some((address, length)) = text.split_once('/') else { return false };
    match (address.parse::<IpAddr>(), length.parse::<u8>()) {
        (Ok(address), Ok(length)) => length <= if address.is_ipv4() { 32 } else { 128 },
        _ => false,
    }
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split([':', '-']).collect();
    matches!(parts.len(), 6 | 8 | 20) && parts.iter().all(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// With or without dashes; the digit after the second dash is the version.
fn is_uuid(format: &str, text: &str) -> bool {
    let digits: String = text.chars().filter(|letter| *letter != '-').collect();
    let version = format.strip_prefix("uuid").filter(|version| !version.is_empty());
    digits.len() == 32
        && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
        && version.is_none_or(|version| digits.get(12..13) == Some(version))
}

/// Go's spelling, such as `1h30m` or `1.5s`.
fn is_duration(text: &str) -> bool {
    let mut rest = text.strip_prefix(['-', '+']).unwrap_or(text);
    if rest == "0" {
        return true;
    }
    let mut parts = 0;
    while !rest.is_empty() {
        let number = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(rest.len());
        let (digits, after) = rest.split_at(number);
        let unit = ["ns", "us", "µs", "ms", "s", "m", "h", "d", "w"]
            .into_iter()
            .filter(|unit| after.trim_start().starts_with(unit))
            .max_by_key(|unit| unit.len());
        let Some(unit) = unit.filter(|_| !digits.is_empty()) else { return false };
        rest = after.trim_start()[unit.len()..].trim_start();
        parts += 1;
    }
    parts > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_recognized() {
        for (format, good, bad) in [
            ("date-time", "2024-01-01T00:00:00Z", "2024-01-01"),
            ("date", "2024-01-01", "2024-13-01"),
            ("ipv4", "10.0.0.1", "::1"),
            ("ipv6", "::1", "10.0.0.1"),
            ("cidr", "10.0.0.0/8", "10.0.0.0/40"),
            ("mac", "01:23:45:67:89:ab", "01:23"),
            ("uuid", "00000000-0000-4000-8000-000000000000", "0000"),
            ("uuid4", "00000000-0000-4000-8000-000000000000", "00000000-0000-3000-8000-000000000000"),
            ("byte", "YQ==", "?"),
            ("hostname", "a.example", "a_b"),
            ("email", "a@b", "a"),
            ("uri", "https://a", "a b"),
            ("duration", "1h30m", "1x"),
        ] {
            assert!(has_format(format, good), "{format} {good}");
            assert!(!has_format(format, bad), "{format} {bad}");
        }
        assert!(has_format("whatever", "x"));
    }
}
