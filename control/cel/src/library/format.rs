//! `string.format`: the verbs %s %d %f %e %b %o %x %X.
use crate::value::{Error, Value, format_duration};

pub fn format(template: &str, args: &[Value]) -> Result<String, Error> {
    let mut out = String::new();
    let mut args = args.iter();
    let mut rest = template;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            out.push('%');
            rest = after;
            continue;
        }
        let precision = match rest.strip_prefix('.') {
            Some(digits) => {
                let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
                rest = &digits[end..];
                digits[..end].parse().map_err(|_| Error::new("error while converting precision to integer"))?
            }
            None => 6,
        };
        let verb = rest.chars().next().ok_or_else(|| Error::new("unexpected end of string"))?;
        rest = &rest[verb.len_utf8()..];
        let value = args.next().ok_or_else(|| Error::new("index out of range"))?;
        out.push_str(&formatted(verb, precision, value)?);
    }
    out.push_str(rest);
    Ok(out)
}

fn formatted(verb: char, precision: usize, value: &Value) -> Result<String, Error> {
    let unfit = |wanted: &str| Error::new(format!("error during formatting: {wanted}, was given {}", value.type_name()));
    Ok(match (verb, value) {
        ('s', value) => shown(value)?,
        ('d', Value::Int(number)) => number.to_string(),
        ('d', Value::Uint(number)) => number.to_string(),
        ('f', Value::Double(number)) => format!("{number:.precision$}"),
        ('f', Value::Int(number)) => format!("{:.precision$}", *number as f64),
        ('e', Value::Double(number)) => scientific(*number, precision),
        ('e', Value::Int(number)) => scientific(*number as f64, precision),
        ('b', Value::Int(number)) => signed(*number, |n| format!("{n:b}")),
        ('b', Value::Uint(number)) => format!("{number:b}"),
        ('b', Value::Bool(flag)) => u8::from(*flag).to_string(),
        ('o', Value::Int(number)) => signed(*number, |n| format!("{n:o}")),
        ('o', Value::Uint(number)) => format!("{number:o}"),
        ('x', value) => hexadecimal(value).ok_or_else(|| unfit("hex clause can only be used on integers, byte buffers, and strings"))?,
        ('X', value) => {
            hexadecimal(value).ok_or_else(|| unfit("hex clause can only be used on integers, byte buffers, and strings"))?.to_uppercase()
        }
        ('d', _) => return Err(unfit("decimal clause can only be used on integers")),
        ('f', _) => return Err(unfit("fixed-point clause can only be used on doubles")),
        ('e', _) => return Err(unfit("scientific clause can only be used on doubles")),
        ('b', _) => return Err(unfit("binary clause can only be used on integers and bools")),
        ('o', _) => return Err(unfit("octal clause can only be used on integers")),
        (verb, _) => return Err(Error::new(format!("could not parse formatting clause: unrecognized formatting clause \"{verb}\""))),
    })
}

/// Go writes at least two digits of exponent, and its sign.
fn scientific(number: f64, precision: usize) -> String {
    let text = format!("{number:.precision$e}");
    let Some((mantissa, exponent)) = text.split_once('e') else { return text };
    let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
    format!("{mantissa}e{sign}{digits:0>2}")
}

fn signed(number: i64, show: impl Fn(u64) -> String) -> String {
    let sign = if number < 0 { "-" } else { "" };
    format!("{sign}{}", show(number.unsigned_abs()))
}

fn hexadecimal(value: &Value) -> Option<String> {
    let bytes = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    match value {
        Value::Int(number) => Some(signed(*number, |n| format!("{n:x}"))),
        Value::Uint(number) => Some(format!("{number:x}")),
        Value::String(text) => Some(bytes(text.as_bytes())),
        Value::Bytes(raw) => Some(bytes(raw)),
        _ => None,
    }
}

fn shown(value: &Value) -> Result<String, Error> {
    let list = |parts: Result<Vec<String>, Error>| parts.map(|parts| parts.join(", "));
    Ok(match value {
        Value::Null => "null".into(),
        Value::Bool(flag) => flag.to_string(),
        Value::Int(number) => number.to_string(),
        Value::Uint(number) => number.to_string(),
        Value::Double(number) => number.to_string(),
        Value::String(text) => text.to_string(),
        Value::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::Timestamp(time) => time.to_string(),
        Value::Duration(duration) => format_duration(*duration),
        Value::Type(name) => name.to_string(),
        Value::List(items) => format!("[{}]", list(items.iter().map(shown).collect())?),
        Value::Map(map) => {
            format!("{{{}}}", list(map.iter().map(|(key, value)| Ok(format!("{key}: {}", shown(value)?))).collect())?)
        }
        Value::Optional(_) | Value::Opaque(_) => {
            return Err(Error::new(format!("error during formatting: string clause can't be used on {}", value.type_name())));
        }
    })
}
