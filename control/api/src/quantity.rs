//! Resource quantities (`100m`, `1Gi`, `1.5e3`): exact values and upstream's canonical text.
use std::fmt;

use serde_json::Value;

/// How a quantity was written, and so how it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Format {
    #[default]
    DecimalSi,
    BinarySi,
    DecimalExponent,
}

/// A fixed-point number with nine decimals; equality and order are by value.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

const NANO: i128 = 1_000_000_000;
/// Values are capped here, as upstream's int64 ones are.
const LIMIT: i128 = i64::MAX as i128 * NANO;
const FORM: &str = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

/// (suffix, power) with multiples of ten's third powers: n is -3.
const DECIMAL: [(&str, i32); 10] = [("n", -3), ("u", -2), ("m", -1), ("", 0), ("k", 1), ("M", 2), ("G", 3), ("T", 4), ("P", 5), ("E", 6)];
const BINARY: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

impl Quantity {
    pub const ZERO: Quantity = Quantity { nanos: 0, format: Format::DecimalSi };

    /// Whole units.
    pub fn from_units(units: i64) -> Quantity {
        Quantity { nanos: i128::from(units) * NANO, format: Format::DecimalSi }
    }

    /// Thousandths: CPU.
    pub fn from_millis(millis: i64) -> Quantity {
        Quantity { nanos: i128::from(millis) * NANO / 1000, format: Format::DecimalSi }
    }

    /// Bytes, shown with binary suffixes.
    pub fn from_bytes(bytes: i64) -> Quantity {
        Quantity { nanos: i128::from(bytes) * NANO, format: Format::BinarySi }
    }

    pub fn parse(text: &str) -> Result<Quantity, String> {
        let wrong = || FORM.to_string();
        let (sign, unsigned) = match text.strip_prefix('-') {
            Some(rest) => (-1, rest),
            None => (1, text.strip_prefix('+').unwrap_or(text)),
        };
        let end = unsigned.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(unsigned.len());
        let (number, suffix) = unsigned.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(wrong());
        }
        let (format, binary, ten_power) = scale(suffix).ok_or_else(|| "unable to parse quantity's suffix".to_string())?;
        let digits = format!("{whole}{fraction}");
        let significant = digits.trim_start_matches('0');
        if significant.len() > 30 {
            return Ok(Quantity { nanos: sign * LIMIT, format });
        }
        let mut nanos: i128 = if significant.is_empty() { 0 } else { significant.parse().map_err(|_| wrong())? };
        let power = 9 + ten_power - fraction.len() as i32;
        nanos = nanos.checked_mul(binary).and_then(|value| shift_ten(value, power)).unwrap_or(LIMIT).min(LIMIT);
        Ok(Quantity { nanos: sign * nanos, format })
    }

    /// A JSON string or number.
    pub fn from_value(value: &Value) -> Result<Quantity, String> {
        match value {
            Value::String(text) => Quantity::parse(text),
            Value::Number(number) => Quantity::parse(&number.to_string()),
            _ => Err(FORM.to_string()),
        }
    }

    /// The quantity at a value that was decoded before; zero when it is absent.
    pub fn of(value: &Value) -> Quantity {
        Quantity::from_value(value).unwrap_or_default()
    }

    /// Whole units, rounded up.
    pub fn value(&self) -> i64 {
        saturate(ceil_div(self.nanos, NANO))
    }

    /// Thousandths, rounded up.
    pub fn millis(&self) -> i64 {
        saturate(ceil_div(self.nanos, NANO / 1000))
    }

    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    pub fn is_negative(&self) -> bool {
        self.nanos < 0
    }

    pub fn is_integer(&self) -> bool {
        self.nanos % NANO == 0
    }

    /// Rounded up to thousandths, as resource lists are stored.
    pub fn round_up_to_milli(self) -> Quantity {
        let milli = NANO / 1000;
        Quantity { nanos: ceil_div(self.nanos, milli) * milli, ..self }
    }
}

/// The suffix's format, binary factor and power of ten.
fn scale(suffix: &str) -> Option<(Format, i128, i32)> {
    if let Some(index) = BINARY.iter().skip(1).position(|known| *known == suffix) {
        return Some((Format::BinarySi, 1 << (10 * (index + 1)), 0));
    }
    if let Some((_, power)) = DECIMAL.iter().find(|(known, _)| *known == suffix) {
        return Some((Format::DecimalSi, 1, power * 3));
    }
    let exponent = suffix.strip_prefix(['e', 'E'])?;
    let power: i32 = exponent.parse().ok()?;
    Some((Format::DecimalExponent, 1, power.clamp(-64, 64)))
}

/// value × 10^power, rounded away from zero; none on overflow.
fn shift_ten(value: i128, power: i32) -> Option<i128> {
    if value == 0 {
        return Some(0);
    }
    if power >= 0 {
        return 10i128.checked_pow(power as u32).and_then(|factor| value.checked_mul(factor));
    }
    Some(10i128.checked_pow(power.unsigned_abs()).map_or(1, |divisor| ceil_div(value, divisor)))
}

/// Division that rounds towards positive infinity.
fn ceil_div(value: i128, divisor: i128) -> i128 {
    value.div_euclid(divisor) + i128::from(value.rem_euclid(divisor) != 0)
}

fn saturate(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

impl fmt::Display for Quantity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return write!(formatter, "0");
        }
        let small = self.nanos.abs() < 1024 * NANO || !self.is_integer();
        match self.format {
            Format::BinarySi if !small => {
                let (mut mantissa, mut index) = (self.nanos / NANO, 0);
                while mantissa % 1024 == 0 && index + 1 < BINARY.len() {
                    mantissa /= 1024;
                    index += 1;
                }
                write!(formatter, "{mantissa}{}", BINARY[index])
            }
            _ => {
                let (mut mantissa, mut index) = (self.nanos, 0);
                while mantissa % 1000 == 0 && index + 1 < DECIMAL.len() {
                    mantissa /= 1000;
                    index += 1;
                }
                let (suffix, power) = DECIMAL[index];
                match self.format {
                    Format::DecimalExponent if power != 0 => write!(formatter, "{mantissa}e{}", power * 3),
                    Format::DecimalExponent => write!(formatter, "{mantissa}"),
                    _ => write!(formatter, "{mantissa}{suffix}"),
                }
            }
        }
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Quantity) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Quantity) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Quantity) -> std::cmp::Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

/// The sum takes the left format, unless the left is zero.
impl std::ops::Add for Quantity {
    type Output = Quantity;

    fn add(self, other: Quantity) -> Quantity {
        let format = if self.is_zero() { other.format } else { self.format };
        Quantity { nanos: self.nanos + other.nanos, format }
    }
}

impl std::ops::Sub for Quantity {
    type Output = Quantity;

    fn sub(self, other: Quantity) -> Quantity {
        let format = if self.is_zero() { other.format } else { self.format };
        Quantity { nanos: self.nanos - other.nanos, format }
    }
}

impl From<Quantity> for Value {
    fn from(quantity: Quantity) -> Value {
        Value::String(quantity.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_become_canonical() {
        for (text, expected) in [
            ("0", "0"),
            ("0.1", "100m"),
            ("1000m", "1"),
            ("1500m", "1500m"),
            ("1000", "1k"),
            ("1024", "1024"),
            ("1024Ki", "1Mi"),
            ("1.5Gi", "1536Mi"),
            ("0.5Mi", "512Ki"),
            ("500Ki", "500Ki"),
            ("1Ki", "1Ki"),
            ("0.5Ki", "512"),
            ("1e3", "1e3"),
            ("12e6", "12e6"),
            ("1E", "1E"),
            ("1E2", "100"),
            ("100e-3", "100e-3"),
            ("-1.5", "-1500m"),
            ("1.0000000001", "1000000001n"),
            ("+5", "5"),
            (".5", "500m"),
            ("5.", "5"),
            ("129M", "129M"),
            ("123Mi", "123Mi"),
            ("10n", "10n"),
        ] {
            assert_eq!(Quantity::parse(text).map(|quantity| quantity.to_string()), Ok(expected.to_string()), "{text}");
        }
        for text in ["", "a", "1x", "1.2.3", "-", "1 Gi", "1KI", "Ki"] {
            assert!(Quantity::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn values_round_up() {
        let parse = |text| Quantity::parse(text).expect("valid");
        assert_eq!(parse("100m").value(), 1);
        assert_eq!(parse("1.0001").millis(), 1001);
        assert_eq!(parse("1Gi").value(), 1 << 30);
        assert!(parse("1Ki") > parse("1k") && parse("1000m") == parse("1"));
        assert_eq!((parse("1Gi") + parse("1Gi")).to_string(), "2Gi");
        assert_eq!((Quantity::ZERO + parse("1Gi")).to_string(), "1Gi");
        assert_eq!((parse("1") - parse("250m")).to_string(), "750m");
    }
}
