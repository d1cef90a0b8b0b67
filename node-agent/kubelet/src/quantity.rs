//! Kubernetes quantities ("100m", "64Mi", "1e3") as exact integers.
use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// A resource list as the API has it.
pub type Resources = BTreeMap<String, Quantity>;

const NANO: i128 = 1_000_000_000;

/// In units of 10^-9; `None` when the text is no quantity.
pub fn nano(text: &str) -> Option<i128> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '+' || c == '-')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let (negative, digits) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
    let (scale, exponent) = scale(suffix)?;
    let exponent = exponent + 9 - i32::try_from(fraction.len()).ok()?;
    let value = mantissa.checked_mul(scale)?;
    let value = if exponent >= 0 {
        value.checked_mul(10i128.checked_pow(exponent.unsigned_abs())?)?
    } else {
        div_ceil(value, 10i128.checked_pow(exponent.unsigned_abs())?)
    };
    Some(if negative { -value } else { value })
}

/// A binary factor and a power of ten.
fn scale(suffix: &str) -> Option<(i128, i32)> {
    Some(match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        other => (1, other.strip_prefix(['e', 'E'])?.parse().ok()?),
    })
}

fn div_ceil(value: i128, by: i128) -> i128 {
    value.div_euclid(by) + i128::from(value.rem_euclid(by) != 0)
}

/// Whole units, rounded up.
pub fn value(quantity: &Quantity) -> i64 {
    saturate(div_ceil(nano(&quantity.0).unwrap_or(0), NANO))
}

/// Thousandths, rounded up.
pub fn milli(quantity: &Quantity) -> i64 {
    saturate(div_ceil(nano(&quantity.0).unwrap_or(0), NANO / 1000))
}

/// How many times `divisor` fits, rounded up; a missing or zero divisor counts as one.
pub fn divided(amount_nano: i128, divisor: Option<&Quantity>) -> i64 {
    let divisor = divisor.and_then(|divisor| nano(&divisor.0)).filter(|divisor| *divisor > 0).unwrap_or(NANO);
    saturate(div_ceil(amount_nano, divisor))
}

pub fn units(amount: i64) -> i128 {
    i128::from(amount) * NANO
}

/// A number of bytes as upstream prints it: in the largest binary unit that leaves nothing over.
pub fn binary(amount: i64) -> String {
    scaled(amount, 1024, &["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"])
}

/// A plain number, in the largest decimal unit that leaves nothing over.
pub fn decimal(amount: i64) -> String {
    scaled(amount, 1000, &["", "k", "M", "G", "T", "P", "E"])
}

fn scaled(mut amount: i64, step: i64, units: &[&str]) -> String {
    let mut unit = 0;
    while amount != 0 && amount % step == 0 && unit + 1 < units.len() {
        amount /= step;
        unit += 1;
    }
    format!("{amount}{}", units[unit])
}

fn saturate(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

/// The amount of one resource in a list, in thousandths.
pub fn milli_of(resources: Option<&Resources>, name: &str) -> Option<i64> {
    resources.and_then(|resources| resources.get(name)).map(milli)
}

/// The amount of one resource in a list, in units.
pub fn value_of(resources: Option<&Resources>, name: &str) -> Option<i64> {
    resources.and_then(|resources| resources.get(name)).map(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_of_every_notation() {
        for (text, milli_units) in [
            ("100m", 100),
            ("1", 1000),
            ("0.5", 500),
            ("1.5Ki", 1_536_000),
            ("1e3", 1_000_000),
            ("2k", 2_000_000),
            ("1n", 1),
            ("-1", -1000),
        ] {
            assert_eq!(milli(&Quantity(text.into())), milli_units, "{text}");
        }
        assert_eq!(value(&Quantity("64Mi".into())), 64 << 20);
        assert_eq!(value(&Quantity("1500m".into())), 2);
        assert_eq!(nano("Mi"), None);
        assert_eq!(nano("1Xi"), None);
    }

    #[test]
    fn amounts_are_printed_in_the_largest_unit() {
        assert_eq!((binary(100 << 20), binary(1025), binary(0)), ("100Mi".to_owned(), "1025".to_owned(), "0".to_owned()));
        assert_eq!((decimal(5000), decimal(1024)), ("5k".to_owned(), "1024".to_owned()));
    }

    #[test]
    fn division_rounds_up() {
        assert_eq!(divided(nano("1500m").unwrap(), None), 2);
        assert_eq!(divided(nano("64Mi").unwrap(), Some(&Quantity("1Mi".into()))), 64);
        assert_eq!(divided(nano("100m").unwrap(), Some(&Quantity("1m".into()))), 100);
    }
}
