//! Times as the API writes them, and ages as `kubectl get` shows them.
use jiff::Timestamp;

/// `metav1.Time`: RFC 3339 in UTC with whole seconds.
pub fn format(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `metav1.MicroTime`: RFC 3339 in UTC with six decimals.
pub fn format_micro(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// Reads RFC 3339 in any zone.
pub fn parse(text: &str) -> Option<Timestamp> {
    text.parse().ok()
}

/// Age of a timestamp as text, `<unknown>` when there is none.
pub fn age(timestamp: &str, now: Timestamp) -> String {
    match parse(timestamp) {
        Some(time) => human_duration(now.duration_since(time).as_secs()),
        None => "<unknown>".to_string(),
    }
}

/// Two units at most, as `kubectl` shows: `5m30s`, `3h12m`, `47h`, `2d5h`, `8y`.
pub fn human_duration(seconds: i64) -> String {
    if seconds < -1 {
        return "<invalid>".to_string();
    }
    if seconds < 0 {
        return "0s".to_string();
    }
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    let with_rest = |whole: i64, unit: &str, rest: i64, small: &str| {
        if rest == 0 { format!("{whole}{unit}") } else { format!("{whole}{unit}{rest}{small}") }
    };
    if seconds < 120 {
        format!("{seconds}s")
    } else if minutes < 10 {
        with_rest(minutes, "m", seconds % 60, "s")
    } else if minutes < 180 {
        format!("{minutes}m")
    } else if hours < 8 {
        with_rest(hours, "h", minutes % 60, "m")
    } else if hours < 48 {
        format!("{hours}h")
    } else if hours < 24 * 8 {
        with_rest(days, "d", hours % 24, "h")
    } else if hours < 24 * 365 * 2 {
        format!("{days}d")
    } else if hours < 24 * 365 * 8 {
        with_rest(days / 365, "y", days % 365, "d")
    } else {
        format!("{}y", days / 365)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_units_at_most() {
        const DAY: i64 = 86400;
        for (seconds, expected) in [
            (-2, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (600, "10m"),
            (3600 * 2 + 60 * 59, "179m"),
            (3600 * 3, "3h"),
            (3600 * 7 + 60, "7h1m"),
            (3600 * 47, "47h"),
            (2 * DAY, "2d"),
            (2 * DAY + 3600, "2d1h"),
            (9 * DAY, "9d"),
            (730 * DAY, "2y"),
            (731 * DAY, "2y1d"),
            (3000 * DAY, "8y"),
        ] {
            assert_eq!(human_duration(seconds), expected, "{seconds}");
        }
    }

    #[test]
    fn times_are_utc() {
        let time = parse("2024-05-01T12:00:00.123456789+02:00").expect("valid");
        assert_eq!(format(time), "2024-05-01T10:00:00Z");
        assert_eq!(format_micro(time), "2024-05-01T10:00:00.123456Z");
    }
}
