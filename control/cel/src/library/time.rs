//! Parts of timestamps, in UTC or a given zone, and of durations.
use jiff::Zoned;
use jiff::tz::{Offset, TimeZone};

use super::text;
use crate::function::Library;
use crate::value::{Error, Value};

pub const TIMES: Library = &[
    ("timestamp.getFullYear() -> int", |a| part(a, |t| t.year().into())),
    ("timestamp.getFullYear(string) -> int", |a| part(a, |t| t.year().into())),
    ("timestamp.getMonth() -> int", |a| part(a, |t| i64::from(t.month()) - 1)),
    ("timestamp.getMonth(string) -> int", |a| part(a, |t| i64::from(t.month()) - 1)),
    ("timestamp.getDate() -> int", |a| part(a, |t| t.day().into())),
    ("timestamp.getDate(string) -> int", |a| part(a, |t| t.day().into())),
    ("timestamp.getDayOfMonth() -> int", |a| part(a, |t| i64::from(t.day()) - 1)),
    ("timestamp.getDayOfMonth(string) -> int", |a| part(a, |t| i64::from(t.day()) - 1)),
    ("timestamp.getDayOfWeek() -> int", |a| part(a, |t| t.weekday().to_sunday_zero_offset().into())),
    ("timestamp.getDayOfWeek(string) -> int", |a| part(a, |t| t.weekday().to_sunday_zero_offset().into())),
    ("timestamp.getDayOfYear() -> int", |a| part(a, |t| i64::from(t.day_of_year()) - 1)),
    ("timestamp.getDayOfYear(string) -> int", |a| part(a, |t| i64::from(t.day_of_year()) - 1)),
    ("timestamp.getHours() -> int", |a| part(a, |t| t.hour().into())),
    ("timestamp.getHours(string) -> int", |a| part(a, |t| t.hour().into())),
    ("timestamp.getMinutes() -> int", |a| part(a, |t| t.minute().into())),
    ("timestamp.getMinutes(string) -> int", |a| part(a, |t| t.minute().into())),
    ("timestamp.getSeconds() -> int", |a| part(a, |t| t.second().into())),
    ("timestamp.getSeconds(string) -> int", |a| part(a, |t| t.second().into())),
    ("timestamp.getMilliseconds() -> int", |a| part(a, |t| t.millisecond().into())),
    ("timestamp.getMilliseconds(string) -> int", |a| part(a, |t| t.millisecond().into())),
    ("duration.getHours() -> int", |a| whole(a, 3_600_000)),
    ("duration.getMinutes() -> int", |a| whole(a, 60_000)),
    ("duration.getSeconds() -> int", |a| whole(a, 1000)),
    ("duration.getMilliseconds() -> int", |a| whole(a, 1)),
];

fn part(args: &[Value], read: fn(&Zoned) -> i64) -> Result<Value, Error> {
    let Value::Timestamp(time) = &args[0] else { return Err(Error::no_overload()) };
    let zone = args.get(1).map_or(Ok(TimeZone::UTC), |name| zone(text(name)))?;
    Ok(Value::Int(read(&time.to_zoned(zone))))
}

/// `Europe/Berlin` or `+02:00`.
fn zone(name: &str) -> Result<TimeZone, Error> {
    let fixed = || {
        let (hours, minutes) = name.trim_start_matches(['+', '-']).split_once(':')?;
        let seconds = hours.parse::<i32>().ok()? * 3600 + minutes.parse::<i32>().ok()? * 60;
        Offset::from_seconds(if name.starts_with('-') { -seconds } else { seconds }).ok()
    };
    match fixed() {
        Some(offset) => Ok(TimeZone::fixed(offset)),
        None => TimeZone::get(name).map_err(|_| Error::new(format!("unknown time zone {name}"))),
    }
}

fn whole(args: &[Value], millis: i128) -> Result<Value, Error> {
    let Value::Duration(duration) = &args[0] else { return Err(Error::no_overload()) };
    Ok(Value::Int((duration.as_millis() / millis) as i64))
}
