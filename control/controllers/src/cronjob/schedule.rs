//! Cron schedules: when one comes next (pure). Five fields, or a descriptor such as `@daily` and `@every 90m`.
use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};

/// One bit per value.
type Bits = u64;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Schedule {
    Fields(Fields, TimeZone),
    /// A constant distance, in seconds.
    Every(i64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fields {
    minute: Bits,
    hour: Bits,
    day: Bits,
    month: Bits,
    weekday: Bits,
    /// Both days are restricted: then either may match, else both must.
    either_day: bool,
}

const MONTHS: &[&str] = &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: &[&str] = &["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
/// How far ahead a match is looked for: leap days are at most eight years apart.
const HORIZON_DAYS: i32 = 9 * 366;

impl Schedule {
    /// `zone` is spec.timeZone; a zone in the text (`TZ=`, `CRON_TZ=`) comes first, and UTC last.
    pub fn parse(text: &str, zone: Option<&str>) -> Result<Self, String> {
        let (named, text) = match text.split_once(' ') {
            Some((first, rest)) if first.starts_with("TZ=") || first.starts_with("CRON_TZ=") => {
                (first.split_once('=').map(|(_, name)| name), rest.trim())
            }
            _ => (zone, text.trim()),
        };
        let zone = match named {
            None => TimeZone::UTC,
            Some(name) => TimeZone::get(name).map_err(|_| format!("provided bad location {name}: unknown time zone {name}"))?,
        };
        let fields = match text.strip_prefix('@') {
            None => text,
            Some("yearly" | "annually") => "0 0 1 1 *",
            Some("monthly") => "0 0 1 * *",
            Some("weekly") => "0 0 * * 0",
            Some("daily" | "midnight") => "0 0 * * *",
            Some("hourly") => "0 * * * *",
            Some(other) => {
                let length = other.strip_prefix("every ").ok_or_else(|| format!("unrecognized descriptor: @{other}"))?;
                return duration(length).map(|seconds| Self::Every(seconds.max(1)));
            }
        };
        let parts: Vec<&str> = fields.split_whitespace().collect();
        let [minute, hour, day, month, weekday] = parts[..] else {
            return Err(format!("expected exactly 5 fields, found {}: [{text}]", parts.len()));
        };
        let star = |field: &str| field.split(',').any(|part| part.starts_with(['*', '?']));
        let fields = Fields {
            minute: bits(minute, 0, 59, &[])?,
            hour: bits(hour, 0, 23, &[])?,
            day: bits(day, 1, 31, &[])?,
            month: bits(month, 1, 12, MONTHS)?,
            weekday: bits(weekday, 0, 6, DAYS)?,
            either_day: !star(day) && !star(weekday),
        };
        Ok(Self::Fields(fields, zone))
    }

    /// The first time after `after`; None when there is none in the coming years.
    pub fn next(&self, after: Timestamp) -> Option<Timestamp> {
        match self {
            Self::Every(seconds) => Timestamp::from_second(after.as_second() + seconds).ok(),
            Self::Fields(fields, zone) => fields.next(after, zone),
        }
    }
}

impl Fields {
    fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let start = after.to_zoned(zone.clone()).datetime();
        let mut date = start.date();
        let mut from = (start.hour(), start.minute());
        for _ in 0..HORIZON_DAYS {
            if self.on_day(date) {
                for (hour, minute) in self.times(from) {
                    let at = DateTime::from_parts(date, jiff::civil::Time::new(hour, minute, 0, 0).ok()?);
                    // A time that the clock skips doesn't come; one that it repeats comes the first time.
                    let zoned = zone.to_ambiguous_zoned(at).compatible().ok()?;
                    if zoned.datetime() == at && zoned.timestamp() > after {
                        return Some(zoned.timestamp());
                    }
                }
            }
            date = date.checked_add(Span::new().days(1)).ok()?;
            from = (0, 0);
        }
        None
    }

    fn on_day(&self, date: Date) -> bool {
        let day = has(self.day, date.day());
        let weekday = has(self.weekday, date.weekday().to_sunday_zero_offset());
        let fits = if self.either_day { day || weekday } else { day && weekday };
        has(self.month, date.month()) && fits
    }

    /// The times of a day from `from` on.
    fn times(&self, from: (i8, i8)) -> impl Iterator<Item = (i8, i8)> + '_ {
        let hours = (from.0..24).filter(|hour| has(self.hour, *hour));
        hours
            .flat_map(move |hour| (0..60).filter(|minute| has(self.minute, *minute)).map(move |minute| (hour, minute)))
            .filter(move |time| *time >= from)
    }
}

fn has(bits: Bits, value: i8) -> bool {
    bits >> value & 1 == 1
}

fn bits(field: &str, low: u32, high: u32, words: &[&str]) -> Result<Bits, String> {
    let mut all = 0;
    for part in field.split(',') {
        all |= part_bits(part, low, high, words)?;
    }
    Ok(all)
}

fn part_bits(part: &str, low: u32, high: u32, words: &[&str]) -> Result<Bits, String> {
    let number = |text: &str| -> Result<u32, String> {
        let word = (low..).zip(words).find(|(_, word)| word.eq_ignore_ascii_case(text)).map(|(number, _)| number);
        word.map_or_else(|| text.parse().map_err(|_| format!("failed to parse int from {text}")), Ok)
    };
    let (range, step) = part.split_once('/').map_or((part, None), |(range, step)| (range, Some(step)));
    let step_size = step.map_or(Ok(1), number)?;
    let (start, end) = match (range, range.split_once('-')) {
        ("*" | "?", _) => (low, high),
        (_, Some((start, end))) => (number(start)?, number(end)?),
        // "5/15" means from 5 on.
        (single, None) => (number(single)?, if step.is_some() { high } else { number(single)? }),
    };
    if start < low || end > high || start > end || step_size == 0 {
        return Err(format!("out of range: {part}"));
    }
    Ok((start..=end).step_by(step_size as usize).fold(0, |bits, value| bits | 1 << value))
}

/// A Go duration in whole seconds: "1h30m", "90s".
fn duration(text: &str) -> Result<i64, String> {
    let mut rest = text.trim();
    let mut seconds = 0.0;
    let bad = || format!("failed to parse duration @every {text}");
    if rest.is_empty() {
        return Err(bad());
    }
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').ok_or_else(bad)?;
        let number: f64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let end = rest.find(|letter: char| letter.is_ascii_digit()).unwrap_or(rest.len());
        seconds += number
            * match &rest[..end] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 0.001,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return Err(bad()),
            };
        rest = &rest[end..];
    }
    Ok(seconds as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_come_when_they_say() {
        let cases = [
            ("* * * * *", None, "2024-01-01T00:00:30Z", "2024-01-01T00:01:00Z"),
            ("*/15 * * * *", None, "2024-01-01T00:15:00Z", "2024-01-01T00:30:00Z"),
            ("5/20 3 * * *", None, "2024-01-01T03:25:00Z", "2024-01-01T03:45:00Z"),
            ("30 6-16/4 * * 1-5", None, "2024-01-05T14:30:00Z", "2024-01-08T06:30:00Z"),
            ("0 0 29 feb *", None, "2024-03-01T00:00:00Z", "2028-02-29T00:00:00Z"),
            ("0 0 13 * fri", None, "2024-01-01T00:00:00Z", "2024-01-05T00:00:00Z"),
            ("0 9 * * *", Some("Europe/Berlin"), "2024-07-01T00:00:00Z", "2024-07-01T07:00:00Z"),
            ("30 2 * * *", Some("Europe/Berlin"), "2024-03-30T12:00:00Z", "2024-04-01T00:30:00Z"),
            ("TZ=Asia/Tokyo 0 9 * * *", None, "2024-07-01T01:00:00Z", "2024-07-02T00:00:00Z"),
            ("@hourly", None, "2024-01-01T00:00:00Z", "2024-01-01T01:00:00Z"),
            ("@every 1h30m", None, "2024-01-01T00:00:05Z", "2024-01-01T01:30:05Z"),
        ];
        for (text, zone, after, expected) in cases {
            let schedule = Schedule::parse(text, zone).unwrap();
            assert_eq!(schedule.next(after.parse().unwrap()), Some(expected.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn a_day_that_never_comes_is_never() {
        assert_eq!(Schedule::parse("59 23 31 2 *", None).unwrap().next(Timestamp::UNIX_EPOCH), None);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "* * * *", "60 * * * *", "* * 0 * *", "*/0 * * * *", "@often", "@every x", "@every ", "TZ=Nowhere/X * * * * *"] {
            assert!(Schedule::parse(text, None).is_err(), "{text}");
        }
    }
}
